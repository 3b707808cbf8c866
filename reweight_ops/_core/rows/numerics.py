"""Numerically careful functions that several modules need."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log1mexp(logp: Tensor) -> Tensor:
    """Return ``log(1 - p)`` from ``log p``.

    It is accurate at both ends. At ``p = 1`` it is finite and has no gradient.
    """
    # Above this, p is 1 in the dtype. The exact value is then unbounded and unknown.
    x = logp.clamp(max=-torch.finfo(logp.dtype).eps / 2)
    near = x > -math.log(2)
    # Each branch sees only arguments that it can take, because the gradient of the
    # branch that is not chosen must not be NaN.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.where(near, -1.0, x).exp()),
    )


def log1mexp_or_inf(logp: Tensor) -> Tensor:
    """Return ``log(1 - p)`` from ``log p``, with ``-inf`` at ``p = 1``. It is for
    values without a gradient.
    """
    return torch.where(logp > -math.log(2), torch.log(-torch.expm1(logp)), torch.log1p(-logp.exp()))
