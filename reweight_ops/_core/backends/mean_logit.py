"""The mean of a row's scaled logits, in PyTorch for every backend.

It is the only row statistic without a kernel, and costs one more read of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import SoftmaxParams

#: Its name among the statistics of an op.
MEAN_LOGIT = "mean_logit"
#: The number of elements that are computed at once. On a CPU they fit a cache. On a GPU
#: they are enough for its bandwidth.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 26}
#: The number of columns that are summed in one run. If there are few rows, a sum over a
#: whole row would be split among threads, and its bits would depend on that.
_RUN = 1024


def mean_logit(logits: Tensor, temperature: Tensor, softmax: SoftmaxParams) -> Tensor:
    """Return ``mean_v cap·tanh(z_v/cap)/T`` of logits ``R + (V,)`` over the
    ``vocab_size`` columns.

    It is ``[N]`` in fp32 (fp64 for fp64 logits).
    """
    z = logits[..., : softmax.vocab_size]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    parts = [_sum(capped(block.to(dtype), softmax.softcap)) for block in blocks(z)]
    total = torch.cat(parts) if parts else z.new_zeros(0, dtype=dtype)
    return total / (softmax.vocab_size * temperature.to(dtype))


def blocks(z: Tensor) -> Iterator[Tensor]:
    """Yield views of a few rows each.

    A tensor of sequences is split first, because its rows may have no common stride.
    """
    for rows in z.unbind() if z.dim() == 3 else (z,):
        most = _BLOCK.get(z.device.type, _BLOCK["cuda"])
        yield from torch.split(rows, max(most // max(z.size(-1), 1), 1))


def capped(x: Tensor, softcap: float) -> Tensor:
    """Return ``cap·tanh(x/cap)``. ``-inf`` stays ``-inf``."""
    return (
        x
        if math.isinf(softcap)
        else torch.where(x == -math.inf, x, softcap * torch.tanh(x / softcap))
    )


def _sum(x: Tensor) -> Tensor:
    whole = x.size(-1) // _RUN * _RUN
    runs = x[:, :whole].reshape(x.size(0), whole // _RUN, _RUN)
    return runs.sum(-1).sum(-1) + x[:, whole:].sum(-1)
