"""Moments of a row's log-probs, which the gradient by the temperature reads.

They are in PyTorch for every backend. Each costs one more read of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import SoftmaxParams
from .mean_logit import blocks, capped

#: The names of these moments among the statistics of an op: ``Σ p·(log p + H)²``, the
#: variance of log p, and ``Σ p²·log p / Σ p²``.
VARIANCE, MEAN_BY_P_SQ = "log_p_variance", "log_p_mean_by_p_sq"


def log_p_moment(name: str, logits: Tensor, temperature: Tensor, softmax: SoftmaxParams) -> Tensor:
    """Return the named moment of logits ``R + (V,)``: ``[N]`` in fp32 (fp64 for fp64
    logits).

    Columns without probability do not contribute.
    """
    z = logits[..., : softmax.vocab_size]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    t, parts, first = temperature.to(dtype).expand(z.shape[:-1].numel()), list[Tensor](), 0
    for block in blocks(z):
        heat = t[first : first + len(block), None]
        log_p = torch.log_softmax(capped(block.to(dtype), softmax.softcap) / heat, -1)
        parts.append(_MOMENTS[name](log_p.exp(), torch.where(log_p == -math.inf, 0, log_p)))
        first += len(block)
    return torch.cat(parts) if parts else z.new_zeros(0, dtype=dtype)


def _variance(p: Tensor, log_p: Tensor) -> Tensor:
    return (p * (log_p - (p * log_p).sum(-1, keepdim=True)) ** 2).sum(-1)


def _mean_by_p_sq(p: Tensor, log_p: Tensor) -> Tensor:
    return (p * p * log_p).sum(-1) / (p * p).sum(-1)


_MOMENTS = {VARIANCE: _variance, MEAN_BY_P_SQ: _mean_by_p_sq}
