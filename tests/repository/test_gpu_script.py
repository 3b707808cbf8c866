"""``make gpu`` without a GPU: the same script, stages, tests and benchmark in tiny
shapes, and its runner on failures.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.distill import JOBS
from bench.gpu import Stage, run_all, stages
from bench.rows import JOBS as ROWS

ROOT = Path(gpu.__file__).parent.parent


def stage(code, limit=60.0, least=1.0, kind="test", **more):
    return Stage(code[:20], kind, [sys.executable, "-c", code], limit, least, **more)


def test_the_dry_run(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {s["stage"]: s["outcome"] for s in found["stages"]}
    assert outcomes == {
        "build": "skipped",
        "tests": "passed",
        "memcheck cpu": "passed",
        "bench": "passed",
    }
    assert found["dry_run"] and found["tests"]["tests"] > 30 and not found["tests"]["failed"]
    bench = json.loads((tmp_path / "gpu-bench.json").read_text())
    assert bench["not_reached"] == []
    assert {c["case"]["job"] for c in bench["cases"]} == {
        "loss",
        "logps",
        "logps+grad",
        "grad",
        "linear",
        "linear ce",
        "kl",
        "kl+grad",
        "distill",
        *JOBS,
        *ROWS,
    }
    for case in bench["cases"]:
        ours = [r for r in case["results"] if r["ours"]]
        assert ours and all(r["ms"] and r["gate"] <= 1 for r in ours), case["name"]
        for r in case["results"]:  # who is not measured says why
            assert r["ms"] or r["absent"], r
    assert len(list(tmp_path.iterdir())) <= 8
    table = done.stdout.splitlines()[-len(bench["cases"]) - 10 :]
    assert any("0 of 4 stages failed" in line for line in table) and max(map(len, table)) < 140


def test_a_failing_stage_stops_no_other_and_is_told(tmp_path):
    log = tmp_path / "log"
    log.touch()
    said = []
    chosen = [
        stage("import sys; print('the reason'); sys.exit(3)"),
        stage("print('fine')"),
        stage("x", unsupported_reason=lambda: "no such tool"),
    ]
    chosen.append(Stage("missing", "test", ["/no/such/program"], 10, 1))
    outcomes = run_all(chosen, 60, log, said.append)
    assert [o.outcome for o in outcomes] == ["failed", "passed", "skipped", "failed"]
    assert "exit code 3" in outcomes[0].reason and any("the reason" in text for text in said)
    assert outcomes[2].reason == "no such tool"


def test_a_stage_that_hangs_ends_with_its_children(tmp_path):
    log, pid = tmp_path / "log", tmp_path / "pid"
    log.touch()
    hangs = f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    began = time.monotonic()
    outcomes = run_all([stage(hangs, limit=4.0), stage("print(1)")], 60, log, lambda text: None)
    assert [o.outcome for o in outcomes] == [
        "out of time",
        "passed",
    ] and time.monotonic() - began < 40
    for _ in range(50):
        state = Path(f"/proc/{pid.read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child is still there")


def test_a_late_stage_may_still_write_what_it_has(tmp_path):
    log = tmp_path / "log"
    log.touch()
    late = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('half of it')"
    (outcome,) = run_all([stage(late, limit=12.0)], 60, log, lambda text: None)
    assert outcome.outcome == "out of time" and "\nhalf of it\n" in log.read_text()


def test_a_stage_is_told_how_long_it_has(tmp_path):
    log = tmp_path / "log"
    log.touch()
    run_all(
        [
            stage("import sys; print(sys.argv)", limit=40.0, reserve=15.0),
            stage("import sys; print(sys.argv)"),
        ],
        60,
        log,
        lambda text: None,
    )
    assert (
        log.read_text().count("['-c', '--seconds', '25']") == 1
        and log.read_text().count("['-c']") == 1
    )


def test_time_is_kept_for_what_comes_later(tmp_path):
    log = tmp_path / "log"
    log.touch()
    chosen = [stage("import time; time.sleep(600)", limit=600.0), stage("print(1)", least=6.0)]
    outcomes = run_all(chosen, gpu._MARGIN + 8, log, lambda text: None)
    assert [o.outcome for o in outcomes] == ["out of time", "passed"]
    assert outcomes[0].seconds < 4


@pytest.mark.parametrize("only", [None, "test", "bench"])
def test_a_run_fits_in_four_minutes(tmp_path, only):
    every = stages(tmp_path, False, gpu.SECONDS, only=only)
    run = [s for s in every if only in (None, s.kind) or s.kind == "build"]
    assert gpu.SECONDS == 240 and sum(s.least for s in run) + gpu._MARGIN <= 240
    assert {s.name: s.limit for s in every}["tests"] <= 100
    checks = [f"{tool} {backend}" for tool, backend in gpu.CHECKS]
    assert checks[:2] == ["memcheck cuda", "racecheck cuda"]
    names = [s.name for s in every if s.name in checks]
    assert names == (checks if only == "test" else checks[:2])


def test_more_time_is_divided_alike(tmp_path):
    short, long = (stages(tmp_path, False, gpu.SECONDS * k) for k in (1, 2))
    assert [2 * s.least for s in short] == [s.least for s in long]
    assert [2 * s.limit for s in short] == [s.limit for s in long]


def test_the_build_asks_for_kernels_and_no_network(tmp_path):
    every = stages(tmp_path, False, gpu.SECONDS)
    assert {s.kind for s in every} == {"build", "test", "bench"}
    # There is no network, and nothing can be fetched.
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(every[0].command)
    assert every[0].environment["REWEIGHT_OPS_BUILD"] == "cuda", (
        "a GPU's kernels are asked for by name: without them the run shows nothing"
    )


@pytest.mark.skipif(bool(gpu.shutil.which("nvidia-smi")), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
