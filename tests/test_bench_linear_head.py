"""The CPU bench of the linear head runs to its table and its file, in a shape of no meaning."""

import json
import sys

from bench import linear_head
from bench.linear import LinearCase


def test_measures_and_shows(tmp_path, monkeypatch, capsys):
    cases = [LinearCase("linear", 64, 32, 320, "float32", "cpu", zero) for zero in (False, True)]
    monkeypatch.setattr(linear_head, "CASES", cases)
    out = tmp_path / "head.json"
    for arguments in (["--rounds", "2", "--skip", "TRL", "Liger"], ["--show"]):
        monkeypatch.setattr(sys, "argv", ["bench.linear_head", "--out", str(out), *arguments])
        linear_head.main()
    document = json.loads(out.read_text())
    assert [c["name"] for c in document["cases"]] == [c.name for c in cases]
    for entry in document["cases"]:
        for name in ("linear one_pass", "linear two_pass"):
            row = entry["results"][name]
            assert row["gate"] <= 1 and len(row["ms"]) == 2
        assert all("note" not in row for row in entry["results"].values())
    assert capsys.readouterr().out.count("linear one_pass") == 4
