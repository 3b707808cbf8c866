"""Sequences whose tokens several ranks have: sums, counts and order statistics over all
tokens, and their gradients.

The loss of a rank is the share of its own rows. The loss of the call is the sum over
the ranks. The share of every rank reads a sum over ranks, so the gradient of a row is
the sum of what every rank has for it. The adjoint of a sum over ranks is therefore a
sum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ranks import agreed, check_group, gathered, size_and_rank, summed_


@dataclass(frozen=True)
class Across:
    """The ranks that have the other tokens of this rank's sequences."""

    op: str
    group: Any

    @property
    def world(self) -> int:
        return size_and_rank(self.group)[0]

    @torch.compiler.disable
    def agree(self, device: torch.device, sequences: int, needs_grad: bool) -> None:
        """Raise on every rank if the calls of the ranks do not fit together.

        This happens before anything else is sent.
        """
        same = {"number of sequences": sequences, "whether a gradient is needed": int(needs_grad)}
        agreed(f"{self.op}, sequence_group", self.group, device, same, {})

    @torch.compiler.disable
    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks on every rank. It is differentiable."""
        if torch.is_floating_point(x):
            found: Tensor = _Summed.apply(x, self)  # type: ignore[no-untyped-call]
            return found
        return summed_(self.op, self.group, x.contiguous().clone())

    @torch.compiler.disable
    def gather(self, x: Tensor) -> tuple[Tensor, slice]:
        """Return ``x`` ``[N]`` of every rank in the order of ranks, and the slice of
        this rank.

        The result is differentiable. The call waits, because the N of the other ranks
        are not known.
        """
        sizes = (
            gathered(self.op, self.group, torch.tensor([x.numel()], device=x.device))
            .view(-1)
            .tolist()
        )
        _, rank = size_and_rank(self.group)
        before, after = sum(sizes[:rank]), sum(sizes[rank + 1 :])
        whole = torch.cat([x.new_zeros(before), x, x.new_zeros(after)])
        return self.sum(whole if x.is_floating_point() else whole.to(torch.int64)).to(
            x.dtype
        ), slice(before, before + x.numel())


def across(op: str, group: Any) -> Across | None:
    """Return the ranks that a call's ``sequence_group`` stands for."""
    check_group(op, "sequence_group", group)
    return None if group is None else Across(op, group)


class _Summed(torch.autograd.Function):
    """The sum of ``x`` over ranks."""

    @staticmethod
    def forward(x: Tensor, over: Across) -> Tensor:
        return summed_(over.op, over.group, x.detach().contiguous().clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Across], output: Tensor) -> None:
        ctx.over = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(upstream, ctx.over), None  # type: ignore[no-untyped-call]
