"""The chunks of a linear head: how many rows of logits exist at a time, and how many
outlive forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Bytes of logits by device, and the fewest rows that still make an efficient GEMM
#: (every chunk reads the weight again).
_BUDGET = {"cpu": 96 << 20, "cuda": 5 << 28}
_FEWEST_ROWS = 256


class Chunking(NamedTuple):
    """How many rows exist at a time, and how many rows of logits outlive forward."""

    chunk_rows: int
    keep_rows: int


def chunking(
    rows: int,
    row_bytes: int,
    device: torch.device,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
) -> Chunking:
    """The chunks of ``rows`` rows with ``row_bytes`` bytes of logits each.

    The working chunk gets the device's budget (or the caller's, if smaller), but at
    least 256 rows. The chunk size is chosen so that the padded last chunk wastes
    little. The rest of the caller's budget keeps chunks for backward. A single chunk is
    always kept, because it exists anyway.
    """
    row_bytes = max(row_bytes, 1)
    if chunk_rows is None:
        usual = _BUDGET.get(device.type, _BUDGET["cuda"])
        chunk_rows = balanced(
            rows,
            max(
                (usual if memory_budget is None else min(usual, memory_budget)) // row_bytes,
                _FEWEST_ROWS,
            ),
        )
    if rows <= chunk_rows:
        return Chunking(chunk_rows, rows)
    budget = memory_budget if memory_budget is not None else 0
    if rows * row_bytes <= budget:
        return Chunking(chunk_rows, rows)
    chunk_bytes = chunk_rows * row_bytes
    return Chunking(chunk_rows, max(budget // chunk_bytes - 1, 0) * chunk_rows)


def balanced(rows: int, most: int) -> int:
    """Return the size of chunks of at most ``most`` rows that pads least (the largest
    such).

    It is a multiple of 64, for a GEMM's tiles, if possible.
    """
    if rows <= most:
        return max(rows, 1)
    grain = 64 if most >= 128 else 1
    largest = most // grain * grain
    return min(range(largest, most // 2, -grain), key=lambda size: -(-rows // size) * size)
