"""Which logits hold a gradient now.

The mark is on their storage, so a view, a slice or ``detach()`` of them is recognised
too.
"""

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
        return (
            self.offset
            + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
            + 1
        )

    def box(self) -> list[tuple[int, int]]:
        """Return the first and last index of every dimension, largest stride first, in
        a tensor that begins where the storage does.
        """
        rest, bounds = self.offset, []
        for n, stride in sorted(zip(self.shape, self.strides, strict=True), key=lambda x: -x[1]):
            first, rest = divmod(rest, stride) if stride else (0, rest)
            bounds.append((first, first + n - 1))
        return bounds

    def wraps(self) -> bool:
        """Return whether an index runs beyond its dimension. The tensor then begins
        elsewhere, and boxes say nothing.
        """
        strides = sorted(self.strides, reverse=True)
        return any(
            (last + 1) * inner > outer
            for (_, last), outer, inner in zip(self.box()[1:], strides, strides[1:], strict=False)
        )

    def overlaps(self, other: _Region) -> bool:
        """Return whether two regions overlap.

        This is exact for two slices of one tensor. Otherwise it tells whether their
        spans meet.
        """
        if (
            not all(self.shape)
            or not all(other.shape)
            or self.offset >= other.end()
            or other.offset >= self.end()
        ):
            return False
        a, b = _beside(self, other)
        if a.strides != b.strides or a.wraps() or b.wraps():
            return True
        return all(
            a0 <= b1 and b0 <= a1 for (a0, a1), (b0, b1) in zip(a.box(), b.box(), strict=True)
        )


def _beside(a: _Region, b: _Region) -> tuple[_Region, _Region]:
    """Return the regions with strides that can be compared.

    The stride of a dimension of one index addresses nothing, and PyTorch may give any.
    It becomes that of the other region, or 0 where both have one index.
    """
    if len(a.shape) != len(b.shape):
        return a, b
    dimensions = list(zip(a.shape, b.shape, a.strides, b.strides, strict=True))
    return (
        a._replace(strides=tuple(s if m > 1 else t * (n > 1) for m, n, s, t in dimensions)),
        b._replace(strides=tuple(t if n > 1 else s * (m > 1) for m, n, s, t in dimensions)),
    )


def _region(logits: Tensor) -> _Region:
    size = logits.element_size()  # in bytes: a view may have another dtype
    return _Region(
        int(logits.storage_offset()) * size,
        (*logits.shape, size),
        (*(s * size for s in logits.stride()), 1),
    )


def mark(logits: Tensor) -> None:
    """Mark the elements of ``logits``: they hold a gradient from now on."""
    if not torch.compiler.is_compiling() and torch._C._has_storage(logits):
        storage = logits.untyped_storage()
        setattr(storage, _MARK, (*getattr(storage, _MARK, ()), _region(logits)))


def unmark(logits: Tensor) -> None:
    """Take back the last :func:`mark`, because nothing was written."""
    storage = logits.untyped_storage()
    setattr(storage, _MARK, getattr(storage, _MARK)[:-1])


def is_consumed(logits: Tensor) -> bool:
    """Return whether an element of ``logits`` holds a gradient."""
    if torch.compiler.is_compiling() or not torch._C._has_storage(logits):
        return False
    regions = getattr(logits.untyped_storage(), _MARK, ())
    return any(_region(logits).overlaps(region) for region in regions)


def is_overwritten(other: Tensor, logits: Tensor) -> bool:
    """Return whether a gradient in place of ``logits`` is written over elements of
    ``other`` that are still to be read.

    Where both are the same view, every element is read before it is written.
    """
    if torch.compiler.is_compiling() or not all(map(torch._C._has_storage, (logits, other))):
        return False
    a, b = _beside(_region(logits), _region(other))
    same_view = a.offset == b.offset and a.strides == b.strides and a.shape[-1] == b.shape[-1]
    in_memory = logits.untyped_storage() is other.untyped_storage()
    return in_memory and not same_view and a.overlaps(b)


def forget(logits: Tensor) -> None:
    """Forget the marks of a storage that has new contents.

    They came through a tensor that autograd does not know to be the same memory.
    """
    if hasattr(logits.untyped_storage(), _MARK):
        delattr(logits.untyped_storage(), _MARK)
