"""Losses without a kernel: a per-row formula in torch that is evaluated and
differentiated a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..backends.shards import VocabShards
from ..calls.logits import Logits
from ..calls.softmax import refuse_learnt
from ..calls.two_logits import TwoLogits
from ..rows.groups import IGNORE_INDEX
from ..rows.rows import Rows
from ..transforms import in_transform
from . import again
from .autograd import forbid_graph
from .run import Call
from .sharded_rows import SumOverShards, ValueOfSums, whole_rows
from .source import PlainSource, SourceInfo
from .sources import refuse_transforms
from .statistics import StatisticsObjective

#: The number of elements of a chunk. With the dozen temporaries of a formula in fp32 it
#: takes about a gigabyte at most.
CHUNK_ELEMENTS = 1 << 24

#: x [n, V], then whatever else per row -> [n], or [n, k] of sums over columns
Formula = Callable[..., Tensor]


def _x(z: Tensor, dtype: torch.dtype, softmax: SoftmaxParams, temperature: Tensor) -> Tensor:
    z, softcap = z[:, : softmax.vocab_size].to(dtype), softmax.softcap
    if softcap < torch.inf:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return z / temperature[:, None]


class ChunkedRows(torch.autograd.Function):
    """``formula(x, *rest)`` of every row.

    Backward evaluates it again, chunk by chunk. The memory is one chunk and the
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        keep: Tensor,
        formula: Formula,
        prepare: Callable[..., Tensor],
        columns: _Columns,
        *rest: Tensor,
    ) -> Tensor:
        ctx.formula, ctx.prepare, ctx.columns = formula, prepare, columns
        ctx.save_for_backward(z, keep, *rest)
        step = columns.step
        parts = [
            formula(prepare(z[i : i + step], i), *(r[i : i + step] for r in rest))
            for i in range(0, z.size(0), step)
        ]
        found = torch.cat(parts) if parts else formula(prepare(z, 0), *rest)
        return torch.where(_by_row(keep, found), found, 0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, keep, *rest = ctx.saved_tensors
        nothing = (None,) * (4 + len(rest))
        forbid_graph(ctx.columns.shards)
        if again.wants_graph():
            return again.gradient(
                lambda x: (_whole(x, keep, ctx.formula, ctx.prepare, *rest),), (z,), (upstream,)
            )[0], *nothing
        out = torch.empty_like(z)
        step, own = ctx.columns.step, ctx.columns.own
        for i in range(0, z.size(0), step):
            with torch.enable_grad():
                part = z[i : i + step].detach().requires_grad_()
                value = ctx.formula(ctx.prepare(part, i), *(r[i : i + step] for r in rest))
            given = upstream[i : i + step]
            selected = keep[i : i + step] & _any(given != 0)
            (grad,) = torch.autograd.grad(
                value, part, torch.where(_by_row(selected, given), given, 0)
            )
            # As the kernels': NaN in every column of a row that is selected and has no
            # value, 0 in one that is not selected.
            without = _any(value.isnan())
            if value.dim() > 1:  # a part of a row, whose value another rank may not have
                without = without | _any(given.isnan())
            columns = grad[:, :own]
            columns[:] = torch.where(
                without[:, None], torch.nan, torch.where(part[:, :own] > -torch.inf, columns, 0)
            )
            out[i : i + step] = torch.where(selected[:, None], grad, 0)
        return out, *nothing


class _Columns(NamedTuple):
    """How many columns of a rank are in the softmax, and how many rows are a chunk."""

    own: int
    step: int
    shards: VocabShards | None


def _by_row(rows: Tensor, x: Tensor) -> Tensor:
    return rows if x.dim() == 1 else rows[:, None]


def _any(x: Tensor) -> Tensor:
    return x if x.dim() == 1 else x.any(-1)


def _whole(
    z: Tensor, keep: Tensor, formula: Formula, prepare: Callable[..., Tensor], *rest: Tensor
) -> Tensor:
    """Evaluate the formula on all rows, so that autograd can differentiate it any
    number of times.
    """
    # no gradient to columns without mass
    x = torch.where(z == -torch.inf, -torch.inf, z)
    found = formula(prepare(x, 0), *rest)
    return torch.where(_by_row(keep, found), found, 0)


@dataclass(frozen=True)
class FormulaSource(PlainSource):
    """``formula(x, [y,] [ids])`` of every valid row, under the name ``value``.

    x and y are capped and divided by their temperatures. With ``of_sums``, the formula
    is ``[n, k]`` of sums over columns, and ``of_sums`` maps these to the value ``[n]``.
    Of a vocabulary in shards, such a formula sees the columns of one rank, and the ids
    as numbers of these columns. Any other formula sees whole rows: the ranks send them.
    """

    logits: Logits | TwoLogits
    formula: Formula
    of_sums: Callable[[Tensor], Tensor] | None = None
    reads_ids: bool = False

    @property
    def p(self) -> Logits:
        return self.logits if isinstance(self.logits, Logits) else self.logits.p

    @property
    def rows(self) -> Rows:
        return self.p.rows

    @property
    def info(self) -> SourceInfo:
        p = self.p
        other = None if isinstance(self.logits, Logits) else self.logits.other.dtype
        return SourceInfo(p.values.device, p.values.dtype, p.needs_grad, None, other_dtype=other)

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        p, rows, ids, shards = self.p, self.rows, self.p.ids, None
        refuse_learnt(p.temperature, rows.error)
        refuse_consumed(p)
        if p.shard is not None:
            if in_transform():
                refuse_transforms(rows, again.TORCH)
            shards, ids = p.shard.agreed(rows, ids, ("a formula",), p.needs_grad)
        keep = rows.keep if shards is None else ids != IGNORE_INDEX
        # In an ignored row the formula sees zeros.
        values = p.values[..., :-1, :] if p.drop_last else p.values
        z = torch.where(keep[:, None], values.reshape(rows.count, values.size(-1)), 0)
        temperature = p.temperature.expand(rows.count)
        softmax = p.softmax if shards is None else shards.params(p.softmax.softcap)
        sends = shards if self.of_sums is None else None

        def prepare(part: Tensor, i: int) -> Tensor:
            x = _x(part, rows.dtype, softmax, temperature[i : i + len(part)])
            return x if sends is None else whole_rows(x, sends)

        formula = self._formula_of(shards)
        more: tuple[Tensor, ...] = ()
        if self.reads_ids:
            more = (ids if shards is None or sends is not None else ids - softmax.vocab_start,)
        if isinstance(self.logits, TwoLogits):
            two, one = self.logits, formula
            more = (
                two.other.reshape(rows.count, two.other.size(-1)),
                two.other_temperature.expand(rows.count),
                keep,
                *more,
            )
            other_softmax = two.other_softmax
            if shards is not None:
                other_softmax = shards.params(other_softmax.softcap)

            def formula(x: Tensor, y: Tensor, t: Tensor, inside: Tensor, *rest: Tensor) -> Tensor:
                y = _x(torch.where(inside[:, None], y, 0), rows.dtype, other_softmax, t)
                return one(x, y if sends is None else whole_rows(y, sends), *rest)

        # the compiler chooses its own chunks
        if in_transform() or torch.compiler.is_compiling():
            found = _whole(z, keep, formula, prepare, *more)
        else:
            widest = z.size(-1) if shards is None else shards.total
            step = max(CHUNK_ELEMENTS // max(widest, 1), 1)
            columns = _Columns(min(softmax.vocab_size, z.size(-1)), step, shards)
            found = ChunkedRows.apply(z, keep, formula, prepare, columns, *more)  # type: ignore[no-untyped-call]
        if shards is not None and sends is None:
            assert self.of_sums is not None
            if torch.compiler.is_compiling():
                of_row = self.of_sums(SumOverShards.apply(found, shards))  # type: ignore[no-untyped-call]
            else:
                of_row = ValueOfSums.apply(found, self.of_sums, shards)  # type: ignore[no-untyped-call]
            found = torch.where(keep, of_row, 0)
        return {"value": found}

    def _formula_of(self, shards: VocabShards | None) -> Formula:
        """Return the formula of a row, or of one rank's part of its sums."""
        formula, of_sums = self.formula, self.of_sums
        if of_sums is None or shards is not None:
            return formula
        return lambda *row: of_sums(formula(*row))


def refuse_consumed(p: Logits) -> None:
    if p.consume:
        raise p.rows.error(
            "consume_logits=True has no effect: this loss does not write over its logits."
        )


def formula_call(source: FormulaSource) -> Call[Tensor]:
    """Return the call of an op that returns the formula's value per
    token, of shape R."""
    return Call(
        source, StatisticsObjective(("value",), lambda found: source.rows.unflatten(found["value"]))
    )
