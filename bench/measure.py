"""Measurement. It has a correctness gate, interleaved rounds that include the machine's
limits, and memory growth.

A case makes data. The data restores itself before each run, names the limits that are
timed with the providers, and checks results.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .device import clock
from .providers import Absent, Job, Provider


@dataclass
class Result:
    case: Any
    provider: str
    ours: bool
    in_place: bool
    ms: list[float] = field(default_factory=list)
    issue_ms: list[float] = field(default_factory=list)
    absent: str | None = None  # not installed, or not for this case
    failed: str | None = None  # installed, and raised
    wrong: str | None = None
    gate: float | None = None  # error divided by the allowed error
    extra_bytes: int | None = None

    @property
    def median(self) -> float | None:
        return median(self.ms) if self.ms else None

    def to_json(self) -> dict[str, Any]:
        own = {k: v for k, v in asdict(self).items() if k != "case"}
        return {
            **own,
            "median_ms": self.median,
            "issue_ms": median(self.issue_ms) if self.issue_ms else None,
        }


def gate(provider: Provider, data: Any, job: Job) -> float:
    """Error of one run divided by the allowed error; <= 1 passes."""
    data.restore()
    return float(data.error(provider.exact, *job()))


# ---- memory


class Memory:
    """Peak growth of resident memory during a call.

    Free blocks first go back to the system; otherwise the call would reuse them without
    growth.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.libc = ctypes.CDLL(None)
        if not self.cuda:
            mmap_threshold = -3
            self.libc.mallopt(mmap_threshold, 1 << 20)

    def growth(self, job: Callable[[], Any]) -> int:
        gc.collect()  # garbage collected during the call would be subtracted
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            job()
            return int(torch.cuda.max_memory_allocated() - before)
        self.libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        job()
        return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


# ---- time


@dataclass(frozen=True)
class Effort:
    """Time budget of a case."""

    rounds: int
    # seconds: a baseline that takes longer runs once, outside the rounds
    slow: float = math.inf
    memory: Memory | None = None


def _trial(result: Result, data: Any, job: Job, effort: Effort) -> bool:
    """Run once for memory growth and a first estimate of the time; return False if it
    is too slow for rounds.
    """
    data.restore()
    times: list[float] = []

    def run() -> None:
        times.append(clock(result.case.device, job)[0])

    if effort.memory is None:
        run()
    else:
        result.extra_bytes = effort.memory.growth(run)
    if result.ours or times[0] <= 1e3 * effort.slow:
        return True
    result.ms = times
    return False


def run_case(
    case: Any, providers: list[Provider], effort: Effort, tick: Callable[[], None]
) -> tuple[list[Result], dict[str, list[float]], float]:
    """Run every provider once per round, and every limit, in an order drawn anew.
    Return ``(results, ms of each limit, share of the processor that others used)``.

    ``tick`` is called after each step, for a progress bar.
    """
    data = case.data()
    results, jobs = [], {}
    for p in (p for p in providers if p.serves(case)):
        result = Result(case, p.name, p.ours, p.in_place)
        results.append(result)
        try:
            job = p.make(data)
            result.gate = gate(p, data, job)
            if not result.gate <= 1:
                result.wrong = f"error is {result.gate:.2f} times the allowed error: not timed"
                continue
        except Absent as error:
            result.absent = str(error)
            continue
        # a baseline that fails to compile must not end the run
        except Exception as error:
            result.failed = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        if _trial(result, data, job, effort):
            jobs[p.name] = job
        tick()
    probes = data.limits()
    limits: dict[str, list[float]] = {kind: [] for kind in probes}
    by_name = {r.provider: r for r in results}
    load = foreign_load()
    next(load)
    timed = [
        *(("limit", *item) for item in probes.items()),
        *(("job", *item) for item in jobs.items()),
    ]
    for number in range(effort.rounds):
        # Each round has another order: a job's caches, and the state in which the
        # system gets its memory back, affect the next job.
        for what, name, job in random.Random(number).sample(timed, len(timed)):
            data.restore()
            ms, issued = clock(case.device, job)
            if what == "limit":
                limits[name].append(ms)
                continue
            by_name[name].ms.append(ms)
            by_name[name].issue_ms.append(issued)
            tick()
    return results, limits, next(load)


# ---- the surroundings


def foreign_load() -> Iterator[float]:
    """Yield the share of the processor's time that other processes used since the last
    step.
    """

    def ticks() -> tuple[float, float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        own = os.times()
        return busy / os.sysconf("SC_CLK_TCK"), sum(own[:4]), time.perf_counter()

    before = ticks()
    while True:
        after = ticks()
        spent = (after[2] - before[2]) * (os.cpu_count() or 1)
        yield (
            max(0.0, (after[0] - before[0] - (after[1] - before[1])) / spent) if spent > 0 else 0.0
        )
        before = after
