"""Rows by key: sums along a sequence and places in an order, by sorts and scans whose number follows from shapes, so that no value is read on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ordered:
    """Rows sorted by key: those of one key are a run. ``order`` ``[N]`` says which row is at a place, ``key`` ``[N]`` whose run the place is in."""

    order: Tensor
    key: Tensor

    @staticmethod
    def by(key: Tensor, then: Tensor | None = None) -> Ordered:
        """Rows by key, then by a value if there is one, then as they are."""
        # Two stable sorts, the major key last. NaN is the largest value.
        if then is None:
            order = key.sort(stable=True).indices
        else:
            order = then.detach().sort(stable=True).indices
            order = order[key[order].sort(stable=True).indices]
        return Ordered(order, key[order])

    def place(self) -> Tensor:
        """``[N]``, by place: how many of its run come before."""
        return torch.arange(self.key.numel(), device=self.key.device) - self.start()

    def start(self) -> Tensor:
        """``[N]``, by place: the place at which its run begins."""
        return torch.searchsorted(self.key, self.key)

    def count(self) -> Tensor:
        """``[N]``, by place: how many rows its run has."""
        return torch.searchsorted(self.key, self.key, right=True) - self.start()

    def back(self, y: Tensor) -> Tensor:
        """By place to by row."""
        return torch.zeros_like(y).scatter(0, self.order, y)

    def cumsum(self, x: Tensor, decay: Any, longest: int, reverse: bool = False) -> Tensor:
        """``[N]``: ``Σ decay^d·x`` over the row and those before it (``reverse``: after it) in its run, ``d`` rows away; runs have at most ``longest``.

        The sums of a run see nothing of the others, not even an inf. About ``log2(longest)`` steps, each of all rows.
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
