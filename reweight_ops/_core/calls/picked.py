"""Checks of lists of ids ``[N, K]`` whose log-probs a call needs, or a teacher has
given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from ..rows.rows import Rows
from ..rows.structure import is_readable


def resolve_ids(rows: Rows, name: str, ids: Any, vocab_size: int) -> Tensor:
    """Return the ``[N, K]`` ids of every row, from one list per row, ``R + (K,)``, or
    one list for all, ``[K]``.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise rows.error(f"{name} are {got}, expected a tensor of int32 or int64.")
    if ids.device != rows.device:
        raise rows.error(f"{name} are on {ids.device}, the rows on {rows.device}.")
    if (tuple(ids.shape[:-1]) != rows.shape and ids.dim() != 1) or ids.size(-1) == 0:
        raise rows.error(
            f"{name} has shape {tuple(ids.shape)}, expected {rows.shape} + (K,), or (K,) for "
            "all rows."
        )
    flat = (
        ids.long().expand(rows.count, -1)
        if ids.dim() == 1
        else ids.long().reshape(rows.count, ids.size(-1))
    )
    check_ids(rows, name, flat, vocab_size)
    return flat


def check_ids(rows: Rows, name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise for an id ``[N, K]`` of a row that is in and none of so many, where ids may
    be read.
    """
    if not is_readable(ids) or not ids.numel():
        return
    bad = ((ids < 0) | (ids >= vocab_size)) & (ids != IGNORE_INDEX) & rows.keep[:, None]
    if bool(bad.any()):
        row, at = (int(x) for x in bad.nonzero()[0])
        raise rows.error(
            f"{name} has {int(ids[row, at])} in row {row} (flat), expected 0 to "
            f"{vocab_size - 1}, or {IGNORE_INDEX} for padding."
        )


def check_top(rows: Rows, name: str, count: Any, vocab_size: int) -> int:
    """Check a number of likeliest ids."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= vocab_size:
        raise rows.error(
            f"{name} is {count!r}, expected an integer from 1 to {vocab_size}, the columns."
        )
    return count
