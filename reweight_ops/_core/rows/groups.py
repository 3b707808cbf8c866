"""Rows that belong together, the id of an ignored row, and how a call's tensors read in a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .across import Across

#: The id of an ignored row.
IGNORE_INDEX = -100

_DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def describe(tensors: Mapping[str, Any]) -> str:
    """``[logits (4, 8, 32000) bf16 cuda:0; ...]``: every tensor of a call, for error messages."""
    parts = [
        f"{name} {tuple(t.shape)} {_DTYPE_NAMES.get(t.dtype, str(t.dtype).removeprefix('torch.'))} {t.device}"
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    ]
    return f"[{'; '.join(parts)}]"


@dataclass(frozen=True)
class Groups:
    """Rows that belong together: ``count`` groups, either equal runs of ``length`` rows or given by ``index``.

    ``across``: ranks that have more rows of the same groups; sums and counts are then over all of them.
    """

    count: int
    length: int = 0
    index: Tensor | None = None  # [N] int64; ``count`` marks a row of no group
    across: Across | None = None

    def count_rows(self, where: Tensor, dtype: torch.dtype) -> Tensor:
        """``[N]`` bool ``-> [count]``: how many rows of each group are True."""
        if self.index is None and self.across is None:
            return where.view(self.count, self.length).sum(-1, dtype=dtype)
        return self.sum(where.to(dtype))

    def divide(self, x: Tensor, by: Tensor) -> Tensor:
        """``[N] / [count] -> [N]``: each row by its group's number, which is not 0; a row of no group by 1."""
        if self.index is None:
            return (x.view(self.count, self.length) / by[:, None]).view(-1)
        return x / torch.cat([by, by.new_ones(1)])[self.index]

    def sum(self, x: Tensor) -> Tensor:
        """``[N] -> [count]``."""
        return self._own_sum(x) if self.across is None else self.across.sum(self._own_sum(x))

    def _own_sum(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x.view(self.count, self.length).sum(-1)
        # index_put and not index_add: the latter adds in an undefined order on CUDA.
        return x.new_zeros(self.count + 1).index_put((self.index,), x, accumulate=True)[: self.count]

    def max(self, x: Tensor) -> Tensor:
        """``[N] -> [count]``; ``-inf`` for a group without rows."""
        assert self.across is None, "the largest row of a sequence that several ranks have: nobody asks for it"
        if self.index is None:
            return x.view(self.count, self.length).amax(-1)
        return x.new_full((self.count + 1,), -math.inf).scatter_reduce(0, self.index, x, "amax")[: self.count]

    def spread(self, y: Tensor) -> Tensor:
        """``[count] -> [N]``: each row gets its group's value, a row of no group 0."""
        if self.index is None:
            return y[:, None].expand(self.count, self.length).reshape(-1)
        return torch.cat([y, y.new_zeros(1)])[self.index]
