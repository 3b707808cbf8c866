"""Reductions. Each turns masks into one weight per row, so that the loss is
``sum_i w_i * l_i``.

No kernel knows any reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..formula.base import TokenWeight
from ..ranges import Count, Positive, ranged
from ..rows.primitives import Coupling, Masked, Runs, Weighing
from ..rows.rows import Rows
from .parts import require_part


@dataclass(frozen=True)
class Divisors:
    """The caller's knowledge of the whole batch: the *final* divisors of this call's
    sum (numbers or 0-d tensors).
    """

    num_items_in_batch: float | Tensor | None = None
    num_sequences_in_batch: float | Tensor | None = None


class Reduction:
    """The base of all reductions. They are frozen dataclasses."""

    #: The divisors that this reduction reads. To give the other one is an error, since
    #: it would have no effect.
    reads: ClassVar[tuple[str, ...]] = ()
    #: Whether the result is one number.
    scalar: ClassVar[bool] = True
    #: The token weight from which the row weights are made, if any.
    weight: TokenWeight | None = None
    #: Hyper-parameters that a gradient does not reach.
    detaches: ClassVar[tuple[str, ...]] = ()
    #: Further leaves and per-call data that it reads.
    requires: ClassVar[tuple[str, ...]] = ()
    #: Whether the loss is not a fixed linear combination of the token losses.
    #: :meth:`contributions` then defines it (always two_pass).
    coupled: ClassVar[bool] = False

    def check(self, rows: Rows) -> None:
        """Raise if the call's rows lack what this reduction needs, before anything is
        computed.
        """

    @property
    def reads_groups(self) -> bool:
        """Return whether the reduction reads the call's ``group_ids``."""
        return False

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        """Return the row weights as a backend's kernel forms them, or None if only
        :meth:`row_weights` can.

        The caller says where the values of the token weight are, if there is one.
        """
        return None

    def masked(self, rows: Rows) -> Masked:
        """Return the rows of a :meth:`weighing` in its sequences: those of the call by
        default.
        """
        assert rows.masked is not None
        return rows.masked

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        """Return ``[N]`` in the row dtype. It is 0 in an ignored row."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no row_weights(self, rows, divisors, weight)"
        )

    def contributions(self, rows: Rows, weighted: Tensor, adv: Tensor | None) -> Tensor:
        """Return ``[N]`` whose sum is the term's loss, from the weighted token losses
        ``[N]``.

        Only a coupled reduction has contributions. They are exact under autograd.
        """
        old = " (it has shares(), the old name)" if hasattr(self, "shares") else ""
        raise NotImplementedError(
            f"{type(self).__name__} defines no contributions(self, rows, weighted, adv){old}"
        )

    def coupling(self, rows: Rows) -> Coupling | None:
        """Return the contributions as a backend's kernel forms them, or None if only
        :meth:`contributions` can.
        """
        return None


def _need_weight(reduction: Reduction) -> None:
    if reduction.weight is not None:
        require_part(type(reduction).__name__, "weight", reduction.weight, TokenWeight)


def _can_measure(rows: Rows) -> bool:
    return rows.primitives is not None and rows.primitives.measure is not None


def _joined(masked: Masked, size: int) -> Masked:
    """Return the rows with one sequence for every ``size`` consecutive ones."""
    runs = masked.runs
    return masked._replace(
        lengths=masked.lengths.view(2, -1, size).sum(-1, dtype=torch.int32),
        runs=Runs(
            runs.rows,
            runs.sequences // size,
            runs.length * size,
            None if runs.offsets is None else runs.offsets[::size],
            None if runs.owner is None else runs.owner // size,  # of none: S, so S / size
        ),
    )


def _over(numerator: Tensor, divisor: Any) -> Tensor:
    result: Tensor = numerator / divisor
    return result


@ranged
@dataclass(frozen=True)
class TokenMean(Reduction):
    """``sum(l) / num_items_in_batch``. Without that number, the count of the
    denominator mask is the divisor.

    With ``per_call=True`` the divisor is always this call's own count (TRL's entropy
    bonus). With ``weight`` it is the mean over the tokens that a token weight selects,
    ``sum(u*l) / max(sum(u), 1)`` (TRL's entropy bonus under a top-entropy mask), always
    of this call.
    """

    per_call: bool = False
    weight: TokenWeight | None = None

    reads = ("num_items_in_batch",)

    def __post_init__(self) -> None:
        _need_weight(self)

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        if self.weight is not None:
            return Weighing("rows") if _can_measure(rows) else None
        given = None if self.per_call else divisors.num_items_in_batch
        return Weighing("rows" if given is None else given)

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        keep = rows.keep.to(rows.dtype)
        if weight is not None:
            keep = torch.where(rows.keep, weight, 0)
            return _over(keep, rows.total(keep).clamp(min=1))
        if divisors.num_items_in_batch is not None and not self.per_call:
            return _over(keep, divisors.num_items_in_batch)
        return _over(keep, rows.total(rows.denominator).clamp(min=1))


@dataclass(frozen=True)
class TokenSum(Reduction):
    """``sum(l)``."""

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        return Weighing()

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        return rows.keep.to(rows.dtype)


@ranged
@dataclass(frozen=True)
class SequenceMean(Reduction):
    """The mean over sequences of a number per sequence.

    ``per`` selects the number: the token mean, the token sum, or the token sum over a
    ``"constant"`` horizon.

    ``horizon=None`` is the padded length (verl's default). TRL's Dr. GRPO uses
    ``max_completion_length``. The mean is over ``num_sequences_in_batch`` if given, and
    else over all sequences (TRL) or the non-empty ones (verl), by ``count``.

    With ``weight`` the number is over the tokens that a token weight selects. The
    length of a sequence is then its sum of weights, and the mean is over the sequences
    with a nonzero sum.
    """

    per: str = "token_mean"
    horizon: Positive[float] | None = None
    count: str = "all"
    weight: TokenWeight | None = None

    reads = ("num_sequences_in_batch",)

    def __post_init__(self) -> None:
        if self.per not in ("token_mean", "token_sum", "constant"):
            raise InvalidCall(
                f"SequenceMean: per is {self.per!r}, expected 'token_mean', 'token_sum' or "
                "'constant'."
            )
        if self.count not in ("all", "nonempty"):
            raise InvalidCall(
                f"SequenceMean: count is {self.count!r}, expected 'all' or 'nonempty'."
            )
        if self.horizon is not None and self.per != "constant":
            raise InvalidCall(
                f"SequenceMean: horizon has no effect with per={self.per!r}; it belongs to "
                "per='constant'."
            )
        _need_weight(self)

    def check(self, rows: Rows) -> None:
        sequences = rows.need_sequences("SequenceMean")
        if self.per == "constant" and self.horizon is None and sequences.index is not None:
            raise rows.error(
                "SequenceMean(per='constant') over packed sequences has no padded length: "
                "give horizon."
            )

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        if self.weight is not None and not _can_measure(rows):
            return None
        sequences = rows.need_sequences("SequenceMean")
        given: Literal["rows", "sequences"] | float | Tensor | None = (
            divisors.num_sequences_in_batch
        )
        if given is None:
            every = self.count == "all" and self.weight is None
            given = max(sequences.count, 1) if every else "sequences"
        horizon = (
            (sequences.length if self.horizon is None else self.horizon)
            if self.per == "constant"
            else None
        )
        return Weighing(given, self.per == "token_mean", horizon)

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        sequences = rows.need_sequences("SequenceMean")
        keep = rows.keep.to(rows.dtype)
        lengths = sequences.count_rows(rows.denominator, rows.dtype)
        if weight is not None:
            keep = torch.where(rows.keep, weight, 0)
            lengths = sequences.sum(keep)
        if divisors.num_sequences_in_batch is not None:
            keep = _over(keep, divisors.num_sequences_in_batch)
        elif self.count == "all" and weight is None:
            keep = _over(keep, max(sequences.count, 1))
        else:
            keep = _over(keep, (lengths > 0).sum().clamp(min=1))
        if self.per == "token_mean":
            return sequences.divide(
                keep,
                lengths.clamp(min=1) if weight is None else torch.where(lengths > 0, lengths, 1),
            )
        if self.per == "constant":
            horizon = rows.padded_length(sequences) if self.horizon is None else self.horizon
            return _over(keep, horizon)
        return keep


@ranged
@dataclass(frozen=True)
class PromptMean(Reduction):
    """The mean over prompts of the mean over all tokens of a prompt's responses
    (ScaleRL's prompt average, arXiv:2510.13786).

    Prompts are runs of ``group_size`` sequences, or the call's ``group_ids``. A prompt
    without a token in the call does not count.
    """

    group_size: Count[int] | None = None

    @property
    def reads_groups(self) -> bool:
        return self.group_size is None

    def check(self, rows: Rows) -> None:
        rows.need_prompts("PromptMean", self.group_size)

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        known = self.group_size is not None or rows.by_prompt is not None
        return Weighing("sequences", True) if known else None

    def masked(self, rows: Rows) -> Masked:
        if self.group_size is None:
            assert rows.by_prompt is not None
            return rows.by_prompt
        assert rows.masked is not None
        return _joined(rows.masked, self.group_size)

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        sequences = rows.need_sequences("PromptMean")
        prompts = rows.need_prompts("PromptMean", self.group_size)
        sizes = prompts.sum(sequences.count_rows(rows.denominator, rows.dtype))
        per_sequence = prompts.divide(
            torch.ones(sequences.count, dtype=rows.dtype, device=rows.device),
            sizes.clamp(min=1) * (sizes > 0).sum().clamp(min=1),
        )
        return torch.where(rows.keep, sequences.spread(per_sequence), 0)


@dataclass(frozen=True)
class FromFunction(Reduction):
    """Any linear reducer of a trainer: ``fn(per_token_loss, mask) -> scalar``. Both
    arguments have the rows' shape.

    Its weights are its gradient, from one autograd call. A function that is not linear
    in the loss gives wrong weights.
    """

    fn: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise InvalidCall(
                f"FromFunction: fn is {self.fn!r}, expected a function of (per_token_loss, mask)."
            )

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        rows.refuse_across("FromFunction", "sees only this rank's rows.")
        with torch.enable_grad():
            probe = torch.zeros(
                rows.shape, dtype=rows.dtype, device=rows.device, requires_grad=True
            )
            total = self.fn(probe, rows.unflatten(rows.keep.to(rows.dtype)))
            if total.dim() != 0:
                raise rows.error(
                    f"FromFunction: fn returned shape {tuple(total.shape)}, expected one number."
                )
            (weights,) = torch.autograd.grad(total, probe)
        return torch.where(rows.keep, weights.reshape(-1), 0)


@dataclass(frozen=True)
class NoReduction(Reduction):
    """No reduction. The loss has the rows' shape and takes a per-row upstream gradient
    (always two_pass).
    """

    scalar = False

    def weighing(self, rows: Rows, divisors: Divisors) -> Weighing | None:
        return Weighing()

    def row_weights(self, rows: Rows, divisors: Divisors, weight: Tensor | None = None) -> Tensor:
        return rows.keep.to(rows.dtype)
