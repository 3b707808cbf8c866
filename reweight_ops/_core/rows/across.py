"""Sequences whose tokens several ranks have: sums, counts and order statistics over all
tokens, and their gradients.

The loss of a rank is the share of its own rows. The loss of the call is the sum over
the ranks. The share of every rank reads a sum over ranks, so the gradient of a row is
the sum of what every rank has for it. The adjoint of a sum over ranks is therefore a
sum over ranks.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
from torch import Tensor

from .ranks import UNKNOWN, agreed, check_group, size_and_rank, summed_
from .traced import agreed_after, numbers_of_ranks, summed_after

#: The number that each rank has for itself in the exchange before a call.
_OWN = "rows"


class Across:
    """The ranks that have the other tokens of this rank's sequences, in one call.

    In a graph of torch.compile every collective reads the token that the one before
    wrote. All ranks therefore run them in the order of the call, forward and backward,
    whatever the compiler makes of their shapes.
    """

    def __init__(self, op: str, group: Any) -> None:
        self.op, self.group = op, group
        self._of = f"{op}, sequence_group"
        self._asked = UNKNOWN
        self._same: dict[str, int] = {}
        self._sizes: tuple[int, ...] = ()
        self._token: Tensor | None = None

    @property
    def world(self) -> int:
        return size_and_rank(self.group)[0]

    def asks(self, *parts: Any) -> None:
        """Note what the call asks for, which says what it sums. A graph of
        torch.compile does not: its ranks are not compared in it.
        """
        if not torch.compiler.is_compiling():
            self._asked = zlib.crc32(_structure(parts).encode())

    def agree(self, rows: int, sequences: int, needs_grad: bool, after: Tensor) -> None:
        """Raise on every rank if the calls of the ranks do not fit together.

        This happens before anything else is sent. ``after`` is computed before it.
        """
        self._same = {
            "number of sequences": sequences,
            "whether a gradient is needed": int(needs_grad),
            "the spec or what it is given": self._asked,
        }
        if torch.compiler.is_compiling():
            self._token = self._agreed_after(after, rows, [])
        else:
            own = {_OWN: rows}
            self._sizes = agreed(self._of, self.group, after.device, self._same, own)[_OWN]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks on every rank. It is differentiable."""
        if torch.compiler.is_compiling():
            total, self._token = summed_after(x, self._last(x), self.op, self.group.group_name)
            found: Tensor = total
            return found
        if torch.is_floating_point(x):
            found = _Summed.apply(x, self.op, self.group)  # type: ignore[no-untyped-call]
            return found
        return summed_(self.op, self.group, x.contiguous().clone())

    def gather(self, x: Tensor) -> tuple[Tensor, slice]:
        """Return ``x`` ``[N]`` of the rows of every rank in the order of ranks, and the
        slice of this rank.

        The result is differentiable.
        """
        if torch.compiler.is_compiling() and not self._sizes:
            of = (self._of, self.group.group_name, x.device.type, ",".join(self._same))
            self._sizes = numbers_of_ranks(*of, _OWN, int(x.numel()))
            self._token = self._agreed_after(self._last(x), x.numel(), list(self._sizes))
        sizes, (_, rank) = self._sizes, size_and_rank(self.group)
        before, after = sum(sizes[:rank]), sum(sizes[rank + 1 :])
        whole = torch.cat([x.new_zeros(before), x, x.new_zeros(after)])
        total = self.sum(whole if x.is_floating_point() else whole.to(torch.int64))
        return total.to(x.dtype), slice(before, before + sizes[rank])

    def _last(self, x: Tensor) -> Tensor:
        """Return the token of the collective before."""
        return x.new_empty(0, dtype=torch.float32) if self._token is None else self._token

    def _agreed_after(self, after: Tensor, rows: int, expected: list[int]) -> Tensor:
        names, numbers = ",".join(self._same), list(self._same.values())
        of = (self._of, self.group.group_name, names, numbers, _OWN)
        token: Tensor = agreed_after(after, *of, rows, expected)
        return token


def across(op: str, group: Any) -> Across | None:
    """Return the ranks that a call's ``sequence_group`` stands for."""
    check_group(op, "sequence_group", group)
    return None if group is None else Across(op, group)


def _structure(x: Any) -> str:
    """Describe a spec without its numbers, which may differ between ranks."""
    if x is None or isinstance(x, (str, bool)):
        return repr(x)
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(_structure, x))})"
    name: str = getattr(x, "__qualname__", type(x).__qualname__)
    if isinstance(x, (int, float, Tensor)):
        return "a number"
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return name + _structure([getattr(x, field.name) for field in dataclasses.fields(x)])
    return name


class _Summed(torch.autograd.Function):
    """The sum of ``x`` over ranks."""

    @staticmethod
    def forward(x: Tensor, op: str, group: Any) -> Tensor:
        return summed_(op, group, x.detach().contiguous().clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Any], output: Tensor) -> None:
        ctx.op, ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _Summed.apply(upstream, ctx.op, ctx.group), None, None  # type: ignore[no-untyped-call]
