"""The documentation site builds without a warning, its code runs, and its statements
about the package are true.
"""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

import reweight_ops as rw
from reweight_ops.integrations.trainers import TRAINERS

DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "trainers" not in p.parts)


def test_it_builds_without_a_warning(tmp_path):
    """Links, anchors and the reference included: whatever MkDocs warns of ends a strict
    build.
    """
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",  # not --quiet: what is not said is not counted
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference/specs/index.html").read_text()
    missing = [
        name for name, entry in rw.METHODS.items() if f".{entry.function.__name__}" not in reference
    ]
    assert not missing and ":func:" not in reference
    ops = (tmp_path / "reference/ops/index.html").read_text()
    assert "<blockquote" not in reference + ops, "an example that is no code, or a line with >"
    # what the package writes into its docstrings when it is imported
    assert "Online normalizer calculation" in ops and "<code>group_ids</code>" in ops
    assert not list(tmp_path.rglob("*.py"))
    catalogue = (tmp_path / "methods/index.html").read_text()
    assert catalogue.count("<math") > 400 and "<code>-A·logp</code>" not in catalogue


#: The blocks of these pages run by themselves. Those of recipes.md need a policy and
#: rollouts: tests/catalogue/test_recipes.py runs each of them.
RUN = [p for p in PAGES if "```python" in p.read_text() and p != DOCS / "recipes.md"]


@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(DOCS)))
@pytest.mark.usefixtures("registry")
def test_python_of_a_page_runs(page):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), namespace)


def test_each_rule_is_cited_by_a_test():
    rules = re.findall(r"^\* \*\*(S\d+)\.\*\*", (DOCS / "semantics.md").read_text(), re.M)
    assert rules == [f"S{i}" for i in range(1, len(rules) + 1)]
    notes = [
        re.findall(r"# docs/semantics\.md: (.+)", p.read_text())
        for p in (ROOT / "tests").rglob("test_*.py")
        if p.name != "test_site.py"
    ]
    cited = {rule for found in notes for note in found for rule in note.split(", ")}
    assert cited == set(rules)


def test_trainers_and_their_versions():
    for page, up in ((DOCS / "versions.md", "docs/"), (ROOT / "README.md", "")):
        rows = re.findall(r"^\| \[([^\]]+)\]\((\S+)\) \| (.+) \|$", page.read_text(), re.M)
        told = {name: (up + link, versions) for name, link, versions in rows}
        assert told == {
            t.name: (t.page, ", ".join(t.tested) or f"a transcription of {t.commit}")
            for t in TRAINERS.values()
        }


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_environment_variables_are_listed():
    told = re.findall(r"^\| `(REWEIGHT_OPS_\w+)` \|", (DOCS / "api.md").read_text(), re.M)
    sources = [*(ROOT / "reweight_ops").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]
    read = {
        name
        for path in (*sources, ROOT / "setup.py")
        for name in re.findall(r"""["'](REWEIGHT_OPS_[A-Z_]+)["']""", path.read_text())
    }
    assert sorted(told) == sorted(read)
