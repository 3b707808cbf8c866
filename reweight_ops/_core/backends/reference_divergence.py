"""The reference's divergence primitives in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from .base import DivergenceInputs
from .reference_token import Distribution


class _Logs(NamedTuple):
    """A row, its log-probs (0 on masked columns), its probabilities, its masked
    columns, its log-sum-exp, and the rounding error of that.
    """

    at: Distribution
    log: Tensor
    p: Tensor
    masked: Tensor
    lse: Tensor
    lse_low: Tensor


def _logs(
    logits: Tensor,
    two: DivergenceInputs,
    temperature: Tensor,
    softmax: object,
    known: Tensor | None = None,
) -> _Logs:
    """Return the logs of one tensor.

    ``known`` is the log-sum-exp ``[2, N]`` of the whole row, if the logits are a shard
    of it. None takes that of the logits.
    """
    dtype = torch.float64 if two.logits.dtype == torch.float64 else torch.float32
    at = Distribution(
        logits.to(dtype) if logits.dtype.itemsize < dtype.itemsize else logits,
        two.ids,
        temperature,
        softmax,  # type: ignore[arg-type]
    )
    total = at.log_total() if known is None else ((known[0] - at.top) + known[1]).to(dtype)
    lse = (at.top + total).to(dtype)
    lse_low = ((at.top - lse) + total).to(dtype)
    total = total[:, None]
    log = at.below - total
    # A row without any finite logit is NaN everywhere. Nothing is masked there.
    masked = ((at.below == -math.inf) | at.masked) & ~total.isnan()
    return _Logs(
        at, torch.where(masked, 0, log), torch.where(masked, 0, log.exp()), masked, lse, lse_low
    )


def divergence_stats(two: DivergenceInputs) -> Tensor:
    a, b = (
        _logs(two.logits, two, two.temperature, two.softmax),
        _logs(two.other, two, two.other_temperature, two.other_softmax),
    )
    d = torch.where(a.masked | b.masked, 0, a.log - b.log)
    is_nan = a.lse.isnan() | b.lse.isnan()
    forward, reverse = -(b.p * d).sum(-1), (a.p * d).sum(-1)
    forward = torch.where((a.masked & ~b.masked).any(-1) & ~is_nan, math.inf, forward)
    reverse = torch.where((b.masked & ~a.masked).any(-1) & ~is_nan, math.inf, reverse)
    entropies = [-(t.p * t.log).sum(-1) for t in (a, b)]
    rows = torch.stack(
        [forward.clamp(min=0), reverse.clamp(min=0), *entropies, a.lse, a.lse_low, b.lse, b.lse_low]
    )
    rows[:4] = torch.where(is_nan, math.nan, rows[:4])
    return torch.where(two.ids != IGNORE_INDEX, rows, 0)


def divergence_grad(two: DivergenceInputs, table: Tensor, derivatives: Tensor, out: Tensor) -> None:
    a = _logs(two.logits, two, two.temperature, two.softmax, table[4:6])
    b = _logs(two.other, two, two.other_temperature, two.other_softmax, table[6:8])
    forward, reverse, entropy = derivatives[:, :, None]
    g = forward * (a.p - b.p)
    kl, h = table[1][:, None], table[2][:, None]
    g = g + torch.where(
        reverse == 0, 0, reverse * a.p * (torch.where(a.masked | b.masked, 0, a.log - b.log) - kl)
    )
    g = g - torch.where(entropy == 0, 0, entropy * a.p * (a.log + h))
    g = g * a.at.slope / a.at.temperature
    g = torch.where(a.masked, 0, g)
    # The gradient is inf - inf in every column with mass. No direction is right, so it
    # is NaN.
    g = torch.where((reverse != 0) & ~kl.isfinite(), math.nan, g)
    has_gradient = ((two.ids != IGNORE_INDEX) & (derivatives != 0).any(0))[:, None]
    g = torch.where(has_gradient, g, 0)
    columns = two.softmax.vocab_size
    out[..., :columns].copy_(g.view(out[..., :columns].shape))
    out[..., columns:].zero_()


def divergence_loss_grad(
    two: DivergenceInputs, constants: Tensor, weights: Tensor, out: Tensor
) -> Tensor:
    table = divergence_stats(two)
    divergence_grad(two, table, constants[:, None] * weights, out)
    return table
