"""``python -m bench`` (installed: ``reweight-ops bench``) measures kernels and ops.

It prints a table, and writes JSON and a plot under bench_output/.

python -m bench                      all cases, with default pages and with huge pages
                                     (two processes)
python -m bench --update             the same into the committed results of
                                     bench/results/; nothing else writes there
python -m bench --only 128x151936 --rounds 15
python -m bench --suite linear       from hidden states: the head's GEMMs with the loss
                                     between them
python -m bench --suite pair         divergences of two logits tensors
python -m bench --suite distill      from hidden states of a student and of a teacher
python -m bench --suite rows         picked ids, kept sets, statistics from hidden
                                     states
python -m bench --show bench/results/cpu-huge-pages.json
python -m bench --compare A.json B.json
                                     the cases that both files have, side by side
python -m bench --device cuda        a GPU's cases, also from hidden states
                                     (make gpu-bench runs this)
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import cases
from .compare import compare
from .distill import distill_cases, distill_providers
from .divergence import divergence_cases, divergence_providers
from .linear import linear_cases, linear_providers
from .measure import Effort, Memory, foreign_load, run_case
from .peers import PEERS
from .progress import Steps
from .providers import Provider, providers
from .report import plot, print_tables
from .rows import rows_cases, rows_providers

HERE = Path(__file__).resolve().parent
#: Committed measurements. An installed package has none.
RESULTS = HERE / "results"


def extension() -> dict[str, Any] | None:
    """Build information of the C++ kernels, or None without them."""
    try:
        from reweight_ops import _C
    except ImportError:
        return None
    return {**_C.build_info(), "level": _C.level()}


def machine(device: str, commit: str | None) -> dict[str, Any]:
    import torch

    import reweight_ops

    def git(*arguments: str) -> str:
        # installed: a virtual environment may lie in a checkout of another project
        if not RESULTS.is_dir():
            return ""
        try:
            return subprocess.run(
                ["git", *arguments], cwd=HERE, capture_output=True, text=True
            ).stdout.strip()
        except OSError:
            return ""

    distributions = importlib.metadata.packages_distributions()

    def version(name: str) -> str | None:
        found = distributions.get(name)
        return importlib.metadata.version(found[0]) if found else None

    modified = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results")
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    found = {
        "processor": torch.cuda.get_device_name() if device == "cuda" else model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        # `chrt -f 50`: no other process gets a core while a case is measured
        "real_time": os.sched_getscheduler(0) == os.SCHED_FIFO,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", *PEERS)},
        "reweight_ops": reweight_ops.__version__,
        "commit": commit
        or (git("rev-parse", "--short", "HEAD") or "unknown") + (" (modified)" if modified else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    found["extension"] = extension()
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": p.multi_processor_count,
            "memory": p.total_memory,
            "l2": p.L2_cache_size,
        }
    return found


def quietest(
    case: Any, who: list[Provider], options: argparse.Namespace, steps: Steps
) -> dict[str, Any]:
    """Measure one case while other processes use little of the machine.

    It measures up to three times and returns the quietest measurement.
    """
    best: dict[str, Any] | None = None
    effort = Effort(
        options.rounds, options.slow, None if options.no_memory else Memory(case.device)
    )
    for _ in range(3):
        load, give_up = foreign_load(), time.monotonic() + options.patience
        next(load)
        while time.monotonic() < give_up:
            time.sleep(2)
            if next(load) <= options.quiet:
                break
        steps.restart()
        results, limits, busy = run_case(case, who, effort, steps.advance)
        entry = {
            "name": case.name,
            "case": asdict(case),
            "logits_bytes": case.logits_bytes,
            "foreign_load": busy,
            "limits": limits,
        }
        entry |= {k: getattr(case, k)() for k in ("least_bytes", "least_flops") if hasattr(case, k)}
        entry |= {"gradient_bytes": case.gradient_bytes} if hasattr(case, "gradient_bytes") else {}
        entry["results"] = [r.to_json() for r in results]
        if best is None or busy < best["foreign_load"]:
            best = entry
        if busy <= options.quiet:
            break
    assert best is not None
    return best


def file_name(options: argparse.Namespace, huge_pages: bool) -> str:
    suite = "" if options.suite == "logits" else f"{options.suite}-"
    return (
        "gpu-bench.json"
        if of_gpu(options)
        else f"cpu-{suite}{'huge' if huge_pages else 'default'}-pages.json"
    )


def of_gpu(options: argparse.Namespace) -> bool:
    return bool(options.device == "cuda" or options.tiny)


#: Suites by name. A GPU runs all.
SUITES = {
    "logits": cases,
    "linear": linear_cases,
    "pair": divergence_cases,
    "distill": distill_cases,
    "rows": rows_cases,
}


def suite(options: argparse.Namespace) -> list[Any]:
    """Every case of the suite.

    On a GPU these are the cases of all suites; the linear head and pairs of logits do
    not come last.
    """
    every = {name: list(which(options.device, options.tiny)) for name, which in SUITES.items()}
    if not of_gpu(options):
        return every[options.suite]
    logits = every.pop("logits")
    return [*logits[:8], *(case for others in every.values() for case in others), *logits[8:]]


def kept(path: Path, measured: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """Merge the new measurements with the other cases of a result file."""
    new = {entry["name"] for entry in measured}
    old = (
        [entry for entry in json.loads(path.read_text())["cases"] if entry["name"] not in new]
        if path.exists()
        else []
    )
    return sorted(
        [*old, *measured],
        key=lambda entry: order.index(entry["name"]) if entry["name"] in order else len(order),
    )


def folder(options: argparse.Namespace) -> Path:
    """Folder of the results.

    Committed results are replaced only on request, and an installed package has none to
    update.
    """
    asked = Path(options.out or (RESULTS if options.update else "bench_output")).resolve()
    if asked == RESULTS and not RESULTS.is_dir():
        raise SystemExit(
            "--update writes the committed results of a checkout, and this is an installed "
            "package: name a folder with --out."
        )
    if asked == RESULTS and not options.update:
        raise SystemExit(
            f"{RESULTS} holds committed results: --update measures into them, and keeps the "
            "cases that are not measured."
        )
    return asked


def measure(options: argparse.Namespace) -> None:
    every, out = suite(options), folder(options)
    if of_gpu(options):
        # other work of the host's processor does not affect a GPU's own clock
        options.quiet = 1.0
    chosen = [
        c
        for c in every
        if all(word in c.name for word in options.only)
        and not any(word in c.name for word in options.skip)
    ]
    if not chosen:
        words = " ".join(
            ["--only", *options.only, *(["--skip", *options.skip] if options.skip else [])]
        )
        raise SystemExit(
            "\n  ".join(
                [f"no case matches {words}; the cases of this suite are:", *(c.name for c in every)]
            )
        )
    backends = (
        tuple(options.backends.split(","))
        if options.backends
        else (("cpu",) if options.device == "cpu" else ("cuda", "triton"))
    )
    who = [
        p
        for p in [
            *providers(backends),
            *linear_providers(backends, tuple(options.chunk_rows)),
            *divergence_providers(backends),
            *distill_providers(backends),
            *rows_providers(backends),
        ]
        if not options.providers
        or p.ours
        or any(word in p.name for word in options.providers.split(","))
    ]
    document: dict[str, Any] = {
        "machine": machine(options.device, options.commit),
        "rounds": options.rounds,
        "cases": [],
        "not_reached": [],
    }
    path = out / file_name(options, document["machine"]["huge_pages"])
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, measured = time.monotonic() + options.seconds, list[dict[str, Any]]()
    # These describe each case: with --update cases may differ in them.
    stamp = {name: document["machine"][name] for name in ("commit", "date", "real_time")} | {
        "rounds": options.rounds
    }
    steps = Steps(sum((options.rounds + 1) * sum(p.serves(c) for p in who) for c in chosen))
    with steps.running():
        for case in chosen:
            steps.begin(case.name)
            if time.monotonic() > deadline:
                document["not_reached"].append(case.name)
            else:
                measured.append(quietest(case, who, options, steps) | stamp)
            document["cases"] = (
                kept(path, measured, [c.name for c in every]) if options.update else measured
            )
            # after each case, so that an interrupted run keeps its results
            path.write_text(json.dumps(document, indent=1) + "\n")
    if not options.no_plot:
        plot(document, path.with_suffix(".png"))
    print_tables(document)
    bad = [
        f"{e['name']}: {r['provider']}: {r['wrong'] or r['failed']}"
        for e in document["cases"]
        for r in e["results"]
        if r["ours"] and (r["wrong"] or r["failed"])
    ]
    if bad:
        raise SystemExit("\n".join(["ours are wrong:", *bad]))


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A result file; what is none is an error of the command's user."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be read: {error}")
    if not isinstance(found, dict) or not {"machine", "cases"} <= found.keys():
        parser.error(f"{path} is no result file of this command")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    shown = (__doc__ or "").partition("\n")[2].replace("python -m bench", prog)
    parser = argparse.ArgumentParser(
        prog=prog, description=shown, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="words that a case's name must contain: 128x151936 bfloat16 +entropy",
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], help="words that a case's name must not contain"
    )
    parser.add_argument(
        "--suite",
        default="logits",
        choices=tuple(SUITES),
        help="from logits, from hidden states, of two logits tensors, of two models' hidden "
        "states; a GPU runs all",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="write into existing results, by default the committed ones, and keep their other "
        "cases",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--slow",
        type=float,
        default=10,
        help="a baseline that takes more seconds is run once, outside the rounds",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no case after this time; the results name the remaining cases",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a GPU's cases in tiny shapes, which only show that everything runs",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backends", help="comma-separated; default: the backends of the device")
    parser.add_argument(
        "--providers",
        help="words in the names of baselines to run in addition to ours, comma-separated, or "
        "none; default: all",
    )
    parser.add_argument(
        "--chunk-rows",
        nargs="*",
        type=int,
        default=[],
        help="also from hidden states in one pass with chunks of so many rows, beside the default",
    )
    parser.add_argument(
        "--pages",
        default="both",
        choices=("both", "default", "huge"),
        help="huge sets THP_MEM_ALLOC_ENABLE=1, which PyTorch reads when it starts",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.05,
        help="share of the processor that other processes may use while a case is measured",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        help="seconds to wait for a quiet processor before each try",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="do not measure the peak of resident memory"
    )
    parser.add_argument(
        "--commit", help="the commit that is measured, if this is not a git checkout"
    )
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument(
        "--out",
        help="folder of the results; default: bench_output, or the committed results with --update",
    )
    parser.add_argument("--show", help="print the table of a result file and measure nothing")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        type=Path,
        help="print two result files side by side and measure nothing",
    )
    options = parser.parse_args(arguments)
    if options.compare:
        a, b = options.compare
        print("\n".join(compare((a, read(a, parser)), (b, read(b, parser)))))
        return
    if options.show:
        print_tables(read(Path(options.show), parser))
        return
    if options.tiny:
        options.pages = "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "default"
    kinds = (
        ("default", "huge")
        if options.pages == "both" and options.device == "cpu"
        else (options.pages,)
    )
    if len(kinds) == 1:
        wanted = "1" if kinds[0] == "huge" else "0"
        if options.device == "cpu" and os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != wanted:
            kinds = (kinds[0],)
        else:
            measure(options)
            return
    for kind in kinds:
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1" if kind == "huge" else "0"}
        done = subprocess.run(
            [sys.executable, "-m", str(__package__), *arguments, "--pages", kind], env=environment
        )
        if done.returncode:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
