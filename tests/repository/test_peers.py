"""The extra ``peers``: what the benchmark and the conformance table compare with."""

import ast
import re

import tomllib
from paths import ROOT

from bench.peers import PEERS

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def names(extra):
    """The distributions of an extra, and of this package's extras that it names."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, others = re.match(r"([\w-]+)(?:\[(.*)\])?", requirement).groups()
        nested = others.split(",") if name == "reweight-ops" else []
        found |= set().union(*map(names, nested)) if nested else {name}
    return found


def imported():
    """The packages that the benchmark imports where they are installed."""
    calls = (
        node
        for path in (ROOT / "bench").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_or_absent"
    )
    return {call.args[0].value.split(".")[0] for call in calls}


def test_the_benchmark_imports_what_the_extra_names():
    assert imported() == set(PEERS)
    assert set(PEERS.values()) - names("peers") == {"flash-attn"}


def test_the_conformance_table_runs_what_the_extra_names():
    lines = (ROOT / "tests" / "support" / "peers.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert pinned and pinned <= names("peers")
