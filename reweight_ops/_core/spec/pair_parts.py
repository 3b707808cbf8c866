"""The kinds of parts that a :class:`PairSpec` is made of. Each is a frozen record with one formula, written on ``[P]`` vectors in torch;
autograd differentiates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..rows.pairs import Pairs, Sequences


@dataclass(frozen=True, kw_only=True)
class PairPart:
    """``reads``: what a part needs from the caller, by :data:`~reweight_ops._core.calls.pairs.NEEDS`."""

    reads: ClassVar[tuple[str, ...]] = ()

    def needs(self) -> tuple[str, ...]:
        """:attr:`reads`, where it depends on the fields."""
        return self.reads


@dataclass(frozen=True, kw_only=True)
class Score(PairPart):
    """How the tokens of a sequence become its score; the score times β is its implicit reward."""

    def sums(self, s: Sequences, name: str) -> Tensor:
        """``[S]``: the sequence's log-prob of that name, summed as this score does."""
        return s.given[name] if name in s.given else s.sum(s.tokens[name])

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """``[S]``, from the sums."""
        raise NotImplementedError(f"{type(self).__name__} defines no scores(self, s, logps, ref_logps)")


@dataclass(frozen=True, kw_only=True)
class PairLoss(PairPart):
    """One term of the loss."""

    def loss(self, p: Pairs) -> Tensor:
        """``[P]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss(self, p)")


@dataclass(frozen=True, kw_only=True)
class PairWeight(PairPart):
    """A factor of the whole loss of a pair; it is detached where it is used."""

    def weight(self, p: Pairs) -> Tensor:
        """``[P]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no weight(self, p)")
