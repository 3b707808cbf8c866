"""The kinds of parts of a :class:`PairSpec`.

Each is a frozen record with one formula, written on ``[P]`` vectors in torch. Autograd
differentiates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..rows.pairs import Pairs, Sequences


@dataclass(frozen=True, kw_only=True)
class PairPart:
    """The base of all parts.

    ``reads`` has what a part needs from the caller, by
    :data:`~reweight_ops._core.calls.pairs.NEEDS`.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def needs(self) -> tuple[str, ...]:
        """Return :attr:`reads`. A part overrides this where its needs depend on its
        fields.
        """
        return self.reads


@dataclass(frozen=True, kw_only=True)
class Score(PairPart):
    """A score: how the tokens of a sequence become one number. β times the score is the
    implicit reward.
    """

    def sums(self, s: Sequences, name: str) -> Tensor:
        """Return ``[S]``: the sequence's log-prob of that name, summed as this score
        does.
        """
        return s.given[name] if name in s.given else s.sum(s.tokens[name])

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """Return the scores ``[S]`` from the sums."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no scores(self, s, logps, ref_logps)"
        )


@dataclass(frozen=True, kw_only=True)
class PairLoss(PairPart):
    """One term of the loss."""

    def loss(self, p: Pairs) -> Tensor:
        """``[P]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss(self, p)")


@dataclass(frozen=True, kw_only=True)
class PairWeight(PairPart):
    """A factor of the whole loss of a pair. It is detached where it is used."""

    def weight(self, p: Pairs) -> Tensor:
        """``[P]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no weight(self, p)")
