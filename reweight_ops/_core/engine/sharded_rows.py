"""Formulas of rows whose columns several ranks have: sums over all columns, and whole
rows.

The value of a row has the same bits on every rank, and so has its upstream gradient.
Each rank forms the gradient of its own columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.shards import VocabShards
from ..rows.ranks import size_and_rank
from .autograd import forbid_graph


class ValueOfSums(torch.autograd.Function):
    """``value(sums)`` ``[N]`` of sums ``[N, k]`` over shards, from the parts ``[N, k]``
    of this one. The sums are in fp64, in the order of ranks.

    The derivative by a sum is also that by a shard's part of it.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Tensor, value: Callable[[Tensor], Tensor], shards: VocabShards
    ) -> Tensor:
        total = shards.gathered(parts.contiguous()).double().sum(0).to(parts.dtype)
        ctx.value, ctx.shards = value, shards
        ctx.save_for_backward(total)
        return value(total)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        forbid_graph(ctx.shards)
        (total,) = ctx.saved_tensors
        with torch.enable_grad():
            sums = total.detach().requires_grad_()
            found = ctx.value(sums)
        (by,) = torch.autograd.grad(found, sums, upstream)
        # A row without a value has no gradient on any rank.
        by = torch.where(found.isnan()[:, None], torch.nan, by)
        return torch.where((upstream != 0)[:, None], by, 0), None, None


class SumOverShards(torch.autograd.Function):
    """The sums of :class:`ValueOfSums`, for a graph of torch.compile, in which a
    backward differentiates nothing.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, shards: VocabShards) -> Tensor:
        return shards.gathered(parts.contiguous()).double().sum(0).to(parts.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def whole_rows(x: Tensor, shards: VocabShards) -> Tensor:
    """Return ``[n, V]`` of this rank's columns ``[n, V_local]``, and those of the other
    ranks as constants.
    """
    _, rank = size_and_rank(shards.group)
    padding = max(shards.columns) - x.size(-1)
    every = shards.gathered(F.pad(x.detach(), (0, padding)))
    parts = [every[i, :, :columns] for i, columns in enumerate(shards.columns)]
    return torch.cat([*parts[:rank], x, *parts[rank + 1 :]], -1)
