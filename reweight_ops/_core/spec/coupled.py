"""Reductions that couple tokens. The loss is not a fixed weighted sum of token losses,
so it needs the statistics of the whole call (two_pass).

Each reduction turns a term's weighted token losses into per-row shares. Their sum is
the term's loss. The shares are differentiable torch on ``[N]`` vectors: autograd gives
the gradient, or a backend's kernels in closed form. Every metric, ``loss_scale`` and
backward works as for any other reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..ranges import Count, NonNegative, Number, Positive, PositiveOrInf, Real, ranged
from ..rows.constants import is_infinite
from ..rows.groups import Groups
from ..rows.primitives import Coupling, Masked, Weighing
from ..rows.rows import Rows
from .reduction import Divisors, Reduction, TokenMean


def _kernel_takes(*numbers: Any) -> bool:
    """Return whether numbers are those of the call, and have no gradient."""
    return not any(isinstance(x, Tensor) and (x.dim() or x.requires_grad) for x in numbers)


@dataclass(frozen=True)
class _Sides:
    """The sequences of a call as a reduction compares them, ``[S]`` each.

    ``advantages`` are sums over the kept rows. Only prompts with ``positive`` and
    ``negative`` sequences have any. ``prompts_present`` counts those with a row in the
    call, at least 1.
    """

    sequences: Groups
    prompts: Groups
    lengths: Tensor
    present: Tensor
    advantages: Tensor
    positive: Tensor
    negative: Tensor
    prompts_present: Tensor

    def spread(self, rows: Rows, per_sequence: Tensor) -> Tensor:
        """Return ``[N]``: the share of each row in its sequence's part of the loss. It
        is NaN where an advantage is.
        """
        known = torch.where(self.advantages.isnan(), math.nan, per_sequence)
        share = self.sequences.spread(known / self.lengths.clamp(min=1)) / self.prompts_present
        return torch.where(rows.keep, share, 0)


class _OfPrompts(Reduction):
    """A reduction that compares the sequences of each prompt, by the means of their
    token losses and the signs of their advantages.
    """

    group_size: int | None

    requires = ("adv",)
    coupled = True

    @property
    def reads_groups(self) -> bool:
        return self.group_size is None

    def check(self, rows: Rows) -> None:
        rows.need_prompts(type(self).__name__, self.group_size)

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        known = type(self) in (GroupContrast, GroupClassification)  # not a user's
        return Weighing(per_length=True) if known else None

    def masked(self, rows: Rows) -> Masked:
        masked = rows.masked
        assert masked is not None
        if masked.counted is masked.keep:
            return masked
        return masked._replace(lengths=masked.lengths[:1].repeat(2, 1))

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        sequences = rows.need_sequences(type(self).__name__)
        keep = rows.keep.to(rows.dtype)
        return keep / sequences.spread(sequences.sum(keep)).clamp(min=1)

    def _sides(self, rows: Rows, adv: Tensor | None) -> _Sides:
        name = type(self).__name__
        assert adv is not None, f"{name} requires 'adv'"
        sequences = rows.need_sequences(name)
        prompts = rows.need_prompts(name, self.group_size)
        lengths = sequences.sum(rows.keep.to(rows.dtype))
        present = lengths > 0
        advantages = sequences.sum(torch.where(rows.keep, adv, 0))
        positive = present & (advantages > 0)
        negative = present & ~positive
        positives, negatives = (prompts.count_rows(x, rows.dtype) for x in (positive, negative))
        # A prompt of one side adds 0 and has no gradient, whatever its scores are.
        both = prompts.spread((positives > 0) & (negatives > 0))
        count = (positives + negatives > 0).sum().clamp(min=1)
        return _Sides(
            sequences,
            prompts,
            lengths,
            present,
            advantages,
            both & positive,
            both & negative,
            count,
        )


@ranged
@dataclass(frozen=True)
class GroupContrast(_OfPrompts):
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

    def coupling(self, rows: Rows) -> Coupling | None:
        by = self._longest(rows) if self.preference == "length" else 1.0
        numbers = (self.temperature, by * self.length_temperature)
        if type(self) is not GroupContrast or not _kernel_takes(*numbers):
            return None
        alike, hard = is_infinite(self.length_temperature), is_infinite(self.temperature)
        prompts = rows.need_prompts("GroupContrast", self.group_size)
        prefers = None if alike else self.preference
        return Coupling("contrast", numbers, prompts, prefers, hard)

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        sides = self._sides(rows, adv)
        prompts, positive, negative = sides.prompts, sides.positive, sides.negative
        scores = -sides.sequences.sum(weighted)
        if is_infinite(self.length_temperature):
            omega = torch.ones_like(scores)
        else:
            preferred = (
                -sides.lengths / self._longest(rows)
                if self.preference == "length"
                else sides.advantages / sides.lengths.clamp(min=1)
            )
            # The prompt's largest value is subtracted. It cancels in the normalisation,
            # no exp overflows, and equal values have exactly equal weights.
            preferred = torch.where(positive, preferred / self.length_temperature, -math.inf)
            least = preferred - _largest(prompts, preferred)
            omega = torch.exp(torch.where(positive, least, 0))
        total = prompts.spread(prompts.sum(torch.where(positive, omega, 0))).clamp(min=1)
        # another sequence's share is not NaN, although the prompt's total may be
        gain = torch.where(positive, omega / total, 0) * scores
        loss = self._soft_maximum(prompts, scores, negative) / _counts(prompts, negative)
        return sides.spread(rows, torch.where(positive, -gain, 0) + torch.where(negative, loss, 0))

    def _longest(self, rows: Rows) -> float | Tensor:
        """Return the length that counts as 1, or 1 where lengths do not matter."""
        if is_infinite(self.length_temperature):
            return 1.0
        if self.max_length is not None:
            return self.max_length
        sequences = rows.need_sequences("GroupContrast")
        if sequences.index is not None:
            raise rows.error(
                "GroupContrast over packed sequences has no padded length: give max_length."
            )
        return rows.padded_length(sequences)

    def _soft_maximum(self, prompts: Groups, scores: Tensor, negative: Tensor) -> Tensor:
        """Return ``[S]``: each sequence gets its prompt's ``τ·logmeanexp(s_j/τ)`` over
        the negatives, or 0 without any.
        """
        counts = _counts(prompts, negative)
        if is_infinite(self.temperature):
            return prompts.spread(prompts.sum(torch.where(negative, scores, 0))) / counts
        scaled = torch.where(negative, scores / self.temperature, -math.inf)
        top = _largest(prompts, scaled)
        inside = torch.exp(torch.where(negative, scaled - top, 0))
        mean = prompts.spread(prompts.sum(torch.where(negative, inside, 0))) / counts
        mean = torch.where(negative, mean, 1)
        result: Tensor = self.temperature * (mean.log() + top)
        return result


def _counts(prompts: Groups, side: Tensor) -> Tensor:
    """Return ``[S]``: how many sequences of a side its prompt has, at least 1."""
    return prompts.spread(prompts.count_rows(side, torch.int64)).clamp(min=1)


def _largest(prompts: Groups, x: Tensor) -> Tensor:
    """Return ``[S]``: the largest ``x`` of the prompt, or 0 if it is ``-inf`` or NaN.

    It has no gradient.
    """
    top = prompts.spread(prompts.max(x.detach()))
    return torch.where(top > -math.inf, top, 0)


@ranged
@dataclass(frozen=True)
class GroupClassification(_OfPrompts):
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

    def coupling(self, rows: Rows) -> Coupling | None:
        if type(self) is not GroupClassification or not _kernel_takes(self.temperature):
            return None
        prompts = rows.need_prompts("GroupClassification", self.group_size)
        return Coupling("classification", (self.temperature, 1.0), prompts)

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        sides = self._sides(rows, adv)
        prompts, scaled = sides.prompts, -sides.sequences.sum(weighted) / self.temperature
        total = self._log_one_plus(prompts, sides.negative, scaled)
        total = total + self._log_one_plus(prompts, sides.positive, -scaled)
        # A prompt's loss is split equally among its sequences.
        total = total / prompts.count_rows(sides.present, rows.dtype).clamp(min=1)
        return sides.spread(rows, prompts.spread(total))

    def _log_one_plus(self, prompts: Groups, side: Tensor, x: Tensor) -> Tensor:
        """Return ``[P]``: ``log(1 + Σ exp(x))`` over the sequences of a side."""
        top = prompts.max(torch.where(side, x.detach(), 0)).clamp(min=0)
        inside = torch.exp(torch.where(side, x - prompts.spread(top), 0))
        inside = torch.where(side, inside, 0)
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

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        return Weighing("rows") if type(self) is HingeConstraint else None

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        return TokenMean(per_call=True).row_weights(rows, divisors)

    def coupling(self, rows: Rows) -> Coupling | None:
        numbers = (self.strength, self.bound)
        known = type(self) is HingeConstraint and _kernel_takes(*numbers)
        return Coupling("hinge", numbers) if known else None

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        result: Tensor = weighted * (
            self.strength * (rows.total(weighted.detach()) - self.bound).clamp(min=0)
        )
        return result


__all__ = ["GroupClassification", "GroupContrast", "HingeConstraint"]
