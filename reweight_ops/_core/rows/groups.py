"""Groups of rows, the id of an ignored row, and the description of a call's tensors in
a message.
"""

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

_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def describe(tensors: Mapping[str, Any]) -> str:
    """Describe every tensor of a call for an error message:
    ``[logits (4, 8, 32000) bf16 cuda:0; ...]``.
    """
    parts = [
        f"{name} {tuple(t.shape)} "
        f"{_DTYPE_NAMES.get(t.dtype, str(t.dtype).removeprefix('torch.'))} {t.device}"
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    ]
    return f"[{'; '.join(parts)}]"


@dataclass(frozen=True)
class Groups:
    """``count`` groups of rows, either runs of ``length`` rows or given by ``index``.

    ``across`` has the ranks that hold more rows of the same groups. Sums and counts are
    then over all of them.
    """

    count: int
    length: int = 0
    index: Tensor | None = None  # [N] int64; ``count`` marks a row of no group
    across: Across | None = None

    def count_rows(self, where: Tensor, dtype: torch.dtype) -> Tensor:
        """Map ``[N]`` bool to ``[count]``: how many rows of each group are True."""
        if self.index is None and self.across is None:
            return where.view(self.count, self.length).sum(-1, dtype=dtype)
        return self.sum(where.to(dtype))

    def divide(self, x: Tensor, by: Tensor) -> Tensor:
        """Divide each row of ``[N]`` by the number of its group, which is not 0. A row
        of no group is divided by 1.
        """
        if self.index is None:
            return (x.view(self.count, self.length) / by[:, None]).view(-1)
        return x / torch.cat([by, by.new_ones(1)])[self.index]

    def sum(self, x: Tensor) -> Tensor:
        """``[N] -> [count]``."""
        return self._own_sum(x) if self.across is None else self.across.sum(self._own_sum(x))

    def _own_sum(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x.view(self.count, self.length).sum(-1)
        # Use index_put, because index_add adds in an undefined order on CUDA.
        return x.new_zeros(self.count + 1).index_put((self.index,), x, accumulate=True)[
            : self.count
        ]

    def max(self, x: Tensor) -> Tensor:
        """Map ``[N]`` to the maximum ``[count]`` of each group. It is ``-inf`` for a
        group without rows.
        """
        assert self.across is None, (
            "no caller needs the largest row of a sequence that several ranks have"
        )
        if self.index is None:
            return x.view(self.count, self.length).amax(-1)
        return x.new_full((self.count + 1,), -math.inf).scatter_reduce(0, self.index, x, "amax")[
            : self.count
        ]

    def spread(self, y: Tensor) -> Tensor:
        """Map ``[count]`` to ``[N]``: each row gets the value of its group, and a row
        of no group gets 0.
        """
        if self.index is None:
            return y[:, None].expand(self.count, self.length).reshape(-1)
        return torch.cat([y, y.new_zeros(1)])[self.index]
