"""The linear head on a CPU: ``python -m bench.linear_head``. A clipped policy loss from hidden states with both gradients, beside the bare GEMMs.

Interleaved rounds after a correctness gate, for ours and the GEMMs; baselines run once, in the run that is judged. The ratio to the three bare
GEMMs is taken within a round, by the clock and by processor time; the second means more when others use the machine.
``python -m bench.linear_head --show`` prints the table of the last results. Liger is looked for on ``PYTHONPATH`` too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .linear import LinearCase, LinearData, eager, job_of, liger, ours, trl
from .measure import Memory, foreign_load
from .providers import Absent, Job

RESULTS = Path(__file__).parent / "results" / "cpu-linear-head.json"
BARE, THERE = GEMMS = ("three bare GEMMs", "the same, into memory that is there")

CASES = [
    LinearCase("linear", rows, hidden, vocab, dtype, "cpu", zero)
    for rows, hidden, vocab in ((256, 4096, 32000), (2048, 1024, 151936))
    for dtype in ("bfloat16", "float32")
    for zero in (False, True)
]


def gemms(fresh: bool) -> Callable[[LinearData], Job]:
    """The three GEMMs alone; their results mean nothing. ``fresh``: into new memory, as whoever returns gradients must, else into memory
    that is there already."""

    def make(data: LinearData) -> Job:
        h, w = data.hidden.detach().flatten(0, 1), data.weight.detach()
        if not fresh:
            return data.limits()["gemms"]

        def plain() -> tuple[Tensor, tuple[Tensor, Tensor]]:
            z = torch.mm(h, w.t())
            return z, (torch.mm(z, w), torch.mm(z.t(), h))

        return plain

    return make


def materialised(data: LinearData) -> Job:
    import reweight_ops as rw

    options = {"spec": rw.methods.ppo(0.2), "old_per_token_logps": data.old, "backend": "cpu", "consume_logits": True}
    return job_of(data, lambda: rw.policy_loss(F.linear(data.hidden, data.weight), data.ids, data.advantages, **options).loss)


PROVIDERS: list[tuple[str, Callable[[LinearData], Job]]] = [
    (BARE, gemms(fresh=True)),
    (THERE, gemms(fresh=False)),
    ("linear one_pass", ours("cpu", "one_pass")),
    ("linear two_pass", ours("cpu", "two_pass")),
    ("F.linear, then policy_loss in place", materialised),
    ("eager", eager),
    ("TRL ChunkedLogProbFunction", trl),
    ("Liger chunked GRPO", liger),
]


@dataclass
class Run:
    ms: float
    cpu_ms: float
    result: Any
    growth: int = 0


def _timed(job: Job, memory: Memory | None) -> Run:
    found: list[Any] = []
    growth = 0
    start, busy = time.perf_counter(), time.process_time()
    if memory is None:
        found.append(job())
    else:
        growth = memory.growth(lambda: found.append(job()))
    return Run(1000 * (time.perf_counter() - start), 1000 * (time.process_time() - busy), found[0], growth)


def measure(case: LinearCase, options: argparse.Namespace) -> dict[str, Any]:
    """One case: gate, memory, then rounds."""
    data, memory = case.data(), Memory("cpu")
    jobs, entry = {}, {"case": asdict(case), "name": case.name, "logits_bytes": case.logits_bytes, "results": {}}
    for name, make in PROVIDERS:
        ours_alone = case.zero_advantages or options.only_ours
        if (ours_alone and name not in GEMMS and not name.startswith("linear")) or any(word in name for word in options.skip):
            continue
        row: dict[str, Any] = {"ms": [], "cpu_ms": []}
        entry["results"][name] = row
        is_gemms, is_ours = name in GEMMS, name.startswith("linear")
        try:
            job = make(data)
            first = _timed(job, memory)
        except Absent as error:
            row["note"] = str(error)
            continue
        row["gate"] = None if is_gemms else data.error(False, *first.result)
        if row["gate"] is not None and not row["gate"] <= 1:
            row["note"] = f"error {row['gate']:.2f} times what is allowed: not timed"
            continue
        if not is_gemms:
            row["extra_bytes"] = first.growth - case.gradient_bytes
        if is_gemms or is_ours:
            jobs[name] = job
        else:  # slow: the run that was judged is the one that counts
            row["ms"], row["cpu_ms"] = [first.ms], [first.cpu_ms]
        del first
    load = foreign_load()
    next(load)
    for _ in range(options.rounds):
        for name, job in jobs.items():
            run = _timed(job, None)
            entry["results"][name]["ms"].append(run.ms)
            entry["results"][name]["cpu_ms"].append(run.cpu_ms)
            del run
    entry["foreign_load"] = next(load)
    return entry


def _speed(bare: list[float], times: list[float]) -> float:
    """Of the bare GEMMs: within rounds where there are rounds."""
    return median(b / x for b, x in zip(bare, times, strict=True)) if len(times) == len(bare) else median(bare) / median(times)


def table(document: dict[str, Any]) -> None:
    console = Console(width=150)
    m = document["machine"]
    console.print(
        f"[bold]{m['processor']}[/], {m['threads']} threads, torch {m['torch']}, TRL {m['trl']}, commit {m['commit']}, {m['date']}"
    )
    for entry in document["cases"]:
        title = f"{entry['name']}: logits {entry['logits_bytes'] / 2**20:.0f} MiB; others used {entry['foreign_load']:.0%} of the processor"
        shown = Table(title=title, title_justify="left", title_style="bold")
        for head in (
            "",
            "ms (median)",
            "spread",
            "rounds",
            "speed of the bare GEMMs",
            "by CPU time",
            "extra MiB",
            "of the logits",
            "error/allowed",
        ):
            shown.add_column(head, justify="right" if head else "left")
        bare = entry["results"][BARE]
        for name, row in entry["results"].items():
            if not row["ms"]:
                shown.add_row(name, row["note"], style="dim")
                continue
            speeds = [_speed(bare[k], row[k]) for k in ("ms", "cpu_ms")]
            extra, gate = row.get("extra_bytes"), row["gate"]
            figures = [f"{median(row['ms']):.0f}", f"{min(row['ms']):.0f}-{max(row['ms']):.0f}", str(len(row["ms"]))]
            figures += [f"{x:.2f}" for x in speeds]
            figures += ["", ""] if extra is None else [f"{extra / 2**20:.0f}", f"{extra / entry['logits_bytes']:.2f}"]
            shown.add_row(name, *figures, "" if gate is None else f"{gate:.2f}", style="bold" if name.startswith("linear") else "")
        console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="words in names of providers to leave out")
    parser.add_argument("--only-ours", action="store_true", help="no baselines but the bare GEMMs")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--show", action="store_true", help="print the table of --out and measure nothing")
    options = parser.parse_args()
    path = Path(options.out)
    known = json.loads(path.read_text()) if path.exists() else {"machine": {}, "cases": []}
    if not options.show:
        from .__main__ import machine

        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        document = {"machine": machine("cpu", None), "cases": known["cases"]}
        for case in CASES:
            if all(word in case.name for word in options.only):
                entry = {**measure(case, options), "commit": document["machine"]["commit"]}
                document["cases"] = [c for c in document["cases"] if c["name"] != case.name] + [entry]
                path.write_text(json.dumps(document, indent=1) + "\n")
        known = document
    table(known)


if __name__ == "__main__":
    main()
