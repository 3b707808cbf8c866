"""The committed measurements can be shown, and name their machine and commit."""

import json
import re

import pytest
from paths import ROOT

from bench import page
from bench.__main__ import main
from bench.report import print_tables, rows_of, summary

FILES = sorted((ROOT / "bench/results").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_can_be_shown_and_says_where_it_is_from(file, capsys):
    text = file.read_text()
    document = json.loads(text)
    assert document["machine"]["processor"] and re.match(
        r"[0-9a-f]{7}", document["machine"]["commit"]
    )
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work)[^"]*"', text), "a path of the machine"
    lines = summary(document)
    assert len(lines) > len(document["cases"])
    print_tables(document)
    assert all(
        entry["name"].split()[0] in capsys.readouterr().out for entry in document["cases"][:1]
    )


def test_the_performance_page_is_fresh_and_a_stale_one_is_named(tmp_path):
    assert page.stale() == []
    assert page.stale(tmp_path) == [
        "performance.md",
        *(f"performance/{s.name}.svg" for s in (*page.SECTIONS, page.OVERVIEW)),
    ]
    (tmp_path / "performance").mkdir()
    text = (page.DOCS / "performance.md").read_text()
    (tmp_path / "performance.md").write_text(text.replace("1.60", "1.50", 1))
    for section in (*page.SECTIONS, page.OVERVIEW):
        drawn = (page.DOCS / "performance" / f"{section.name}.svg").read_text()
        (tmp_path / "performance" / f"{section.name}.svg").write_text(
            drawn.replace(page.digest(section), "0" * 16) if section.name == "cpu" else drawn
        )
    assert page.stale(tmp_path) == ["performance.md", "performance/cpu.svg"]


def test_every_committed_result_is_on_the_performance_page():
    assert {name for s in page.SECTIONS for name in s.files} == {f.stem for f in FILES}


def test_two_result_files_side_by_side(capsys, tmp_path):
    first, second = (
        str(ROOT / f"bench/results/cpu-{kind}-pages.json") for kind in ("default", "huge")
    )
    main(["--compare", first, second])
    shown = capsys.readouterr().out.splitlines()
    assert (
        "default pages" in shown[0]
        and "huge pages" in shown[1]
        and shown[-1] == "only in A: 0, only in B: 0"
    )
    line = next(
        line
        for line in shown
        if line.startswith("loss 512x151936 bfloat16 ") and " cpu in place " in line
    ).split()
    a, b, ratio = float(line[-5]), float(line[-3]), float(line[-1])
    assert abs(a / b - ratio) < 0.01
    main(["--compare", first, str(ROOT / "bench/results/h200-kernels.json")])
    assert "no provider of a case in common" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_an_error_of_one_line(capsys, tmp_path):
    good, text, other = FILES[0], tmp_path / "text.json", tmp_path / "other.json"
    text.write_text("no JSON")
    other.write_text("{}")
    for bad in (tmp_path / "missing.json", tmp_path, text, other):
        for arguments in (["--show", str(bad)], ["--compare", str(good), str(bad)]):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 2
            assert str(bad) in capsys.readouterr().err.splitlines()[-1]


def test_what_the_page_says_of_commits_rounds_and_shares():
    text = page.markdown().replace("On the\nCPU", "On the CPU")
    of_a_gpu, of_a_cpu = [], []
    for file in FILES:
        document = json.loads(file.read_text())
        (line,) = (
            line for line in text.splitlines() if line.startswith(f"`bench/results/{file.name}`")
        )
        assert f"commit {document['machine']['commit']}, " in line
        for entry in document["cases"]:
            least, *most = re.search(r"(\d+)(?: to (\d+))? rounds", line).groups()
            assert int(least) <= entry.get("rounds", document["rounds"]) <= int(most[0] or least)
            found = of_a_gpu if "multiprocessors" in document["machine"] else of_a_cpu
            found += [r["of_limit"] for r in rows_of(entry) if "ms" in r]
    assert "On the GPU no share is above 1.00." in text and max(of_a_gpu) < 1.005
    assert "On the CPU some are" in text and max(of_a_cpu) > 1.005


SPEED = re.compile(r"\d ?(?:ms|us|µs|[GT]B/s|TFLOP/s)\b|\d ?(?:x|times) (?:as fast|faster)")


def test_no_other_page_states_a_measured_speed():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    computed = ROOT / "docs/scaling.md"
    found = [
        f"{path.name}: {line}"
        for path in pages
        if path not in (ROOT / "docs/performance.md", computed)
        for line in path.read_text().splitlines()
        if SPEED.search(line)
    ]
    assert len(pages) > 30 and not found, "\n".join(found)
    assert (
        SPEED.search((ROOT / "docs/performance.md").read_text())
        and "assumptions" in computed.read_text()
    )
