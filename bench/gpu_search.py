"""Where row kernels look for the rows of each sequence among all rows, and for the
sequences of each prompt: against PyTorch's operations, which take over beyond a bound
(``_MOST_SEARCHED`` of ``rows/resolve.py``), in microseconds.

What is timed is a loss of log-probs with its gradient and metrics. Its host may be
slower than its kernels, as in a trainer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reweight_ops as rw
from reweight_ops._core.rows import resolve

from .device import FLUSH_BYTES, clock


class Case(NamedTuple):
    """Rows in ``sequences`` sequences, given by ids; with ``prompts`` by offsets."""

    rows: int
    sequences: int
    prompts: int = 0

    @property
    def name(self) -> str:
        return f"{self.prompts} prompts" if self.prompts else f"{self.sequences} sequences by ids"

    @property
    def looks(self) -> int:
        """What the bound is compared with."""
        if self.prompts:
            return max(self.sequences, resolve.RUN) * self.prompts
        return self.sequences * self.rows


#: 2^24 to 2^30 looks, around the bound of 2^26.
CASES = (
    *(Case(131072, sequences) for sequences in (128, 512, 2048, 8192)),
    *(Case(131072, 512, prompts) for prompts in (1 << 14, 1 << 16, 1 << 18)),
)
TINY_CASES = (Case(96, 4), Case(96, 4, 3))


def arguments(case: Case, device: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    logps = (-3 * torch.rand(1, case.rows, generator=g)).to(device)
    found: dict[str, Any] = {
        "per_token_logps": logps,
        "old_per_token_logps": logps + 0.1,
        "advantages": torch.randn(case.sequences, 1, generator=g).to(device),
        "unused": "ignore",
    }
    each = case.rows // case.sequences
    if not case.prompts:
        owner = torch.arange(case.sequences, device=device).repeat_interleave(each)[None]
        by_ids = {"sequence_ids": owner, "num_sequences": case.sequences}
        return found | by_ids | {"spec": rw.methods.gspo()}
    sequence = torch.arange(case.sequences + 1, device=device, dtype=torch.int32)
    return found | {
        "cu_seqlens": sequence * each,
        "group_ids": sequence[:-1] % case.prompts,
        "num_groups": case.prompts,
        "spec": rw.methods.scale_rl(),
    }


class Step(NamedTuple):
    """A call and its backward, with row kernels up to ``most`` looks.

    ``scale`` is no part of the arguments of both ways: a call like an earlier one would
    take its way.
    """

    case: Case
    data: dict[str, Any]
    most: int
    scale: dict[str, float]

    def __call__(self) -> tuple[Any, Tensor, Tensor]:
        before, resolve._MOST_SEARCHED = resolve._MOST_SEARCHED, self.most
        try:
            z = self.data["per_token_logps"].detach().requires_grad_()
            out = rw.policy_loss_from_logps(**{**self.data, "per_token_logps": z}, **self.scale)
            (grad,) = torch.autograd.grad(out.loss, z)
            return out, grad, out.metrics.sums
        finally:
            resolve._MOST_SEARCHED = before

    def way(self) -> str:
        """The way that a call took."""
        rows = self()[0]._call.rows
        found = rows.by_prompt if self.case.prompts else rows.primitives
        return "PyTorch" if found is None else "kernels"


def steps(case: Case, device: str) -> dict[str, Step]:
    data = arguments(case, device)
    return {
        "kernels": Step(case, data, case.looks, {}),
        "PyTorch": Step(case, data, 0, {"loss_scale": 1.0}),
    }


def time_search(device: str, rounds: int, dry_run: bool = False) -> dict[str, Any]:
    """Time every case by kernels and by PyTorch, once per round in a random order."""
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 16, dtype=torch.uint8, device=device)
    jobs: dict[str, Callable[[], Any]] = {}
    wrong: dict[str, str] = {}
    for case in TINY_CASES if dry_run else CASES:
        both = steps(case, device)
        (got, grad, sums), (want, *others) = (job() for job in both.values())
        same = zip((got.loss, grad, sums), (want.loss, *others), strict=True)
        if not all(torch.allclose(a, b, 2e-4, 1e-6, equal_nan=True) for a, b in same):
            wrong[f"kernels: {case.name}"] = "the result differs from PyTorch's: not timed"
        for name, job in both.items():
            if job.way() != name:
                wrong[f"{name}: {case.name}"] = f"{job.way()} took the call: not timed"
        found = {f"{name}: {case.name}": job for name, job in both.items()}
        jobs |= {key: job for key, job in found.items() if key not in wrong}
    jobs["limit: launch"] = lambda: flush[:1].neg_()
    us: dict[str, list[float]] = {key: [] for key in jobs}
    for number in range(rounds):
        for key in random.Random(number).sample(sorted(jobs), len(jobs)):
            flush.zero_()
            us[key].append(clock(device, jobs[key])[0] * 1e3)
    return {"shape": "one call, loss and gradient", "us": us, "wrong": wrong}
