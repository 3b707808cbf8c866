"""Reductions that couple tokens. The loss is not a fixed weighted sum of token losses,
so it needs the statistics of the whole call (two_pass).

Each reduction turns a term's weighted token losses into per-row shares. Their sum is
the term's loss. The shares are differentiable torch on ``[N]`` vectors: autograd gives
the gradient, and every metric, ``loss_scale`` and backward works as for any other
reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..ranges import Count, NonNegative, Number, Positive, PositiveOrInf, Real, ranged
from ..rows.constants import is_infinite
from ..rows.groups import Groups
from ..rows.rows import Rows
from .reduction import Divisors, Reduction, TokenMean


@ranged
@dataclass(frozen=True)
class GroupContrast(Reduction):
    """Contrast the positive with the negative sequences of each prompt, by their scores
    ``s_i``.

    A score is minus the mean of the token loss over the valid tokens. ::

        loss = -1/Q Σ_q { Σ_{i in q+} ω_i·s_i / Σ_{i in q+} ω_i
                          - τ·log( 1/|q-| Σ_{j in q-} exp(s_j/τ) ) }

    ``q+`` are the sequences of prompt q with an advantage (label, reward) above 0, and
    ``q-`` the others. ``ω_i = exp((1 - L_i/L_max)/λ)`` prefers short positives. A
    prompt that has only positives, or only negatives, adds 0. It counts in Q, the
    number of prompts with a token in the call. An advantage of NaN makes the loss NaN.

    With ``preference="advantages"``, ``ω_i = exp(A_i/λ)``, where A are the positives'
    own advantages (rewards). ``temperature=inf`` gives the plain mean over the
    negatives. ``length_temperature=inf``, the λ of either preference, gives ω = 1.
    ``max_length=None`` is the padded length. Prompts are runs of ``group_size``
    sequences, or the call's ``group_ids``. Every response of a prompt must be in the
    call.
    """

    temperature: PositiveOrInf[Number] = 10.0
    length_temperature: PositiveOrInf[Number] = math.inf
    max_length: Positive[float] | None = None
    group_size: Count[int] | None = None
    preference: str = "length"

    requires = ("adv",)
    coupled = True

    def __post_init__(self) -> None:
        if self.preference not in ("length", "advantages"):
            raise InvalidCall(
                f"GroupContrast: preference is {self.preference!r}, expected 'length' or "
                "'advantages'."
            )
        if self.preference == "advantages" and self.max_length is not None:
            raise InvalidCall(
                "GroupContrast: max_length has no effect with preference='advantages'."
            )

    @property
    def reads_groups(self) -> bool:
        return self.group_size is None

    def check(self, rows: Rows) -> None:
        rows.need_prompts("GroupContrast", self.group_size)

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        sequences = rows.need_sequences("GroupContrast")
        keep = rows.keep.to(rows.dtype)
        return keep / sequences.spread(sequences.sum(keep)).clamp(min=1)

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        assert adv is not None, "GroupContrast requires 'adv'"
        sequences = rows.need_sequences("GroupContrast")
        prompts = rows.need_prompts("GroupContrast", self.group_size)
        lengths = sequences.sum(rows.keep.to(rows.dtype))
        present = lengths > 0
        total = sequences.sum(torch.where(rows.keep, adv, 0))
        positive = present & (total > 0)
        negative = present & ~positive
        positives, negatives = (prompts.sum(x.to(rows.dtype)) for x in (positive, negative))
        # A prompt of one side adds 0 and has no gradient, whatever its scores are.
        both = prompts.spread((positives > 0) & (negatives > 0))
        positive, negative = both & positive, both & negative
        scores = -sequences.sum(weighted)
        count = (prompts.sum(present.to(rows.dtype)) > 0).sum().clamp(min=1)

        if self.preference == "length":
            omega = self._omega(rows, sequences, lengths)
        else:
            # The prompt's largest value is subtracted. It cancels in the normalisation,
            # and no exp overflows.
            preferred = (
                torch.where(positive, total / lengths.clamp(min=1), -math.inf)
                / self.length_temperature
            )
            top = prompts.spread(prompts.max(preferred))
            omega = torch.exp(
                torch.where(positive, preferred - torch.where(top > -math.inf, top, 0), 0)
            )
        omega = torch.where(positive, omega, 0)
        gain = (
            omega
            / prompts.spread(prompts.sum(omega)).clamp(min=torch.finfo(rows.dtype).tiny)
            * scores
        )
        loss = self._soft_maximum(prompts, scores, negative) / prompts.spread(negatives).clamp(
            min=1
        )
        per_sequence = torch.where(positive, -gain, 0) + torch.where(negative, loss, 0)
        per_sequence = torch.where(total.isnan(), math.nan, per_sequence)
        spread = sequences.spread(per_sequence / lengths.clamp(min=1)) / count
        return torch.where(rows.keep, spread, 0)

    def _omega(self, rows: Rows, sequences: Groups, lengths: Tensor) -> Tensor:
        if is_infinite(self.length_temperature):
            return torch.ones_like(lengths)
        longest: float | Tensor | None = self.max_length
        if longest is None:
            if sequences.index is not None:
                raise rows.error(
                    "GroupContrast over packed sequences has no padded length: give max_length."
                )
            longest = rows.padded_length(sequences)
        # The constant 1/λ cancels in the normalisation. Without it no exp overflows,
        # and equal lengths have exactly equal weights.
        return torch.exp(-lengths / (longest * self.length_temperature))

    def _soft_maximum(self, prompts: Groups, scores: Tensor, negative: Tensor) -> Tensor:
        """Return ``[S]``: each sequence gets its prompt's ``τ·logmeanexp(s_j/τ)`` over
        the negatives, or 0 without any.
        """
        counts = prompts.sum(negative.to(scores.dtype))
        if is_infinite(self.temperature):
            return prompts.spread(
                prompts.sum(torch.where(negative, scores, 0)) / counts.clamp(min=1)
            )
        scaled = torch.where(negative, scores, -math.inf) / self.temperature
        top = prompts.spread(prompts.max(scaled.detach()))
        top = torch.where(top > -math.inf, top, 0)
        total = prompts.sum(
            torch.where(negative, torch.exp(torch.where(negative, scaled, 0) - top), 0)
        )
        mean = torch.where(counts > 0, total / counts.clamp(min=1), 1)
        result: Tensor = self.temperature * (prompts.spread(mean.log()) + top)
        return result


@ranged
@dataclass(frozen=True)
class GroupClassification(Reduction):
    """Classify each prompt's sequences into positive and negative ones, by their scores
    ``s_i``.

    A score is minus the mean of the token loss. ::

        loss = 1/Q Σ_q { log(1 + Σ_{j in q-} exp(s_j/τ))
                         + log(1 + Σ_{i in q+} exp(-s_i/τ)) }

    ``q+`` are the sequences of prompt q with a mean advantage (label, reward) above 0.
    A prompt that has only positives, or only negatives, adds 0. It counts in Q, the
    number of prompts with a token in the call. An advantage of NaN makes the loss NaN.
    Prompts are as in :class:`GroupContrast`. REAL, arXiv:2602.05630.
    """

    temperature: Positive[Number] = 0.5
    group_size: Count[int] | None = None

    requires = ("adv",)
    coupled = True

    @property
    def reads_groups(self) -> bool:
        return self.group_size is None

    def check(self, rows: Rows) -> None:
        rows.need_prompts("GroupClassification", self.group_size)

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        sequences = rows.need_sequences("GroupClassification")
        keep = rows.keep.to(rows.dtype)
        return keep / sequences.spread(sequences.sum(keep)).clamp(min=1)

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        assert adv is not None, "GroupClassification requires 'adv'"
        sequences = rows.need_sequences("GroupClassification")
        prompts = rows.need_prompts("GroupClassification", self.group_size)
        lengths = sequences.sum(rows.keep.to(rows.dtype))
        present = lengths > 0
        advantages = sequences.sum(torch.where(rows.keep, adv, 0))
        positive = present & (advantages > 0)
        negative = present & ~positive
        positives, negatives = (prompts.sum(x.to(rows.dtype)) for x in (positive, negative))
        # A prompt of one side adds 0 and has no gradient, whatever its scores are.
        both = prompts.spread((positives > 0) & (negatives > 0))
        scaled = -sequences.sum(weighted) / self.temperature
        total = self._log_one_plus(prompts, both & negative, scaled)
        total = total + self._log_one_plus(prompts, both & positive, -scaled)
        count = (prompts.sum(present.to(rows.dtype)) > 0).sum().clamp(min=1)
        # A prompt's loss is split equally among its sequences, and a sequence's share
        # among its tokens.
        share = total / prompts.sum(present.to(rows.dtype)).clamp(min=1) / count
        per_sequence = prompts.spread(share) / lengths.clamp(min=1)
        per_sequence = torch.where(advantages.isnan(), math.nan, per_sequence)
        return torch.where(rows.keep, sequences.spread(per_sequence), 0)

    def _log_one_plus(self, prompts: Groups, side: Tensor, x: Tensor) -> Tensor:
        """Return ``[P]``: ``log(1 + Σ exp(x))`` over the sequences of a side."""
        top = prompts.max(torch.where(side, x.detach(), 0)).clamp(min=0)
        inside = torch.where(side, torch.exp(torch.where(side, x, 0) - prompts.spread(top)), 0)
        result: Tensor = top + torch.log(torch.exp(-top) + prompts.sum(inside))
        return result


@ranged
@dataclass(frozen=True)
class HingeConstraint(Reduction):
    """A squared-hinge constraint on the mean: ``sg(strength·max(K - bound, 0))·K``,
    with ``K`` the term's token mean over this call.

    Its gradient is that of ``strength/2·max(K - bound, 0)²``. It is 0 while ``K`` is
    below the bound.
    """

    strength: NonNegative[Number] = 1000.0
    bound: Real[Number] = 1e-4

    coupled = True
    detaches = ("strength", "bound")

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        return TokenMean(per_call=True).row_weights(rows, divisors)

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        result: Tensor = weighted * (
            self.strength * (rows.total(weighted.detach()) - self.bound).clamp(min=0)
        )
        return result


__all__ = ["GroupClassification", "GroupContrast", "HingeConstraint"]
