"""Numerically careful functions that several places need."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log1mexp(logp: Tensor) -> Tensor:
    """``log(1 - p)`` from ``log p``, accurate at both ends, finite and without gradient at ``p = 1``."""
    # Above this p is 1 in the dtype: the exact value is unbounded, and unknown.
    x = logp.clamp(max=-torch.finfo(logp.dtype).eps / 2)
    near = x > -math.log(2)
    # Each branch sees only arguments that it can take: the gradient of the one that is not chosen must not be NaN.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.where(near, -1.0, x).exp()))


def log1mexp_or_inf(logp: Tensor) -> Tensor:
    """``log(1 - p)`` from ``log p`` as it is: ``-inf`` at ``p = 1``. For values without a gradient."""
    return torch.where(logp > -math.log(2), torch.log(-torch.expm1(logp)), torch.log1p(-logp.exp()))
