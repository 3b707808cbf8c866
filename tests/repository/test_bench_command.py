"""``python -m bench`` as a command: its result files, what it never overwrites, and its
error for an unknown case.
"""

import json
import sys

import pytest

from bench import __main__ as harness
from bench.linear import LinearCase

CASES = [LinearCase("linear", 64, 32, 320, "float32", "cpu", zero) for zero in (False, True)]
QUICK = [
    "--suite",
    "linear",
    "--pages",
    "default",
    "--rounds",
    "1",
    "--quiet",
    "1",
    "--no-plot",
    "--no-memory",
    "--providers",
    "none",
]
FILE = "cpu-linear-default-pages.json"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command in an empty folder, with two small cases, and with results beside it
    that are committed.
    """
    monkeypatch.setitem(harness.SUITES, "linear", lambda device, tiny: CASES)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.chdir(tmp_path)
    committed = tmp_path / "results"
    committed.mkdir()
    (committed / FILE).write_text(
        json.dumps({"cases": [{"name": CASES[1].name, "results": [], "ours": "committed"}]})
    )
    monkeypatch.setattr(harness, "RESULTS", committed)
    monkeypatch.setattr(harness, "print_tables", lambda document: None)
    return lambda *arguments: harness.main([*QUICK, *arguments])


def test_committed_results_change_only_with_update(bench, tmp_path):
    before = (tmp_path / "results" / FILE).read_bytes()
    bench("--skip", "zero")
    assert [
        c["name"] for c in json.loads((tmp_path / "bench_output" / FILE).read_text())["cases"]
    ] == [CASES[0].name]
    for same in ("results", "bench_output/../results"):
        with pytest.raises(
            SystemExit, match="holds committed results: --update measures into them"
        ):
            bench("--out", same)
    assert (tmp_path / "results" / FILE).read_bytes() == before
    bench("--update", "--skip", "zero")
    cases = json.loads((tmp_path / "results" / FILE).read_text())["cases"]
    assert (
        [c["name"] for c in cases] == [c.name for c in CASES]
        and cases[1]["ours"] == "committed"
        and cases[0]["results"]
    )


def test_an_installed_package_has_no_results_to_update(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="is an installed package: name a folder with --out"):
        bench("--update")
    bench("--update", "--out", "mine", "--skip", "zero")
    machine = json.loads((tmp_path / "mine" / FILE).read_text())["machine"]
    assert machine["commit"] == "unknown", "of whatever checkout the environment lies in"


def test_a_word_that_no_case_has(bench, tmp_path):
    with pytest.raises(SystemExit) as said:
        bench("--only", "151936", "fp32")
    assert "--only 151936 fp32" in str(said.value) and all(c.name in str(said.value) for c in CASES)
    assert not (tmp_path / "bench_output").exists()


@pytest.mark.parametrize("option", [["--show"], ["--compare", "other.json"]])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"machine": {}}'])
def test_what_is_no_result_file(bench, tmp_path, capsys, option, content):
    for name in ("this.json", "other.json"):
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as code:
        bench(*option, "this.json")
    said = capsys.readouterr().err
    assert code.value.code == 2 and ("cannot be read" in said or "is no result file" in said)


def test_the_real_results_are_the_committed_ones(monkeypatch):
    assert (harness.HERE / "results") == harness.RESULTS and list(harness.RESULTS.glob("*.json"))
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench", "--out", str(harness.RESULTS), "--pages", "default", "--only", "256x32000"],
    )
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    with pytest.raises(SystemExit, match="--update"):
        harness.main()


def test_processes_of_its_own_fail_without_a_traceback(capfd):
    """By default there is one process for each kind of pages; the first that fails ends
    the command, with only its own message.
    """
    with pytest.raises(SystemExit) as code:
        harness.main(["--only", "no such case"])
    said = capfd.readouterr().err
    assert code.value.code == 1 and said.count("no case matches") == 1 and "Traceback" not in said
