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
        return self.sum(x) / self._rows.keep.sum().clamp(min=1)

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
        # 0.07·100 is a rounding above 7 and means 7.
        return self._largest(x, where, fraction, 0.999999)

    def top_floor(self, x: Tensor, fraction: Any, where: Tensor) -> Tensor:
        """:meth:`top` of the ``max(1, floor(fraction·n))`` largest."""
        # 0.29·100 is a rounding below 29 and means 29.
        return self._largest(x, where, fraction, 1e-6)

    def _largest(self, x: Tensor, where: Tensor, fraction: Any, more: float) -> Tensor:
        candidate = self._rows.keep & where
        # Candidates first, the largest of them first: two stable sorts, the major key last. Exact where a value is infinite.
        order = torch.where(candidate, x, 0).sort(descending=True, stable=True).indices
        order = order[candidate[order].to(torch.uint8).sort(descending=True, stable=True).indices]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        count = (fraction * candidate.sum().double() + more).floor().clamp(min=1)
        result: Tensor = (candidate & (rank < count)).to(x.dtype)
        return result

    def seq_sum(self, x: Tensor) -> Tensor:
        """``[N]``: every row gets its sequence's sum."""
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)))

    def seq_mean(self, x: Tensor) -> Tensor:
        counts = self._sequences().sum(self._rows.keep.to(x.dtype)).clamp(min=1)
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)) / counts)
