"""The spec of a pair method: a score, terms, weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ...errors import InvalidCall
from ..compiler import constant_result
from ..ranges import Interval, Number, Positive, Real, ranged
from .compiled import describe, rebuild, set_default
from .learnt import refuse, tensors_of
from .pair_parts import PairLoss, PairPart, PairWeight, Score
from .pair_score import LogRatio
from .parts import require_name, require_part, require_tuple

#: Where the classes of its parts are.
_WHERE = "rw.preference"

TOKENS = ("completion", "from_first_difference")


@ranged
@dataclass(frozen=True, kw_only=True)
class PairTerm:
    """``coef · loss``."""

    loss: PairLoss
    coef: Real[Number] = 1.0

    def __post_init__(self) -> None:
        require_part("PairTerm", "loss", self.loss, PairLoss, _WHERE)


@ranged
@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """``L = loss_scale · mean_i w_i · Σ_k coef_k · ℓ_k(pair i)``.

    ``score`` says how tokens become a sequence's score; the default is ``LogRatio()``.
    ``beta`` times a score is its implicit reward. ``terms`` are the losses ℓ. The
    product of ``weights`` is the detached w. ``tokens="from_first_difference"`` uses
    only the tokens from the first column on in which a pair differs. ``group_size`` is
    the number of sequences per pair: 2, or more for lists (best first).
    Hyper-parameters are numbers or 0-d tensors (a schedule).
    """

    terms: tuple[PairTerm, ...]
    beta: Positive[Number] = 0.1
    score: Score = None  # type: ignore[assignment]  # LogRatio()
    weights: tuple[PairWeight, ...] = ()
    tokens: str = "completion"
    group_size: Annotated[int, Interval("[2, inf)", whole=True)] = 2
    name: str | None = None

    def __post_init__(self) -> None:
        set_default(self, "score", LogRatio)
        require_name("PairSpec", self.name)
        for field in ("terms", "weights"):
            require_tuple("PairSpec", field, getattr(self, field))
        if not self.terms or any(not isinstance(t, PairTerm) for t in self.terms):
            raise InvalidCall(
                f"PairSpec: terms is {self.terms!r}, expected at least one PairTerm. Write "
                f"{_WHERE}.PairTerm(loss=..., coef=...)."
            )
        require_part("PairSpec", "score", self.score, Score, _WHERE)
        for w in self.weights:
            require_part("PairSpec", "weights", w, PairWeight, _WHERE, "holds")
        if torch.compiler.is_compiling():
            _refuse_learnt_in(describe(self.weights))
        else:
            _refuse_learnt(self.weights)
        if self.tokens not in TOKENS:
            raise InvalidCall(
                f"PairSpec: tokens is {self.tokens!r}, expected one of {', '.join(TOKENS)}."
            )

    @property
    def parts(self) -> tuple[PairPart, ...]:
        return (self.score, *(t.loss for t in self.terms), *self.weights)

    @property
    def requires(self) -> frozenset[str]:
        """Return what the parts need from the caller, by
        :data:`~reweight_ops._core.calls.pairs.NEEDS`.
        """
        return frozenset(need for part in self.parts for need in part.needs())

    def replace(self, **fields: Any) -> PairSpec:
        """Return a copy with other fields."""
        return dataclasses.replace(self, **fields)

    def with_term(self, loss: PairLoss, coef: Real[Number] = 1.0) -> PairSpec:
        """Return a copy with one more term."""
        return dataclasses.replace(self, terms=(*self.terms, PairTerm(loss=loss, coef=coef)))

    def with_weight(self, weight: PairWeight) -> PairSpec:
        """Return a copy with one more weight."""
        return dataclasses.replace(self, weights=(*self.weights, weight))


def _refuse_learnt(weights: tuple[PairWeight, ...]) -> None:
    refuse("PairSpec", tensors_of(weights, "weights"), "weights are detached")


@constant_result
def _refuse_learnt_in(described: Any) -> None:
    _refuse_learnt(rebuild(described))
