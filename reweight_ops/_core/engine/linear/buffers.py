"""The logits of a chunk of rows: those of the model whose head has a gradient, and
those of a frozen second model if there is one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...calls.hidden import ChunkSettings, LMHead
from .. import again
from .gemms import Chunk
from .measures import LogitRows, PerRow


class OtherHead(NamedTuple):
    """The frozen second model.

    It has hidden states of the computed rows and their head, or logits of all rows,
    where ``picked`` names the computed ones.
    """

    values: Tensor
    head: LMHead | None
    picked: Tensor | None
    settings: ChunkSettings

    def given(self, where: slice | Tensor) -> Tensor:
        """Return the given logits of the computed rows ``where``."""
        values, picked = self.values, self.picked
        if picked is not None:
            where = picked[where]
        if values.dim() == 2:
            return values[where]
        if isinstance(where, slice):
            where = torch.arange(
                where.start, min(where.stop, values.size(0) * values.size(1)), device=values.device
            )
        return values[where // values.size(1), where % values.size(1)]


class Kept(NamedTuple):
    """The logits of both models for a chunk, kept for backward. They are None if they
    were given.
    """

    values: Tensor
    other: Tensor | None


class Buffers:
    """Reused memory of ``size`` rows for a chunk's logits."""

    def __init__(
        self, size: int, head: LMHead, settings: ChunkSettings, other: OtherHead | None
    ) -> None:
        self.other = other
        self._own = Chunk(size, head, settings)
        self._other = (
            None
            if other is None or other.head is None
            else Chunk(size, other.head.cast(other.settings), other.settings)
        )

    @property
    def values(self) -> Tensor:
        """Return the first model's logits, padding included."""
        return self._own.data

    def logits(self, hidden: Tensor, rows: PerRow, where: slice | Tensor) -> LogitRows:
        """Return the logits of the computed rows ``where``, at most ``size``."""
        own, second = self._own.logits(hidden[where]), None
        if self.other is not None:
            second = (
                self.other.given(where)
                if self._other is None
                else self._other.logits(self.other.values[where])
            )
        return LogitRows(own, second, rows.at(where))

    def kept(self) -> Kept:
        """Return the logits without the head, so that nothing else holds the cast copy
        of the head.
        """
        return Kept(self.values, None if self._other is None else self._other.data)


def made(kept: Kept, other: OtherHead | None, rows: PerRow, where: slice) -> LogitRows:
    """Return the kept logits of the computed rows ``where``."""
    count, second = where.stop - where.start, None
    if other is not None:
        second = other.given(where) if kept.other is None else kept.other[:count]
    return LogitRows(kept.values[:count], second, rows.at(where))


def torch_logits(
    hidden: Tensor,
    head: LMHead,
    rows: PerRow,
    keep: Tensor,
    settings: ChunkSettings,
    other: OtherHead | None,
) -> LogitRows:
    """Return the logits of all computed rows at once. They are differentiable any
    number of times.
    """
    z = again.head_logits(hidden, head, keep, settings)
    y = (
        None
        if other is None
        else again.other_logits(other.values, other.head, other.picked, keep, other.settings)
    )
    return LogitRows(z, y, rows)
