"""Divergences of two distributions as objectives: per token, and as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..calls.softmax import refuse_learnt
from ..detached import marked
from ..rows.constants import parameter_vector
from ..rows.rows import Rows
from .autograd import weighted_sum
from .plan import Choice
from .source import DivergenceWork, MoreMetrics, SourceInfo

#: Maps each kind to the coefficients of (KL(q‖p), KL(p‖q), H(p), H(q)). The last has no
#: gradient, because q is the other tensor's.
KINDS = {
    "forward_kl": (1.0, 0.0, 0.0, 0.0),
    "reverse_kl": (0.0, 1.0, 0.0, 0.0),
    "jeffreys": (1.0, 1.0, 0.0, 0.0),
    "cross_entropy": (1.0, 0.0, 0.0, 1.0),
    "reverse_cross_entropy": (0.0, 1.0, 1.0, 0.0),
    "symmetric_cross_entropy": (0.5, 0.5, 0.5, 0.5),
}

STATISTICS = ("forward_kl", "reverse_kl", "entropy", "other_entropy")

#: A kind that is not a sum of them. It has a parameter ``beta``.
GENERALIZED_JSD = "generalized_jsd"


def check_kind(op: str, kind: str, beta: float | None) -> float | None:
    """Return ``beta`` of a generalised JSD (0.5 by default), or None for the other
    kinds.

    Raises for an unknown kind, and for a beta without effect.
    """
    if kind not in (*KINDS, GENERALIZED_JSD):
        raise InvalidCall(
            f"{op}: kind is {kind!r}, expected one of {', '.join(KINDS)}, {GENERALIZED_JSD}."
        )
    if kind != GENERALIZED_JSD:
        if beta is not None:
            raise InvalidCall(
                f"{op}: beta belongs to kind='generalized_jsd'; with {kind!r} it would have no "
                "effect."
            )
        return None
    beta = 0.5 if beta is None else beta
    if not 0 < beta < 1:
        raise InvalidCall(
            f"{op}: beta is {beta}, expected a number in (0, 1); 0 is forward_kl and 1 reverse_kl."
        )
    return beta


def divergence_of(kind: str, values: tuple[Tensor, ...]) -> Tensor:
    """Return the divergence of that kind from its :data:`STATISTICS`. The generalised
    JSD is its own statistic.
    """
    if kind == GENERALIZED_JSD:
        return values[-1]
    used = [c * x for c, x in zip(KINDS[kind], values[:4], strict=True) if c]
    return sum(used[1:], used[0])


@dataclass(frozen=True)
class DistillationLossOutput:
    """The result of :func:`distillation_loss`. All but ``loss`` are detached, of shape
    R, and 0 in ignored rows.

    ``per_token_divergence`` is without weights. ``forward_kl``, ``reverse_kl``,
    ``entropies`` (of the student) and ``teacher_entropies`` come from the same read.
    """

    loss: Tensor
    per_token_divergence: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    entropies: Tensor
    teacher_entropies: Tensor
    plan: str
    backend: str


@dataclass(frozen=True)
class DistillationObjective:
    """``Σ_i weights_i·D(p_i, q_i)``. ``weights`` ``[N]`` include divisor and scale, and
    are 0 in ignored rows.
    """

    kind: str
    rows: Rows
    weights: Tensor

    program = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (*STATISTICS, GENERALIZED_JSD) if self.kind == GENERALIZED_JSD else STATISTICS

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str | None:
        return None if info.needs_grad else "no gradient is needed, so only statistics are computed"

    def work(self) -> DivergenceWork:
        constants = KINDS.get(self.kind, (0.0,) * 4)[:3]
        return DivergenceWork(
            parameter_vector(constants, self.rows.dtype, self.rows.device), self.weights
        )

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> DistillationLossOutput:
        return self._output(
            loss,
            (*table[:4].unbind(), *((table[-1],) if self.kind == GENERALIZED_JSD else ())),
            choice,
        )

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> DistillationLossOutput:
        values = tuple(statistics[name] for name in self.reads)
        if self.kind == GENERALIZED_JSD:
            loss = torch.where(self.weights == 0, 0, self.weights * values[-1]).sum()
        else:
            loss = weighted_sum(torch.stack(values[:3]), *self.work())
        return self._output(loss, values, choice)

    def _output(
        self, loss: Tensor, values: tuple[Tensor, ...], choice: Choice
    ) -> DistillationLossOutput:
        teacher_share = KINDS[self.kind][3] if self.kind in KINDS else 0.0
        if teacher_share:  # the teacher's entropy: no gradient
            loss = (
                loss
                + teacher_share * torch.where(self.weights == 0, 0, self.weights * values[3]).sum()
            )
        shown = tuple(self.rows.unflatten(x.detach()) for x in values)
        forward, reverse, entropies, teacher = shown[:4]
        return DistillationLossOutput(
            loss,
            divergence_of(self.kind, shown),
            forward,
            reverse,
            marked(entropies, loss),
            teacher,
            choice.plan,
            choice.backend,
        )


def distillation_weights(
    rows: Rows, token_weights: Any, num_items_in_batch: Any, loss_scale: Any
) -> Tensor:
    """Return the weights of a :class:`DistillationObjective`."""
    for name, value in (("num_items_in_batch", num_items_in_batch), ("loss_scale", loss_scale)):
        if isinstance(value, Tensor) and value.dim() != 0:
            raise rows.error(
                f"{name} has shape {tuple(value.shape)}, expected a number or a 0-d tensor."
            )
        refuse_learnt(value, rows.error, name)
    rows.check_divisor("num_items_in_batch", num_items_in_batch)
    divisor = rows.keep.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    factor = rows.flatten_per_token(
        "token_weights", 1.0 if token_weights is None else token_weights
    )
    if factor.requires_grad:
        raise rows.error(
            "token_weights require grad; here they are detached. For a gradient: (w * "
            "token_divergence(...)).sum()."
        )
    return torch.where(rows.keep, factor * loss_scale / divisor, 0)
