"""Divergences of two logits tensors, measured against the memory that they must read.

``kl`` is KL(p‖q) of every row. ``kl+grad`` adds its gradient by the first tensor for an
upstream gradient per row. ``distill`` is its mean as a loss, with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reweight_ops.testing import ERROR_FLOOR

from .cases import CPU_SHAPES, GATE_ROWS, ITEM, Scratch, _share, spare
from .providers import Absent, Job, Provider, through_autograd

JOBS = ("kl", "kl+grad", "distill")


@dataclass(frozen=True)
class DivergenceCase:
    job: str
    rows: int
    vocab: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.job} {self.rows}x{self.vocab} {self.dtype}"

    @property
    def logits_bytes(self) -> int:
        """Bytes of one tensor."""
        return self.rows * self.vocab * ITEM[self.dtype]

    def least_bytes(self) -> int:
        """Least number of bytes to move.

        Both tensors are read once, and the gradient is written once. Both are read once
        more if the loss is known only later.
        """
        return self.logits_bytes * {"kl": 2, "kl+grad": 5, "distill": 3}[self.job]

    def data(self) -> DivergenceData:
        return replace(_tensors(self.rows, self.vocab, self.dtype, self.device), case=self)


def divergence_cases(device: str, tiny: bool = False) -> list[DivergenceCase]:
    if device == "cpu" and not tiny:
        return [
            DivergenceCase(job, *shape, dtype, device)
            for shape in CPU_SHAPES[:2]
            for dtype in ("float32", "bfloat16")
            for job in JOBS
        ]
    return [
        DivergenceCase(job, *((64, 320) if tiny else (8192, 151936)), "bfloat16", device)
        for job in JOBS
    ]


@dataclass(kw_only=True)
class DivergenceData(Scratch):
    """Tensors of a case. ``other`` is only read."""

    case: DivergenceCase
    other: Tensor
    upstream: Tensor

    def row_loss(self, values: Tensor) -> Tensor:
        return values.mean() if self.case.job == "distill" else (values * self.upstream).mean()

    def error(self, exact: bool, value: Any, grad: Tensor | None) -> float:
        """Error of a run on the first rows, divided by the allowed error."""
        (kl, by), (kl32, by32) = (self._truth(d) for d in (torch.float64, torch.float32))
        if grad is None:
            return _share(
                exact,
                value.detach().flatten()[:GATE_ROWS],
                kl,
                kl32,
                ERROR_FLOOR * (1 + kl.abs().max()),
            )
        floor = torch.tensor(
            ERROR_FLOOR / self.case.rows, device=by.device
        ) * self.upstream.flatten()[:GATE_ROWS, None].abs().clamp(min=1)
        return _share(
            exact, grad.detach().flatten(0, -2)[:GATE_ROWS], by, by32.to(grad.dtype), floor
        )

    def _truth(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = slice(0, GATE_ROWS)
        z = self.pristine.flatten(0, 1)[rows].to(dtype).requires_grad_()
        kl = eager_kl(z, self.other.flatten(0, 1)[rows].to(dtype))
        few = replace(self, upstream=self.upstream.flatten()[rows].to(dtype))
        (grad,) = torch.autograd.grad(few.row_loss(kl) * len(kl) / self.case.rows, z)
        return kl.detach(), grad


@lru_cache(maxsize=1)
def _tensors(rows: int, vocab: int, dtype: str, device: str) -> DivergenceData:
    g = torch.Generator(device).manual_seed(0)
    t = min(rows, 1024 if device == "cuda" else 64)
    logits, other = (
        torch.empty(rows // t, t, vocab, dtype=getattr(torch, dtype), device=device)
        for _ in range(2)
    )
    # in parts: the fp32 draft must not take most of the memory
    for b in range(rows // t):
        z = torch.randn(t, vocab, generator=g, device=device) * 3
        logits[b] = z
        other[b] = z + torch.randn(t, vocab, generator=g, device=device)
    upstream = torch.rand(rows // t, t, generator=g, device=device) + 0.5
    case = DivergenceCase("kl", rows, vocab, dtype, device)
    return DivergenceData(
        case=case,
        logits=logits,
        pristine=logits.clone(),
        spare=spare(device),
        other=other,
        upstream=upstream,
    )


# ---- providers


def eager_kl(z: Tensor, other: Tensor) -> Tensor:
    """KL(p‖q) in the usual PyTorch code."""
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(other, -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _eager(compiled: bool) -> Callable[[DivergenceData], Job]:
    def make(data: DivergenceData) -> Job:
        if compiled:
            torch._dynamo.reset()
        values = lambda z: eager_kl(z.float(), data.other.float())  # noqa: E731
        if data.case.job == "kl":
            return _values_alone(torch.compile(values, dynamic=False) if compiled else values, data)
        loss = lambda z: data.row_loss(values(z))  # noqa: E731
        return through_autograd(data, torch.compile(loss, dynamic=False) if compiled else loss)

    return make


def _values_alone(values: Callable[[Tensor], Tensor], data: DivergenceData) -> Job:
    @torch.no_grad()
    def job() -> tuple[Tensor, None]:
        return values(data.logits), None

    return job


def _ours(backend: str, consume: bool) -> Callable[[DivergenceData], Job]:
    def make(data: DivergenceData) -> Job:
        import reweight_ops as rw
        from reweight_ops._core.backends.base import Request
        from reweight_ops._core.backends.select import load
        from reweight_ops.errors import BackendUnavailable

        try:
            request = Request(
                "divergence_stats",
                data.logits.device,
                data.logits.dtype,
                other_dtype=data.other.dtype,
            )
            reason = load(backend).unsupported_reason(request)
        except BackendUnavailable as error:
            reason = str(error)
        if reason is not None:
            raise Absent(reason)
        options = dict(kind="reverse_kl", backend=backend, consume_logits=consume)
        if data.case.job == "distill":
            return through_autograd(
                data, lambda z: rw.distillation_loss(z, data.other, plan="one_pass", **options).loss
            )
        values = lambda z: rw.token_divergence(z, data.other, **options)  # noqa: E731
        return (
            _values_alone(values, data)
            if data.case.job == "kl"
            else through_autograd(data, lambda z: data.row_loss(values(z)))
        )

    return make


def divergence_providers(backends: tuple[str, ...]) -> list[Provider]:
    found = [Provider("eager", _eager(False), JOBS), Provider("torch.compile", _eager(True), JOBS)]
    for b in backends:
        found.append(Provider(f"{b} drop-in", _ours(b, False), JOBS, ours=True, exact=True))
        found.append(
            Provider(
                f"{b} in place", _ours(b, True), JOBS[1:], in_place=True, ours=True, exact=True
            )
        )
    return found
