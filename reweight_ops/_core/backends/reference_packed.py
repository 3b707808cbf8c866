"""The reference's primitives of packed rows.

They are those of logits, on rows that are filled up with columns without mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from .base import PackedRows, SoftmaxParams
from .reference_token import token_grad, token_stats


def _entries(rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Return ``[N, K]``: where in ``values`` the elements of each row are, and which
    elements exist.

    K is the length of the longest row.
    """
    start, length = rows.bounds[0], torch.where(rows.ids < 0, 0, rows.bounds[1] - rows.bounds[0])
    column = torch.arange(max(int(length.max()) if length.numel() else 0, 1), device=length.device)
    there = column < length[:, None]
    return torch.where(there, start[:, None] + column, 0), there


def filled(rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Return the rows as ``[N, K]`` logits, ``-inf`` where a row has no element, and
    their ids.
    """
    at, there = _entries(rows)
    values = rows.values if rows.values.numel() else rows.values.new_zeros(1)
    return torch.where(there, values[at], -math.inf), torch.where(
        (rows.ids < 0) & (rows.ids != IGNORE_INDEX), -1, rows.ids
    )


def packed_stats(rows: PackedRows, stats: tuple[str, ...]) -> Tensor:
    z, ids = filled(rows)
    return token_stats(z, ids, rows.temperature, SoftmaxParams(z.size(1), rows.softcap), stats)


def packed_grad(
    rows: PackedRows, stats: dict[str, Tensor], derivatives: dict[str, Tensor | None], out: Tensor
) -> None:
    z, ids = filled(rows)
    at, there = _entries(rows)
    grad = torch.empty_like(z)
    token_grad(
        z, ids, rows.temperature, SoftmaxParams(z.size(1), rows.softcap), stats, derivatives, grad
    )
    out[at[there]] = grad[there]
