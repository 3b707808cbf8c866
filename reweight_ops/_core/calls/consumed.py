"""Which logits hold a gradient now: marked on their storage, so that a view, a slice or ``detach()`` of them is known too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MARK = "_reweight_ops_consumed"


class _Region(NamedTuple):
    """The elements of a storage that a view addresses."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def end(self) -> int:
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1

    def box(self) -> list[tuple[int, int]]:
        """First and last index of every dimension, largest stride first, in a tensor that begins where the storage does."""
        rest, bounds = self.offset, []
        for n, stride in sorted(zip(self.shape, self.strides, strict=True), key=lambda x: -x[1]):
            first, rest = divmod(rest, stride) if stride else (0, rest)
            bounds.append((first, first + n - 1))
        return bounds

    def wraps(self) -> bool:
        """Whether an index runs beyond its dimension: then the tensor begins elsewhere, and boxes say nothing."""
        strides = sorted(self.strides, reverse=True)
        return any((last + 1) * inner > outer for (_, last), outer, inner in zip(self.box()[1:], strides, strides[1:], strict=False))

    def overlaps(self, other: _Region) -> bool:
        """Exact for two slices of one tensor; else whether their spans meet."""
        if not all(self.shape) or not all(other.shape) or self.offset >= other.end() or other.offset >= self.end():
            return False
        if self.strides != other.strides or self.wraps() or other.wraps():
            return True
        return all(a0 <= b1 and b0 <= a1 for (a0, a1), (b0, b1) in zip(self.box(), other.box(), strict=True))


def _region(logits: Tensor) -> _Region:
    size = logits.element_size()  # in bytes: a view may have another dtype
    return _Region(int(logits.storage_offset()) * size, (*logits.shape, size), (*(s * size for s in logits.stride()), 1))


def mark(logits: Tensor) -> None:
    """Its elements hold a gradient from now on."""
    if not torch.compiler.is_compiling() and torch._C._has_storage(logits):
        storage = logits.untyped_storage()
        setattr(storage, _MARK, (*getattr(storage, _MARK, ()), _region(logits)))


def unmark(logits: Tensor) -> None:
    """Nothing was written to them after all: the last :func:`mark` is taken back."""
    storage = logits.untyped_storage()
    setattr(storage, _MARK, getattr(storage, _MARK)[:-1])


def is_consumed(logits: Tensor) -> bool:
    """Whether an element of it does."""
    if torch.compiler.is_compiling() or not torch._C._has_storage(logits):
        return False
    regions = getattr(logits.untyped_storage(), _MARK, ())
    return any(_region(logits).overlaps(region) for region in regions)


def forget(logits: Tensor) -> None:
    """Its storage has been filled anew, through a tensor that autograd does not know to be the same memory."""
    if hasattr(logits.untyped_storage(), _MARK):
        delattr(logits.untyped_storage(), _MARK)
