"""The title of a paper is written once."""

import ast
from collections import Counter

import pytest
from paths import ROOT

import reweight_ops as rw
from reweight_ops._core.catalogue.registry import published
from reweight_ops._core.catalogue.titles import TITLES


def test_no_title_is_written_twice():
    written = Counter()
    for path in (ROOT / "reweight_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "published":
                keywords = {
                    k.arg: getattr(k.value, "value", "a name")
                    for k in node.keywords
                    if k.arg in ("paper", "arxiv")
                }
                if keywords.get("arxiv", "unknown") != "unknown" and "paper" in keywords:
                    written[keywords["arxiv"]] += 1
    assert len(written) > 80
    assert not [arxiv for arxiv, times in written.items() if times > 1 or arxiv in TITLES]


@pytest.mark.parametrize(
    "given", [{"arxiv": "2505.12929", "paper": "Again"}, {"arxiv": "2505.99999"}]
)
def test_a_title_comes_from_one_place(given):
    with pytest.raises(rw.InvalidCall, match="written once"):
        published("Again", name="again", kind="reward", **given)
