"""How it is measured: a correctness gate, interleaved rounds with the memory's own limit among them, and peak resident growth."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from reweight_ops import _C

from .cases import ENTROPY_COEF, Case, Data, make_data
from .providers import Absent, Job, Provider

#: Of a baseline, which may compute in 16 bits: the same function, no more.
SAME_FUNCTION = 0.05
GATE_ROWS = 16


@dataclass
class Result:
    case: Case
    provider: str
    ours: bool
    in_place: bool
    ms: list[float] = field(default_factory=list)
    absent: str | None = None
    wrong: str | None = None
    gate: float | None = None  # error over what is allowed
    extra_bytes: int | None = None

    @property
    def median(self) -> float | None:
        return median(self.ms) if self.ms else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median_ms": self.median}


@dataclass
class Limits:
    """One round after the other: ms to read the logits once, to read and write them in place, and to copy them."""

    read: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)


# ---- the gate


def _truth(data: Data, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradient, |coefficients|) of some rows in another dtype, from the pristine logits, by autograd."""
    z = data.pristine.flatten(0, 1)[rows].to(dtype).requires_grad_()
    ids, adv, old = (x.flatten()[rows] for x in (data.ids, data.advantages, data.old))
    logp_all = torch.log_softmax(z, -1)
    logp = logp_all.gather(-1, ids[:, None])[:, 0]
    ratio = torch.exp(logp - old.to(dtype))
    adv = adv.to(dtype)
    loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    if data.case.entropy:
        loss = loss + ENTROPY_COEF * (logp_all.exp() * logp_all).sum(-1)
    (grad,) = torch.autograd.grad(loss.sum() / data.case.rows, z)
    return logp.detach(), grad.detach(), ((ratio * adv).abs().detach() + ENTROPY_COEF) / data.case.rows


def gate(provider: Provider, data: Data, job: Job) -> float:
    """The error of one run on the first rows, over what is allowed: <= 1 passes."""
    from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO

    data.restore()
    value, grad = job()
    rows = slice(0, GATE_ROWS)
    logp, truth, size = _truth(data, rows, torch.float64)
    logp32, single, _ = _truth(data, rows, torch.float32)
    if grad is None:
        got, exact, rounded, floor = value.detach().flatten()[rows], logp, logp32, ERROR_FLOOR * (1 + logp.abs().max())
    else:
        got, exact, rounded = grad.detach().flatten(0, 1)[rows], truth, single.to(grad.dtype)
        floor = ERROR_FLOOR * size[:, None]
    error = (got.double() - exact).abs()
    if provider.exact:
        return float((error / (ERROR_RATIO * (rounded.double() - exact).abs().max() + floor)).max())
    return float(error.norm() / exact.norm() / SAME_FUNCTION)


# ---- memory


class Memory:
    """Peak resident growth of a call. Free blocks are given back to the system first, or the call would reuse them unseen."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.libc = ctypes.CDLL(None)
        if not self.cuda:
            mmap_threshold = -3
            self.libc.mallopt(mmap_threshold, 1 << 20)

    def growth(self, job: Callable[[], Any]) -> int:
        gc.collect()  # garbage that is collected meanwhile would be subtracted
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


def _clock(device: str, job: Callable[[], Any]) -> float:
    """Milliseconds of one run; what it returns is freed outside."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        kept = job()
        end.record()
        end.synchronize()
        del kept
        return float(start.elapsed_time(end))
    start_s = time.perf_counter()
    kept = job()
    elapsed = time.perf_counter() - start_s
    del kept
    return elapsed * 1e3


def _limit_jobs(data: Data) -> dict[str, Callable[[], Any]]:
    z, other = data.logits, data.pristine
    if z.is_cuda:
        return {"read": lambda: z.view(torch.int32).max(), "update": lambda: z.neg_(), "copy": lambda: z.copy_(other)}
    n, threads = data.case.logits_bytes // 4, torch.get_num_threads()
    return {kind: (lambda kind=kind: _C.stream(kind, z.data_ptr(), other.data_ptr(), n, threads)) for kind in ("read", "update")} | {
        "copy": lambda: _C.stream("copy", other.data_ptr(), z.data_ptr(), n, threads)
    }


def run_case(
    case: Case, providers: list[Provider], rounds: int, memory: Memory | None, tick: Callable[[], None]
) -> tuple[list[Result], Limits]:
    """Every provider once per round. ``tick`` is called after each step, for a progress bar."""
    data = make_data(case)
    results, jobs = [], {}
    for p in (p for p in providers if p.serves(case)):
        result = Result(case, p.name, p.ours, p.in_place)
        results.append(result)
        try:
            job = p.make(data)
            result.gate = gate(p, data, job)
            if not result.gate <= 1:
                result.wrong = f"error {result.gate:.2f} times what is allowed: not timed"
                continue
        except Absent as error:
            result.absent = str(error)
            continue
        except Exception as error:  # a baseline that fails to compile must not end the run
            result.absent = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if memory is not None:
            data.restore()
            result.extra_bytes = memory.growth(job)
        jobs[p.name] = job
        tick()
    limits, probes = Limits(), _limit_jobs(data)
    by_name = {r.provider: r for r in results}
    load = foreign_load()
    next(load)
    for _ in range(rounds):
        for kind, probe in probes.items():
            data.restore()
            getattr(limits, kind).append(_clock(case.device, probe))
        for name, job in jobs.items():
            data.restore()
            by_name[name].ms.append(_clock(case.device, job))
            tick()
    return results, limits, next(load)


# ---- the surroundings


def foreign_load() -> Iterator[float]:
    """Yields, each time, the share of this machine's processor time that others used since the last."""

    def ticks() -> tuple[float, float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        own = os.times()
        return busy / os.sysconf("SC_CLK_TCK"), sum(own[:4]), time.perf_counter()

    before = ticks()
    while True:
        after = ticks()
        spent = (after[2] - before[2]) * (os.cpu_count() or 1)
        yield max(0.0, (after[0] - before[0] - (after[1] - before[1])) / spent) if spent > 0 else 0.0
        before = after
