"""``make gpu``: everything that needs a GPU, in one command of at most four minutes,
without a network.

python -m bench.gpu                build, tests, compute-sanitizer, benchmark
python -m bench.gpu --only test    make gpu-test: build, tests, compute-sanitizer
python -m bench.gpu --only bench   make gpu-bench: build, benchmark
python -m bench.gpu --dry-run      the same stages on the CPU in tiny shapes, without a
                                   build: shows that the script works

One JSON and one log go to $OUT (default: gpu_output/).

A stage that fails or runs out of time does not stop the others; the exit code shows it.
Before the build, only the standard library is imported, and torch is imported only in
stages. The stages need torch, pytest, pybind11, ninja and setuptools (with wheel, if
older than 70.1). Without pytest-xdist tests run one after the other, without rich
tables are plain, without matplotlib there is no plot.

The 240 seconds are divided as follows. Seconds that are kept for later stages are not
available to earlier ones. ``--seconds`` multiplies all of them:

    stage                               at most     kept
    build                                    90       30
    tests                                   100       60
    memcheck, racecheck cuda            30 each  15 each
    bench                              the rest       60

``--only test`` leaves out the benchmark and has time for every check: initcheck and
synccheck of the CUDA kernels, memcheck and racecheck of Triton's.

The checks and the benchmark receive their time limit, begin with the most important
work, and name what they leave out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Seconds kept for the end: stopping late stages, writing, printing.
_MARGIN = 8.0
#: Grace period after SIGINT, so that pytest can write its report.
_GRACE = 4.0
#: Seconds of a run that fits a rented GPU, and those that :func:`stages` divides.
SECONDS = 240.0
#: Tools of compute-sanitizer, and the backends whose kernels they check. Triton's
#: compiler, not this package, places the barriers of its kernels. A whole run has time
#: for the first two.
CHECKS = [(tool, "cuda") for tool in ("memcheck", "racecheck", "initcheck", "synccheck")] + [
    (tool, "triton") for tool in ("memcheck", "racecheck")
]


@dataclass(frozen=True)
class Stage:
    """A command with its share of the time.

    It may take ``limit`` seconds. ``least`` seconds are kept for it while earlier
    stages run.
    """

    name: str
    kind: str  # build | test | bench
    command: Sequence[str]
    limit: float
    least: float
    environment: dict[str, str] = field(default_factory=dict)
    unsupported_reason: Callable[[], str | None] = lambda: None
    #: Seconds of its share for its start and end. The command receives the rest as
    #: --seconds. None: it receives no limit.
    reserve: float | None = None


@dataclass
class Outcome:
    stage: str
    outcome: str  # passed | failed | out of time | skipped
    reason: str = ""
    seconds: float = 0.0
    command: str = ""


# ---- the stages


def without(tool: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(tool) else f"{tool} was not found"


def stages(
    out: Path, dry: bool, seconds: float, commit: str = "", only: str | None = None
) -> list[Stage]:
    python, share = sys.executable, seconds / SECONDS
    # The checkout may belong to another user, and pip may refuse to change a system's
    # Python: the user requested both.
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-v",
    ]
    build = Stage(
        "build",
        "build",
        [*install, "-e", str(ROOT)],
        90 * share,
        30 * share,
        {
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "REWEIGHT_OPS_BUILD": "cuda",
        },
        lambda: "a dry run uses the installed packages" if dry else None,
    )
    # with tiny shapes on a shared machine, threads only wait for each other
    one_thread = {"OMP_NUM_THREADS": "1"}
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={out / 'gpu-tests.xml'}",
    ]
    if dry:
        tests = [*pytest, "tests/gpu", "-k", "not fp16 and not fp32"]
    else:
        workers = str(max(1, min(12, (os.cpu_count() or 2) * 3 // 4)))
        parallel = ["-n", workers] if importlib.util.find_spec("xdist") else []
        tests = [
            *pytest,
            *parallel,
            "tests/gpu",
            "tests/backends/triton/test_triton.py",
            "tests/backends/triton/test_triton_launches.py",
            "tests/backends/cuda/test_cuda_backend.py",
        ]
    found = [
        build,
        Stage(
            "tests",
            "test",
            tests,
            100 * share,
            60 * share,
            {"REWEIGHT_OPS_GPU_TESTS": "cpu", **one_thread} if dry else {},
        ),
    ]
    checks = CHECKS if only == "test" else CHECKS[:2]
    for tool, backend in (("memcheck", "cpu"),) if dry else checks:
        watch = (
            []
            if dry
            else [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                "--target-processes",
                "all",
            ]
        )
        command = [*watch, python, "tests/gpu/sanitize.py", backend, "cpu" if dry else "cuda"]
        missing = (lambda: None) if dry else without("compute-sanitizer")
        found.append(
            Stage(
                f"{tool} {backend}",
                "test",
                command,
                30 * share,
                15 * share,
                unsupported_reason=missing,
                reserve=15,
            )
        )
    bench = [python, "-m", "bench", "--out", str(out), "--rounds", "2" if dry else "15"]
    bench += (
        [
            "--tiny",
            "--only",
            "bfloat16",
            "--backends",
            "cpu",
            "--providers",
            "eager,TRL,Liger,QuACK,CCE,flash",
            "--no-plot",
        ]
        if dry
        else ["--device", "cuda"]
    )
    bench += ["--commit", commit] if commit else []
    return [
        *found,
        Stage(
            "bench",
            "bench",
            bench,
            seconds,
            60 * share,
            one_thread if dry else {},
            reserve=20,
        ),
    ]


# ---- running them


def _listen() -> None:
    """Let a child hear an interrupt, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_stage(stage: Stage, allowed: float, log: Path) -> Outcome:
    """Run a stage to its end or for ``allowed`` seconds, and append its output to the
    log.
    """
    command = " ".join(stage.command)
    reason = stage.unsupported_reason()
    if reason is not None:
        return Outcome(stage.name, "skipped", reason, command=command)
    if allowed < stage.least / 2:
        return Outcome(stage.name, "out of time", "not started", command=command)
    told = [] if stage.reserve is None else ["--seconds", f"{max(allowed - stage.reserve, 5):.0f}"]
    arguments = [*stage.command, *told]
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(arguments)}\n")
        file.flush()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
        # A separate session: all processes that it starts can be ended with it.
        try:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_listen,
            )
        except OSError as error:
            return Outcome(stage.name, "failed", str(error), command=command)
        grace = min(_GRACE, allowed / 4)
        try:
            code = process.wait(allowed - grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome(
                stage.name,
                "out of time",
                f"ended after {allowed:.0f} s",
                time.monotonic() - began,
                command,
            )
    took = time.monotonic() - began
    return Outcome(
        stage.name,
        "failed" if code else "passed",
        f"exit code {code}" if code else "",
        took,
        command,
    )


def run_all(
    chosen: list[Stage], seconds: float, log: Path, say: Callable[[str], None]
) -> list[Outcome]:
    deadline = time.monotonic() + seconds - _MARGIN
    outcomes: list[Outcome] = []
    for i, stage in enumerate(chosen):
        kept = sum(later.least for later in chosen[i + 1 :] if later.unsupported_reason() is None)
        remaining = deadline - time.monotonic()
        say(f"{stage.name} ...")
        outcomes.append(
            run_stage(
                stage, min(stage.limit, max(remaining - kept, min(stage.least, remaining))), log
            )
        )
        done = outcomes[-1]
        say(
            f"{stage.name}: {done.outcome} after {done.seconds:.0f} "
            f"s{': ' + done.reason if done.reason else ''}"
        )
        if done.outcome in ("failed", "out of time"):
            say("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    return outcomes


# ---- results


def test_counts(path: Path) -> dict[str, Any]:
    """The counts of a JUnit file, and the names of the tests that did not pass."""
    import xml.etree.ElementTree as ElementTree

    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {}
    counts: dict[str, Any] = {
        k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")
    }
    cases = [c for s in suites for c in s.iter("testcase")]
    counts["failed"] = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    return counts


def last_table(outcomes: list[Outcome], tests: dict[str, Any], bench: Path) -> list[str]:
    """One line per stage, the counts of the tests, and one line per case of the
    benchmark.
    """
    lines = [
        f"{o.stage:<18} {o.outcome:<12} {o.seconds:6.0f} s  {o.reason}".rstrip() for o in outcomes
    ]
    if tests:
        lines.append(
            f"tests: {tests['tests']} run, {tests['failures'] + tests['errors']} failed, "
            f"{tests['skipped']} skipped"
        )
        lines += [f"  failed: {name}" for name in tests["failed"][:20]]
    if bench.exists():
        from .report import summary

        lines += ["", *summary(json.loads(bench.read_text()))]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=("test", "bench"), help="run the build and this part")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit for everything together (default: {SECONDS:.0f}; three times as much "
        "for a dry run, whose processor may be shared)",
    )
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "gpu_output"))
    parser.add_argument(
        "--commit", default="", help="the commit that is run, if this is not a git checkout"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on the CPU, in tiny shapes, without a build"
    )
    options = parser.parse_args(arguments)
    usual = SECONDS * (3 if options.dry_run else 1)
    seconds = usual if options.seconds is None else options.seconds
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log, bench = out / "gpu.log", out / "gpu-bench.json"
    for stale in (log, bench, out / "gpu-tests.xml", out / "gpu.json"):
        stale.unlink(missing_ok=True)
    log.touch()
    if not options.dry_run and shutil.which("nvidia-smi") is None:
        print(
            "no GPU: nvidia-smi was not found. `python -m bench.gpu --dry-run` shows on the CPU "
            "that the script works.",
            file=sys.stderr,
        )
        return 2
    chosen = [
        s
        for s in stages(out, options.dry_run, seconds, options.commit, options.only)
        if options.only in (None, s.kind) or s.kind == "build"
    ]
    outcomes = run_all(chosen, seconds, log, lambda text: print(text, flush=True))
    tests = test_counts(out / "gpu-tests.xml")
    failed = [o for o in outcomes if o.outcome in ("failed", "out of time")]
    document = {
        "dry_run": options.dry_run,
        "stages": [asdict(o) for o in outcomes],
        "tests": tests,
        "bench": bench.name if bench.exists() else None,
    }
    (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    print(
        "\n".join(
            [
                "",
                *last_table(outcomes, tests, bench),
                "",
                f"{len(failed)} of {len(outcomes)} stages failed; everything is in {out}",
            ]
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
