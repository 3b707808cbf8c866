"""Distillation from hidden states: the student's three GEMMs, the teacher's one, and a
divergence.

The divergence is of full softmaxes, between the GEMMs. The teacher is wider than the
student. ``distill forward`` is KL(q‖p), ``reverse`` is KL(p‖q), and ``jsd`` is the
generalised JSD with beta 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import GATE_ROWS, ITEM, SAME_FUNCTION, spare
from .peers import import_or_absent
from .providers import Job, Provider, serving

KINDS = {
    "forward": ("forward_kl", 0.0),
    "reverse": ("reverse_kl", 1.0),
    "jsd": ("generalized_jsd", 0.5),
}
JOBS = tuple(f"linear distill {name}" for name in KINDS)
CPU_SHAPE, GPU_SHAPE, TINY_SHAPE = (
    (512, 1024, 2048, 32000),
    (8192, 2048, 4096, 151936),
    (64, 32, 48, 320),
)


@dataclass(frozen=True)
class DistillCase:
    job: str
    rows: int
    width: int
    teacher_width: int
    vocab: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return (
            f"{self.job.removeprefix('linear ')} "
            f"{self.rows}x{self.width}+{self.teacher_width}x{self.vocab} {self.dtype}"
        )

    @property
    def kind(self) -> str:
        return self.job.rpartition(" ")[2]

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits of one model."""
        return self.rows * self.vocab * ITEM[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        return (self.rows + self.vocab) * self.width * ITEM[self.dtype]

    def least_flops(self) -> int:
        return self.rows * self.vocab * (6 * self.width + 2 * self.teacher_width)

    def data(self) -> DistillData:
        return replace(
            _tensors(
                self.rows, self.width, self.teacher_width, self.vocab, self.dtype, self.device
            ),
            case=self,
        )


def distill_cases(device: str, tiny: bool = False) -> list[DistillCase]:
    if device == "cpu" and not tiny:
        return [
            DistillCase(job, *CPU_SHAPE, dtype, device)
            for dtype in ("float32", "bfloat16")
            for job in JOBS
        ]
    return [
        DistillCase(job, *(TINY_SHAPE if tiny else GPU_SHAPE), "bfloat16", device) for job in JOBS
    ]


@dataclass
class DistillData:
    """``hidden [N, D]`` and ``weight [V, D]`` are leaves that require grad. The
    teacher's tensors are frozen.
    """

    case: DistillCase
    hidden: Tensor
    weight: Tensor
    t_hidden: Tensor
    t_weight: Tensor
    spare: Tensor | None

    def restore(self) -> None:
        if self.spare is not None:
            self.spare.zero_()

    def limits(self) -> dict[str, Callable[[], Any]]:
        """The four GEMMs alone, for all rows at once."""
        h, w = self.hidden.detach(), self.weight.detach()

        def gemms() -> tuple[Tensor, ...]:
            z = torch.mm(h, w.t())
            return z, torch.mm(self.t_hidden, self.t_weight.t()), torch.mm(z, w), torch.mm(z.t(), h)

        return {"gemms": gemms}

    def error(self, exact: bool, value: Any, grads: tuple[Tensor, Tensor]) -> float:
        """Error of the loss's gradient by a few rows of hidden states, divided by the
        allowed error.

        The rounding of 16-bit logits dominates it.
        """
        h = self.hidden.detach()[:GATE_ROWS].double().requires_grad_()
        z, y = (
            h @ self.weight.detach().double().t(),
            self.t_hidden[:GATE_ROWS].double() @ self.t_weight.double().t(),
        )
        (truth,) = torch.autograd.grad(
            eager_divergence(z, y, self.case.kind).sum() / self.case.rows, h
        )
        return float((grads[0][:GATE_ROWS].double() - truth).norm() / truth.norm() / SAME_FUNCTION)


@lru_cache(maxsize=1)
def _tensors(
    rows: int, width: int, teacher_width: int, vocab: int, dtype: str, device: str
) -> DistillData:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    h, t_h = normal(rows, width), normal(rows, teacher_width)
    w, t_w = (
        normal(vocab, width) * (3 / width**0.5),
        normal(vocab, teacher_width) * (3 / teacher_width**0.5),
    )
    h, w, t_h, t_w = (x.to(getattr(torch, dtype)) for x in (h, w, t_h, t_w))
    case = DistillCase(JOBS[0], rows, width, teacher_width, vocab, dtype, device)
    return DistillData(case, h.requires_grad_(), w.requires_grad_(), t_h, t_w, spare(device))


# ---- providers


def eager_divergence(z: Tensor, y: Tensor, kind: str) -> Tensor:
    """The usual PyTorch code, on both models' logits."""
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if kind == "forward":
        return kl(log_q, log_p)
    if kind == "reverse":
        return kl(log_p, log_q)
    beta = torch.tensor(KINDS[kind][1], dtype=z.dtype, device=z.device)
    mix = torch.logaddexp(log_p + torch.log1p(-beta), log_q + beta.log())
    return beta * kl(log_q, mix) + (1 - beta) * kl(log_p, mix)


def _job(data: DistillData, loss: Callable[[], Tensor]) -> Job:
    def job() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, (data.hidden, data.weight))

    return job


def eager(data: DistillData) -> Job:
    def loss() -> Tensor:
        z, y = F.linear(data.hidden, data.weight), F.linear(data.t_hidden, data.t_weight)
        return eager_divergence(z.float(), y.float(), data.case.kind).mean()

    return _job(data, loss)


def trl(data: DistillData) -> Job:
    function = import_or_absent("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    beta = KINDS[data.case.kind][1]
    return _job(
        data,
        lambda: function.apply(
            data.hidden, data.weight, None, data.t_hidden, data.t_weight, None, beta
        )[0].mean(),
    )


def ours(backend: str, plan: str) -> Callable[[DistillData], Job]:
    def make(data: DistillData) -> Job:
        import reweight_ops as rw

        serving(backend, data.hidden)
        teacher, call = (
            rw.HiddenLogits(data.t_hidden, data.t_weight),
            {"kind": KINDS[data.case.kind][0], "plan": plan, "backend": backend},
        )
        return _job(
            data,
            lambda: rw.linear_distillation_loss(data.hidden, data.weight, teacher, **call).loss,
        )

    return make


def distill_providers(backends: tuple[str, ...]) -> list[Provider]:
    found = [Provider("eager", eager, JOBS), Provider("TRL chunked", trl, JOBS)]
    for b in backends:
        found += [
            Provider(f"{b} {plan}", ours(b, plan), JOBS, ours=True)
            for plan in ("one_pass", "two_pass")
        ]
    return found
