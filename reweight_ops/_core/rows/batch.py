"""The ``batch`` of a weight: statistics over the valid rows of this call, of each row's
sequence, or of each row's prompt.

A weight that uses it takes two passes. If several ranks have the sequences, the
statistics are over the rows of all ranks, in the order of ranks. A sum along a sequence
is then refused, because no rank knows the order of the tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..transforms import in_transform
from .groups import Groups
from .ordered import Ordered
from .primitives import RowPrimitives, Statistic, is_traced
from .rows import NO_ORDER, Rows


def _over_ranks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Evaluate a function that compares rows on those of all ranks, in the order of
    ranks.
    """

    @functools.wraps(function)
    def evaluated(self: BatchStatistics, x: Tensor, *more: Any) -> Tensor:
        across = self._rows.across
        if across is None:
            return function(self, x, *more)
        of_all, own = self._of_all_ranks(by_sequence=function.__name__ not in _OVER_THE_CALL)
        rows = [across.gather(y)[0] if isinstance(y, Tensor) and y.dim() else y for y in more]
        return function(of_all, across.gather(x.expand(self._rows.count))[0], *rows)[own]

    return evaluated


def _by_kernel(
    statistic: Statistic,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Evaluate a function by the backend's kernel of a statistic, where it has one.

    A function whose name begins with ``seq_`` is over each row's sequence.
    """

    def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        per_sequence = function.__name__.startswith("seq_")

        @functools.wraps(function)
        def evaluated(self: BatchStatistics, x: Any) -> Tensor:
            total = None if self._kernels is None else self._kernels.total
            values = None if total is None else self._stored(x)
            if total is None or values is None:
                return function(self, x)
            if per_sequence:
                self._sequences()
            assert self._rows.masked is not None
            return total(self._rows.masked, values, statistic, per_sequence, self._into)

        return evaluated

    return decorated


#: Functions that compare the rows of the call, whatever their sequences.
_OVER_THE_CALL = {"rank", "mean_below", "capped_mean"}


class BatchStatistics:
    """Statistics of values over the valid rows. The values are one per row, or one
    number.

    Nothing waits for the device, and masked rows may hold any value. There are three
    kinds:

    * over the call: ``sum mean min max quantile quantile_nearest top largest draw rank
      mean_below capped_mean``;
    * over each row's sequence, ``[N]``:
      ``seq_sum seq_mean seq_min seq_max seq_rank seq_quantile``, and along the sequence
      ``seq_cumsum seq_suffix_sum``;
    * over each row's prompt, given by the call's ``group_ids``:
      ``group_sum group_mean group_min group_max``.

    A place in an order has no gradient. Everything else has one. Where no gradient is
    asked for, a backend's kernels find sums, means and extrema, and write those of the
    call to ``[N]``, one for each row.
    ``batch.seq_cumsum(1.0)`` counts tokens.
    """

    #: Memory ``[N]`` for the result of a kernel, new by default.
    _into: Tensor | None = None

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def _kernels(self) -> RowPrimitives | None:
        """Return the backend's primitives for the call's rows, or None where PyTorch's
        operations are traced or transformed.
        """
        rows = self._rows
        if rows.masked is None or rows.dtype != torch.float32:
            return None
        return None if is_traced(rows.keep) or in_transform() else rows.primitives

    def _stored(self, x: Any) -> Tensor | float | None:
        """Return values as a kernel takes them, or None if it does not."""
        if isinstance(x, (int, float)):
            return float(x)
        rows = self._rows
        if x.dtype != rows.dtype or x.device != rows.device or _moves(x):
            return None
        values: Tensor = x.expand(rows.count).contiguous()
        return values

    def _only(self, x: Any, other: float, where: Tensor | None = None) -> Tensor:
        """Return ``x`` in the valid rows (with ``where``) and ``other`` in the rest."""
        x = (
            x
            if isinstance(x, Tensor)
            else torch.full((), x, dtype=self._rows.dtype, device=self._rows.device)
        )
        return torch.where(self._chosen(where), x, other)

    def _one_number(self, x: Any, what: str) -> None:
        if isinstance(x, Tensor) and x.dim() > 0:
            raise InvalidCall(
                f"{self._rows.op}: {what} has shape {tuple(x.shape)}, expected one number."
            )

    def _chosen(self, where: Tensor | None) -> Tensor:
        keep = self._rows.keep
        return keep if where is None else keep & where

    def _sequences(self) -> Groups:
        return self._rows.need_sequences("a weight that uses batch.seq_*")

    def _prompts(self) -> Groups:
        if self._rows.prompts is None:
            raise self._rows.error(
                "a weight that uses batch.group_* needs group_ids [S] with num_groups."
            )
        return self._rows.prompts

    @_by_kernel("sum")
    def sum(self, x: Any) -> Tensor:
        return self._rows.total(self._only(x, 0))

    @_by_kernel("mean")
    def mean(self, x: Any) -> Tensor:
        # The mean is in fp64, so that the mean of equal numbers is exactly that number.
        # What remains of them after the mean is subtracted is then 0, without the sign
        # of a rounding error.
        chosen = self._only(x, 0)
        return (
            self._rows.total(chosen.double()) / self._rows.total(self._rows.keep).clamp(min=1)
        ).to(chosen.dtype)

    def _ended(self, x: Tensor, other: float, where: Tensor | None = None) -> Tensor:
        """Return ``x`` in the valid rows (with ``where``), ``other`` in the rest, and
        one more ``other``.

        A batch without rows then has an extremum too.
        """
        own, across = self._only(x, other, where), self._rows.across
        return torch.cat(
            [own if across is None else across.gather(own)[0], x.new_full((1,), other)]
        )

    @_by_kernel("min")
    def min(self, x: Tensor) -> Tensor:
        return self._ended(x, math.inf).min()

    @_by_kernel("max")
    def max(self, x: Tensor) -> Tensor:
        return self._ended(x, -math.inf).max()

    def _order_statistics(
        self, x: Tensor, q: Any, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._one_number(q, "the place of a quantile of the call")
        ordered = self._ended(x, math.inf, where).sort().values
        return ordered, q * (self._rows.total(self._chosen(where)) - 1).clamp(min=0).to(x.dtype)

    def quantile(self, x: Tensor, q: Any, where: Tensor | None = None) -> Tensor:
        """Interpolate linearly between order statistics, as ``torch.quantile`` does.

        With ``where`` it is the quantile of the valid rows with it, and inf if there
        are none. It takes any number of rows and reads no value on the host.
        """
        if where is None and (found := self._quantile_by_kernel(x, q, False)) is not None:
            return found
        ordered, at = self._order_statistics(x, q, where)
        below, above = (
            ordered.gather(0, k.long().view(1)).view(()) for k in (at.floor(), at.ceil())
        )
        return _between(below, above, at - at.floor())

    def quantile_nearest(self, x: Tensor, q: Any) -> Tensor:
        """Return the order statistic that is nearest to the quantile
        (``interpolation="nearest"``).

        A half rounds to the even one.
        """
        if (found := self._quantile_by_kernel(x, q, True)) is not None:
            return found
        ordered, at = self._order_statistics(x, q)
        result: Tensor = ordered.gather(0, at.round().long().view(1)).view(())
        return result

    def _quantile_by_kernel(self, x: Tensor, q: Any, nearest: bool) -> Tensor | None:
        kernels, masked = self._kernels, self._rows.masked
        if kernels is None or kernels.quantile is None or not isinstance(q, (int, float)):
            return None
        values = self._stored(x)
        if not isinstance(values, Tensor) or masked is None:
            return None
        ordered = self._only(values, math.inf).sort().values
        return kernels.quantile(masked, ordered, float(q), nearest, self._into)

    def top(self, x: Tensor, fraction: Any, where: Tensor) -> Tensor:
        """Return 1.0 for the ``max(1, ceil(fraction·n))`` largest ``x`` among the n
        valid rows with ``where``, else 0.0.

        Of equal values the first comes first.
        """
        candidate = self._rows.keep & where
        # In floating point 0.07·100 is slightly more than 7, but means 7.
        count = (fraction * self._rows.total(candidate).double() + 0.999999).floor()
        return self._first(x, candidate, count)

    def largest(self, x: Tensor, fraction: Any) -> Tensor:
        """Return 1.0 for the ``max(1, floor(fraction·n))`` largest ``x`` among the n
        valid rows, else 0.0.

        Of equal values the first comes first.
        """
        return self._first(x, self._rows.keep, self._count(fraction))

    def draw(self, fraction: Any, where: Tensor, seed: Any) -> Tensor:
        """Draw ``max(1, floor(fraction·n))`` of the n valid rows among those with
        ``where``. Return 1.0 for them, else 0.0.

        If fewer rows have ``where``, all of those are drawn. The draw is a permutation
        of the positions that follows from ``seed``.
        """
        across = self._rows.across
        position = torch.arange(where.numel(), device=where.device)
        if across is not None:
            position = position + across.gather(torch.zeros_like(position))[1].start
        keys = _scattered(position, seed)
        own = slice(None)
        if across is not None:
            keys, own = across.gather(keys)
        order = keys.sort().indices
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )
        return self._first(
            -rank[own].to(self._rows.dtype), self._rows.keep & where, self._count(fraction)
        )

    def _count(self, fraction: Any) -> Tensor:
        count: Tensor = (fraction * self._rows.total(self._rows.keep).double()).floor()
        return count

    def _first(self, x: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        """Return 1.0 for the ``max(1, count)`` largest ``x`` among the candidates, else
        0.0.
        """
        across = self._rows.across
        own = slice(None)
        if across is not None:
            x, own = across.gather(x)
            candidate, _ = across.gather(candidate)
        # Candidates come first, and the largest of them first. The order takes two
        # stable sorts, the major key last. It is exact where a value is infinite.
        order = torch.where(candidate, x, 0).sort(descending=True, stable=True).indices
        order = order[candidate[order].to(torch.uint8).sort(descending=True, stable=True).indices]
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )
        result: Tensor = (candidate & (rank < count.clamp(min=1))).to(x.dtype)
        return result[own]

    def _of_all_ranks(self, by_sequence: bool) -> tuple[BatchStatistics, slice]:
        """Return statistics of the rows of all ranks, and the slice of this rank's."""
        rows, prompts = self._rows, self._rows.prompts
        assert rows.across is not None
        sequences = None
        if by_sequence:
            owner, _ = rows.across.gather(self._owner())
            sequences = Groups(self._sequences().count, index=owner)
        keep, own = rows.across.gather(rows.keep)
        whole = Rows(
            rows.op,
            tuple(keep.shape),
            rows.device,
            rows.dtype,
            keep,
            keep,
            sequences,
            None,
            {},
            prompts=prompts,
        )
        return BatchStatistics(whole), own

    # --- by size ----------------------------------------------------------------------
    @_over_ranks
    def rank(self, x: Tensor) -> Tensor:
        """Return ``[N]``: how many valid rows have a smaller ``x``. Of equal values the
        first counts as smaller.
        """
        return self._rank(x, Ordered.by((~self._rows.keep).long(), x))

    @_over_ranks
    def mean_below(self, x: Tensor) -> Tensor:
        """Return ``[N]``: the mean of ``x`` over the valid rows whose rank is not
        higher. It grows with the rank.
        """
        ordered = Ordered.by((~self._rows.keep).long(), x)
        total = self._only(x, 0)[ordered.order].cumsum(0)
        return self._only(
            ordered.back(total / torch.arange(1, total.numel() + 1, device=total.device)), 0
        )

    @_over_ranks
    def capped_mean(self, x: Tensor, where: Tensor) -> Tensor:
        """Return ``[N]``: the mean of ``min(x_j, x)`` over the valid rows j with
        ``where``, for a row that is one of them.

        It grows with ``x``.
        """
        ordered = Ordered.by((~(self._rows.keep & where)).long(), x)
        values = torch.where(ordered.key == 0, x[ordered.order], 0)
        count = ordered.count()
        above = count - 1 - ordered.place()
        # the largest may be inf, and inf * 0 is NaN
        total = values.cumsum(0) + torch.where(above == 0, 0, values * above)
        return self._only(ordered.back(torch.where(ordered.key == 0, total / count, 0)), 0)

    @_over_ranks
    def seq_rank(self, x: Tensor) -> Tensor:
        """Return ``[N]``: the :meth:`rank` within the row's sequence."""
        return self._rank(x, Ordered.by(self._owner(), x))

    @_over_ranks
    def seq_quantile(self, x: Tensor, q: Any) -> Tensor:
        """Return ``[N]``: the :meth:`quantile` of the row's sequence."""
        ordered = Ordered.by(self._owner(), x)
        values = self._only(x, 0)[ordered.order]
        if isinstance(q, Tensor) and q.dim():  # one for each row
            q = q.expand(values.numel())[ordered.order]
        at = q * (ordered.count() - 1).to(values.dtype)
        below, above = (values[ordered.start() + k.long()] for k in (at.floor(), at.ceil()))
        return self._only(ordered.back(_between(below, above, at - at.floor())), 0)

    def _rank(self, x: Tensor, ordered: Ordered) -> Tensor:
        return self._only(ordered.back(ordered.place()).to(x.dtype), 0)

    # --- over each row's sequence -----------------------------------------------------
    def _owner(self) -> Tensor:
        """Return ``[N]`` int64: the sequence of each row. Ignored rows have the number
        after the last sequence.
        """
        groups, keep = self._sequences(), self._rows.keep
        index = groups.index
        if index is None:
            index = torch.arange(keep.numel(), device=keep.device) // max(groups.length, 1)
        return torch.where(keep, index, groups.count)

    @_by_kernel("sum")
    def seq_sum(self, x: Any) -> Tensor:
        """Return ``[N]``: every row gets the sum of its sequence."""
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)))

    @_by_kernel("mean")
    def seq_mean(self, x: Any) -> Tensor:
        counts = self._sequences().sum(self._rows.keep.to(self._rows.dtype)).clamp(min=1)
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)) / counts)

    @_by_kernel("max")
    @_over_ranks
    def seq_max(self, x: Tensor) -> Tensor:
        return self._only(
            self._sequences().spread(self._sequences().max(self._only(x, -math.inf))), 0
        )

    @_by_kernel("min")
    def seq_min(self, x: Tensor) -> Tensor:
        return -self.seq_max(-x)

    def seq_cumsum(self, x: Any, decay: Any = 1.0) -> Tensor:
        """Return ``[N]``: ``Σ_{s<=t} decay^(t-s)·x_s`` over the row's sequence.
        ``t - s`` counts valid tokens.
        """
        return self._along(x, decay, False)

    def seq_suffix_sum(self, x: Any, decay: Any = 1.0) -> Tensor:
        """Return ``[N]``: ``Σ_{s>=t} decay^(s-t)·x_s`` over the row's sequence.
        ``s - t`` counts valid tokens.
        """
        return self._along(x, decay, True)

    def _along(self, x: Any, decay: Any, reverse: bool) -> Tensor:
        self._one_number(decay, "the decay of a sum along a sequence")
        what = "batch.seq_suffix_sum" if reverse else "batch.seq_cumsum"
        self._rows.refuse_across(what, NO_ORDER)
        if (found := self._along_by_kernel(x, decay, reverse)) is not None:
            return found
        groups, rows = self._sequences(), self._rows.keep.numel()
        return Ordered.by(self._owner()).cumsum(
            self._only(x, 0), decay, groups.length if groups.index is None else rows, reverse
        )

    def _along_by_kernel(self, x: Any, decay: Any, reverse: bool) -> Tensor | None:
        along, rows = None if self._kernels is None else self._kernels.along, self._rows
        if along is None or rows.sequences is None or rows.masked is None:
            return None
        if isinstance(decay, Tensor) and (_moves(decay) or decay.device != rows.device):
            return None
        values = self._stored(x)
        if values is None:
            return None
        return along(rows.masked, values, decay, reverse, self._into)

    # --- over each row's prompt -------------------------------------------------------
    def _by_prompt(self, x: Tensor) -> Tensor:
        return self._prompts().sum(self._sequences().sum(x))

    def _of_prompt(self, y: Tensor) -> Tensor:
        return self._only(self._sequences().spread(self._prompts().spread(y)), 0)

    def group_sum(self, x: Any) -> Tensor:
        """Return ``[N]``: every row gets the sum over the tokens of all sequences of
        its prompt.
        """
        return self._of_prompt(self._by_prompt(self._only(x, 0)))

    def group_mean(self, x: Any) -> Tensor:
        return self._of_prompt(
            self._by_prompt(self._only(x, 0)) / self._by_prompt(self._only(1.0, 0)).clamp(min=1)
        )

    @_over_ranks
    def group_max(self, x: Tensor) -> Tensor:
        return self._of_prompt(self._prompts().max(self._sequences().max(self._only(x, -math.inf))))

    def group_min(self, x: Tensor) -> Tensor:
        return -self.group_max(-x)


def statistics_into(rows: Rows, into: Tensor) -> BatchStatistics:
    """Return statistics of which a kernel writes one to ``into`` ``[N]``."""
    found = BatchStatistics(rows)
    found._into = into
    return found


def _moves(x: Tensor) -> bool:
    """Return whether autograd follows what is computed from ``x``."""
    return x.requires_grad and torch.is_grad_enabled()


def _between(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """Return ``below + share·(above - below)``, and ``below`` where that is infinite or
    ``share`` is 0: inf - inf and 0·inf are NaN.
    """
    gap = torch.where((share == 0) | below.isinf(), 0, above - below)
    result: Tensor = below + share * gap
    return result


def _scattered(position: Tensor, seed: Any) -> Tensor:
    """Return a 62-bit hash of each position and the seed (the two rounds of
    SplitMix64).
    """
    z = position + (seed.long() if isinstance(seed, Tensor) else int(seed)) * 0x51ED2701
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z & ((1 << 62) - 1)
