"""Rows sorted by key: sums along a sequence and places in an order.

The sorts and scans depend in number on shapes only, so no value is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ordered:
    """Rows sorted by key. The rows of one key are a run.

    ``order`` ``[N]`` tells which row is at a place. ``key`` ``[N]`` tells to which run
    the place belongs.
    """

    order: Tensor
    key: Tensor

    @staticmethod
    def by(key: Tensor, then: Tensor | None = None) -> Ordered:
        """Sort rows by key, then by a value if there is one, then by their position."""
        # Two stable sorts, the major key last. NaN is the largest value.
        if then is None:
            order = key.sort(stable=True).indices
        else:
            order = then.detach().sort(stable=True).indices
            order = order[key[order].sort(stable=True).indices]
        return Ordered(order, key[order])

    def place(self) -> Tensor:
        """Return ``[N]``, by place: how many rows of its run come before."""
        return torch.arange(self.key.numel(), device=self.key.device) - self.start()

    def start(self) -> Tensor:
        """Return ``[N]``, by place: the place at which its run begins."""
        return torch.searchsorted(self.key, self.key)

    def count(self) -> Tensor:
        """Return ``[N]``, by place: how many rows its run has."""
        return torch.searchsorted(self.key, self.key, right=True) - self.start()

    def back(self, y: Tensor) -> Tensor:
        """Map a vector by place to a vector by row."""
        return torch.zeros_like(y).scatter(0, self.order, y)

    def cumsum(self, x: Tensor, decay: Any, longest: int, reverse: bool = False) -> Tensor:
        """Return ``[N]``: ``Σ decay^d·x`` over the row and those before it in its run,
        ``d`` rows away.

        With ``reverse`` the sum is over the row and those after it. A run has at most
        ``longest`` rows. The sums of a run see nothing of other runs, not even an inf.
        There are about ``log2(longest)`` steps, each over all rows.
        """
        y, key = x[self.order], self.key
        if reverse:
            y, key = y.flip(0), key.flip(0)
        step = 1
        while step < longest:
            before = torch.where(key[step:] == key[:-step], y[:-step], 0)
            y = torch.cat([y[:step], y[step:] + decay**step * before])
            step *= 2
        return self.back(y.flip(0) if reverse else y)
