"""``batch`` of a weight: statistics over this call's valid rows, or over each row's sequence. A weight that uses it takes two passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .groups import Groups
from .rows import Rows


class BatchStatistics:
    """Reductions of ``[N]`` values over the valid rows; nothing waits for the device."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def _only(self, x: Tensor, other: float) -> Tensor:
        return torch.where(self._rows.keep, x, other)

    def _sequences(self) -> Groups:
        return self._rows.need_sequences("a weight that uses batch.seq_mean or batch.seq_sum")

    def sum(self, x: Tensor) -> Tensor:
        return self._only(x, 0).sum()

    def mean(self, x: Tensor) -> Tensor:
        # In fp64, so that the mean of equal numbers is that number: what is left of them after it is 0, and no rounding's sign.
        total = self._only(x, 0).sum(dtype=torch.float64)
        return (total / self._rows.keep.sum().clamp(min=1)).to(x.dtype)

    def _ended(self, x: Tensor, other: float) -> Tensor:
        """``x`` in the rows that are in, else ``other``, and one more of those: a batch without rows has an extremum too."""
        return torch.cat([self._only(x, other), x.new_full((1,), other)])

    def min(self, x: Tensor) -> Tensor:
        return self._ended(x, math.inf).min()

    def max(self, x: Tensor) -> Tensor:
        return self._ended(x, -math.inf).max()

    def _order_statistics(self, x: Tensor, q: Any) -> tuple[Tensor, Tensor]:
        ordered = self._ended(x, math.inf).sort().values
        return ordered, q * (self._rows.keep.sum() - 1).clamp(min=0).to(x.dtype)

    def quantile(self, x: Tensor, q: Any) -> Tensor:
        """Linear interpolation between order statistics, as ``torch.quantile``, of any number of rows and without reading one on the host."""
        ordered, at = self._order_statistics(x, q)
        below, above = (ordered.gather(0, k.long().view(1)).view(()) for k in (at.floor(), at.ceil()))
        result: Tensor = below + (at - at.floor()) * (above - below)
        return result

    def quantile_nearest(self, x: Tensor, q: Any) -> Tensor:
        """The order statistic nearest to the quantile, halves to the even one (``interpolation="nearest"``)."""
        ordered, at = self._order_statistics(x, q)
        result: Tensor = ordered.gather(0, at.round().long().view(1)).view(())
        return result

    def top(self, x: Tensor, fraction: Any, where: Tensor) -> Tensor:
        """1.0 for the ``max(1, ceil(fraction·n))`` largest ``x`` among the n valid rows with ``where``, else 0.0; of equal ones the first."""
        candidate = self._rows.keep & where
        # 0.07·100 is a rounding above 7 and means 7.
        count = (fraction * candidate.sum().double() + 0.999999).floor()
        return self._first(x, candidate, count)

    def largest(self, x: Tensor, fraction: Any) -> Tensor:
        """1.0 for the ``max(1, floor(fraction·n))`` largest ``x`` among the n valid rows, else 0.0; of equal ones the first."""
        return self._first(x, self._rows.keep, self._count(fraction))

    def draw(self, fraction: Any, where: Tensor, seed: Any) -> Tensor:
        """1.0 for ``max(1, floor(fraction·n))`` of the n valid rows, or as many as have ``where``, drawn among those; else 0.0.

        The draw is a permutation of the positions that ``seed`` decides.
        """
        keys = _scattered(torch.arange(where.numel(), device=where.device), seed)
        order = keys.sort().indices
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return self._first(-rank.to(self._rows.dtype), self._rows.keep & where, self._count(fraction))

    def _count(self, fraction: Any) -> Tensor:
        count: Tensor = (fraction * self._rows.keep.sum().double()).floor()
        return count

    def _first(self, x: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        """1.0 for the ``max(1, count)`` largest ``x`` among the candidates."""
        # Candidates first, the largest of them first: two stable sorts, the major key last. Exact where a value is infinite.
        order = torch.where(candidate, x, 0).sort(descending=True, stable=True).indices
        order = order[candidate[order].to(torch.uint8).sort(descending=True, stable=True).indices]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        result: Tensor = (candidate & (rank < count.clamp(min=1))).to(x.dtype)
        return result

    def seq_sum(self, x: Tensor) -> Tensor:
        """``[N]``: every row gets its sequence's sum."""
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)))

    def seq_mean(self, x: Tensor) -> Tensor:
        counts = self._sequences().sum(self._rows.keep.to(x.dtype)).clamp(min=1)
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)) / counts)


def _scattered(position: Tensor, seed: Any) -> Tensor:
    """A 62-bit hash of each position and the seed (SplitMix64's two rounds)."""
    z = position + (seed.long() if isinstance(seed, Tensor) else int(seed)) * 0x51ED2701
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z & ((1 << 62) - 1)
