"""The gradient by the temperature of statistics that are already differentiable to the
logits.

The sums over the vocabulary that it needs are themselves statistics. With x = z/T every
statistic s has ``ds/dT = -1/T·Σ_v x_v·ds/dx_v``. In terms of the row's statistics::

    logp           -(logp + H)/T                 lse            -(lse - H)/T
    entropy        Var_p(log p)/T
    log_sum_p_sq   -2·(Σ p²·log p / Σ p² + H)/T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedRequest
from ..backends.base import VOCABULARY
from ..backends.log_p_moments import MEAN_OVER_P_SQ, VARIANCE
from . import again
from .picks import PICKED

#: Maps a statistic to the further statistics that its derivative reads.
_READS = {
    "logp": ("entropy",),
    "lse": ("entropy",),
    "entropy": (VARIANCE,),
    "log_sum_p_sq": ("entropy", MEAN_OVER_P_SQ),
    PICKED: ("entropy",),
    f"{VOCABULARY}entropy": (VOCABULARY + VARIANCE,),
}

WHY_TWO_PASSES = "temperature requires grad"


def learns(temperature: Tensor) -> bool:
    """Return whether a gradient by the temperature is needed."""
    return torch.is_grad_enabled() and temperature.requires_grad


def with_reads(
    names: tuple[str, ...], temperature: Tensor, picked: bool = False
) -> tuple[str, ...]:
    """Return ``names``, and the statistics that the derivatives by the temperature read
    if those are needed.

    With ``picked`` the derivatives of the log-probs of picked ids are included.
    """
    if not learns(temperature):
        return names
    moving = (*names, PICKED) if picked else names
    return tuple(
        dict.fromkeys((*names, *(read for name in moving for read in _READS.get(name, ()))))
    )


def differentiable(
    found: dict[str, Tensor], names: tuple[str, ...], temperature: Tensor
) -> dict[str, Tensor]:
    """Return the statistics ``names`` of ``found``, differentiable to the temperature
    ``[1]`` or ``[N]`` too.
    """
    if not learns(temperature):
        return found
    moving = tuple(name for name in names if name in _READS)
    reads = {read: found[read].detach() for name in moving for read in (name, *_READS[name])}
    values = _ByTemperature.apply(temperature, moving, reads, *(found[name] for name in moving))  # type: ignore[no-untyped-call]
    return {**{name: found[name] for name in names}, **dict(zip(moving, values, strict=True))}


class _ByTemperature(torch.autograd.Function):
    """The unchanged statistics. Backward adds the temperature's gradient to theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        temperature: Tensor,
        names: tuple[str, ...],
        reads: dict[str, Tensor],
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.names, ctx.reads = names, tuple(reads)
        ctx.save_for_backward(temperature, *reads.values())
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if again.wants_graph():
            raise UnsupportedRequest(
                "create_graph=True asks for second derivatives, but the temperature requires "
                "grad: torch.func (grad, hessian) has them."
            )
        temperature, *reads = ctx.saved_tensors
        derivatives = _derivatives_of(dict(zip(ctx.reads, reads, strict=True)))
        parts = [
            torch.where(g == 0, 0, g * derivatives[name]())
            for name, g in zip(ctx.names, grads, strict=True)
            if g is not None
        ]
        if not parts:
            return (None,) * (3 + len(grads))
        parts = [part if part.dim() == 1 else part.sum(-1) for part in parts]
        total = sum(parts[1:], parts[0]) / temperature
        return total.sum().view(1) if temperature.numel() == 1 else total, None, None, *grads


def _derivatives_of(s: dict[str, Tensor]) -> dict[str, Any]:
    """Return functions that evaluate ``T·ds/dT`` of every statistic."""
    return {
        "logp": lambda: -(s["logp"] + s["entropy"]),
        "lse": lambda: s["entropy"] - s["lse"],
        "entropy": lambda: s[VARIANCE],
        # 0: padding, or a sure token without entropy
        PICKED: lambda: torch.where(s[PICKED] == 0, 0, -(s[PICKED] + s["entropy"][:, None])),
        f"{VOCABULARY}entropy": lambda: s[VOCABULARY + VARIANCE],
        "log_sum_p_sq": lambda: -2 * (s[MEAN_OVER_P_SQ] + s["entropy"]),
    }
