"""The data that the parts of a pair loss see.

Tokens sum to sequences. Sequences form pairs, or longer lists with the best first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..ranges import Number
from .groups import Groups

LAYOUTS = ("halves", "interleaved")


@dataclass(frozen=True)
class Sequences:
    """The S sequences of a call.

    ``tokens`` has vectors ``[N]`` by name, 0 in ignored rows. ``given`` has sums
    ``[S]`` that the caller already had.
    """

    tokens: dict[str, Tensor]
    given: dict[str, Tensor]
    keep: Tensor  # [N] bool
    groups: Groups
    layout: str
    size: int  # sequences per pair: 2, or more for a list

    @property
    def lengths(self) -> Tensor:
        """Return ``[S]``: the number of valid tokens."""
        return self.sum(torch.ones_like(self.tokens["logp"]))

    def sum(self, x: Tensor) -> Tensor:
        """Sum ``[N]`` to ``[S]`` over the valid tokens."""
        return self.groups.sum(torch.where(self.keep, x, 0))

    def spread(self, y: Tensor) -> Tensor:
        """``[S] -> [N]``."""
        return self.groups.spread(y)

    def split(self, y: Tensor) -> Tensor:
        """Reshape ``[S]`` to ``[size, P]``. Row 0 has the chosen sequences."""
        return (
            y.view(self.size, -1)
            if self.layout == "halves"
            else y.view(-1, self.size).transpose(0, 1)
        )

    def join(self, y: Tensor) -> Tensor:
        """Invert :meth:`split`."""
        return (y if self.layout == "halves" else y.transpose(0, 1)).reshape(-1)

    def rank(self) -> Tensor:
        """Return ``[S]`` int64: 0 for a chosen sequence, 1 for a rejected one."""
        pairs = self.groups.count // self.size
        return self.join(
            torch.arange(self.size, device=self.keep.device)[:, None].expand(self.size, pairs)
        )

    def position(self) -> Tensor:
        """Return ``[N]``: the 1-based position of each token in its sequence. The
        sequences must be consecutive.
        """
        seen = self.keep.long().cumsum(0)
        lengths = self.groups.sum(self.keep.long())
        return seen - self.spread(lengths.cumsum(0) - lengths)


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected sequence of every pair. All fields are ``[P]``.

    ``logps`` are summed as the score sums the tokens. ``sums`` are the plain sums.
    """

    logps: Tensor
    sums: Tensor
    lengths: Tensor
    scores: Tensor
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """Return ``log π(y) - log π_ref(y)``."""
        assert self.ref_logps is not None
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> Tensor:
        """Return the log-prob per token. It is 0 for an empty sequence."""
        return self.sums / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """The data that a pair loss or weight reads.

    It has two sides (more for lists), and the caller's inputs per pair, ``[P]``.
    """

    beta: Number
    sides: tuple[Side, ...]
    keep: Tensor  # [P] bool
    sequences: Sequences
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def chosen(self) -> Side:
        return self.sides[0]

    @property
    def rejected(self) -> Side:
        return self.sides[1]

    @property
    def margins(self) -> Tensor:
        """Return the chosen score minus the rejected score, before β."""
        return self.chosen.scores - self.rejected.scores

    def per_side(self, y: Tensor) -> tuple[Tensor, ...]:
        """Split ``[S]`` into one ``[P]`` per side."""
        return tuple(self.sequences.split(y).unbind())


def from_first_difference(
    completion_ids: Tensor, completion_mask: Tensor | None = None, *, pairs: str = "halves"
) -> Tensor:
    """Return a ``[B, T]`` bool mask of the tokens from the first column on in which the
    two sequences of a pair differ.

    It is a subset of ``completion_mask``. Steps of a search tree share a prefix, and
    only what follows it says anything about the preference. ``B`` is even, and
    ``pairs`` is as in :func:`preference_loss`. A pair that does not differ has no token
    left.

    >>> import torch, reweight_ops as rw
    >>> rw.preference.from_first_difference(torch.tensor([[5, 6, 7], [5, 8, 7]])).int()
    tensor([[0, 1, 1],
            [0, 1, 1]], dtype=torch.int32)
    """
    if completion_ids.dim() != 2 or completion_ids.size(0) % 2 or pairs not in LAYOUTS:
        raise InvalidCall(
            f"from_first_difference: completion_ids is {tuple(completion_ids.shape)}, pairs "
            f"{pairs!r}; expected [2·P, T] and one of {LAYOUTS}."
        )
    keep = completion_ids != -100
    if completion_mask is not None:
        keep = keep & (completion_mask != 0)
    ids = torch.where(keep, completion_ids, -100)
    columns = ids.size(1)
    count = ids.size(0) // 2
    both = (
        ids.view(2, count, columns)
        if pairs == "halves"
        else ids.view(count, 2, columns).transpose(0, 1)
    )
    started = ((both[0] != both[1]).cumsum(-1) > 0)[None].expand_as(both)
    started = (started if pairs == "halves" else started.transpose(0, 1)).reshape(ids.shape)
    return keep & started
