"""The committed measurements: each can be shown, and says what it was measured on and of which commit."""

import json
import re

import pytest
from paths import ROOT

from bench.report import print_tables, summary

FILES = sorted((ROOT / "bench/results").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_can_be_shown_and_says_where_it_is_from(file, capsys):
    text = file.read_text()
    document = json.loads(text)
    assert document["machine"]["processor"] and re.match(r"[0-9a-f]{7}", document["machine"]["commit"])
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work)[^"]*"', text), "a path of the machine"
    lines = summary(document)
    assert len(lines) > len(document["cases"])
    print_tables(document)
    assert all(entry["name"].split()[0] in capsys.readouterr().out for entry in document["cases"][:1])
