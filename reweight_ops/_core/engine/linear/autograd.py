"""The two autograd Functions of the chunked LM head.

The logits of a few rows at a time are in one reused buffer, and the kernels work in
place on it. As for logits there are statistics (backward recomputes a chunk's logits,
or has kept them) and the one-pass loss (three GEMMs in forward). If there is a second
model, its logits exist for the same chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls.hidden import ChunkSettings, Hidden, LMHead
from ...calls.released import partitioned, refuse_released_since
from ...rows.groups import IGNORE_INDEX
from .. import again
from .. import ops as library
from ..autograd import forbid_graph, forbid_second_backward
from .buffers import Buffers, Kept, OtherHead, made, torch_logits
from .gemms import Gradients, chunks, padded, rows_with_gradient
from .measures import Found, LogitRows, Measure, PerRow
from .works import OnePassWork


def without_grad(forward: Any) -> Any:
    """Of a Function's forward: what it is anyway, but where torch.export runs it."""

    # torch.no_grad() as the decorator closes over a bound method, which PyTorch 2.10
    # does not follow here.
    @functools.wraps(forward)
    def called(*args: Any) -> Any:
        with torch.no_grad():
            return forward(*args)

    return called


class LinearStatistics(torch.autograd.Function):
    """What a measure finds of the head's logits, one element for each of M rows,
    differentiable to every tensor of the head.
    """

    @staticmethod
    @without_grad
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scale: float,
        rows: PerRow,
        other: OtherHead | None,
        settings: ChunkSettings,
        measure: Measure,
    ) -> tuple[Tensor, ...]:
        head = LMHead(weight, bias, lora_a, lora_b, lora_scale).cast(settings)
        size, needs_grad = min(settings.chunk_rows, hidden.size(0)), any(ctx.needs_input_grad[:5])
        working: Buffers | None = None
        kept: list[Kept] = []
        parts = []
        for where in _runs(hidden, size):
            if 0 < where.stop <= settings.keep_rows:
                buffers = Buffers(size, head, settings, other)
                kept.append(buffers.kept())
            else:
                buffers = working = working or Buffers(size, head, settings, other)
            parts.append(measure.stats(buffers.logits(hidden, rows, where), needs_grad))
        found = Found(*(_joined(part) for part in zip(*parts, strict=True)))
        shards = measure.over()
        if shards is not None:
            # The ranks exchange all rows at once, whatever the chunks are.
            found = measure.merged(shards.gathered(measure.states(found)), rows)
            if measure.sweeps_again():
                working = working or Buffers(size, head, settings, other)
                sums = [
                    measure.sums(
                        working.logits(hidden, rows, where),
                        Found(_at(found.outputs, where), _at(found.rest, where)),
                    )
                    for where in _runs(hidden, size)
                ]
                found = measure.with_sums(found, shards.gathered(torch.cat(sums, 1)).sum(0))
        outputs, rest = found
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.measure, ctx.lora_scale = settings, measure, lora_scale
        # Backward writes over the first model's logits, so they serve only once. A
        # second backward computes the same ones again.
        ctx.kept = kept
        ctx.other = (
            None
            if other is None
            else (other.settings, None if other.head is None else other.head.lora_scale)
        )
        others = (
            ()
            if other is None
            else (other.values, other.picked, *(other.head[:4] if other.head is not None else ()))
        )
        ctx.split = (len(rows), len(outputs), len(rest))
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, *rows, *outputs, *rest, *others)
        ctx.mark_non_differentiable(
            *(t for t, moves in zip(outputs, measure.differentiable(), strict=True) if not moves)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        measure: Measure = ctx.measure
        forbid_graph(ctx.settings.shards)
        by = tuple(
            g.contiguous() if g is not None and moves else None
            for g, moves in zip(grads, measure.differentiable(), strict=True)
        )
        if all(g is None for g in by):
            return (None,) * 10
        hidden, weight, bias, lora_a, lora_b, *saved = ctx.saved_tensors
        refuse_released_since("backward", (weight, bias, lora_a, lora_b))
        rows, outputs, rest, others = _split(saved, ctx.split)
        rows, settings = PerRow(*rows), ctx.settings
        other = None if ctx.other is None else _other_head(others, *ctx.other)
        if again.wants_graph():

            def formula(
                h: Tensor, w: Tensor, c: Tensor | None, a: Tensor | None, b: Tensor | None
            ) -> tuple[Tensor, ...]:
                return _in_torch(
                    h, LMHead(w, c, a, b, ctx.lora_scale), rows, other, settings, measure
                )

            return (
                *again.gradient(formula, (hidden, weight, bias, lora_a, lora_b), by),
                *(None,) * 5,
            )
        parameters = LMHead(weight, bias, lora_a, lora_b, ctx.lora_scale)
        head = parameters.cast(settings)
        count, kept, ctx.kept = hidden.size(0), ctx.kept, [None] * len(ctx.kept)
        size = min(settings.chunk_rows, count)
        again_from = min(len(kept) * size, count)
        # Rows without a coefficient are not computed again.
        with_gradient = (
            rows_with_gradient(*_at(by, slice(again_from, count)))
            if settings.drop_zero_gradient and again_from < count
            else None
        )
        left = count - again_from if with_gradient is None else with_gradient.numel()
        gradients = Gradients(
            hidden,
            parameters,
            head,
            ctx.needs_input_grad[:5],
            len(kept) + -(-left // max(size, 1)),
            settings,
        )

        def add(where: slice | Tensor, logits: LogitRows, chunk: Tensor, drop: bool) -> None:
            part = _at(by, where)
            found = measure.gradient(
                logits,
                Found(_at(outputs, where), _at(rest, where)),
                part,
                library.may_overwrite(True),
            )
            whole = chunk if found is None else padded(found, chunk.size(0))
            gradients.add(where, hidden[where], whole, rows_with_gradient(*part) if drop else None)

        nothing: Any = None
        buffers: Buffers | None = None
        chunk = logits = nothing
        for chunk, where in zip(kept, chunks(0, again_from, max(size, 1)), strict=True):
            if chunk is None:
                buffers = buffers or Buffers(size, head, settings, other)
                logits = buffers.logits(hidden, rows, where)
                add(where, logits, buffers.values, settings.drop_zero_gradient)
            else:
                logits = made(chunk, other, rows, where)
                add(where, logits, chunk.values, settings.drop_zero_gradient)
        kept = chunk = logits = None  # freed before the working chunk is made
        buffers = buffers if left else None
        for run in chunks(0, left, max(size, 1)):
            # There are as many rows as in forward, padding included, so that the logits
            # are the same.
            buffers = buffers or Buffers(size, head, settings, other)
            at = (
                slice(again_from + run.start, again_from + run.stop)
                if with_gradient is None
                else again_from + with_gradient[run]
            )
            add(at, buffers.logits(hidden, rows, at), buffers.values, False)
        return (*gradients.finish(), *(None,) * 5)


class LinearOnePass(torch.autograd.Function):
    """``(loss, table)``. Forward computes every gradient, with one GEMM for each
    model's logits and two for the gradients.
    """

    @staticmethod
    @without_grad
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scale: float,
        rows: PerRow,
        other: OtherHead | None,
        settings: ChunkSettings,
        work: OnePassWork,
    ) -> tuple[Tensor, Tensor]:
        parameters = LMHead(weight, bias, lora_a, lora_b, lora_scale)
        head = parameters.cast(settings)
        size = min(settings.chunk_rows, hidden.size(0))
        gradients = Gradients(
            hidden,
            parameters,
            head,
            ctx.needs_input_grad[:5],
            -(-hidden.size(0) // max(size, 1)),
            settings,
        )
        buffers, tables = Buffers(size, head, settings, other), []
        for where in _runs(hidden, size):
            part = work.at(where)
            table = part.gradient_(buffers.logits(hidden, rows, where))
            tables.append(table)
            gradients.add(
                where,
                hidden[where],
                buffers.values,
                part.rows_with_gradient(table) if settings.drop_zero_gradient else None,
            )
        table, results = torch.cat(tables, 1), gradients.finish()
        ctx.given, ctx.backend, ctx.op = [g is not None for g in results], work.ran_by(), work.op()
        ctx.partitioned = partitioned(parameters[:4])
        ctx.save_for_backward(*(g for g in results if g is not None))
        ctx.mark_non_differentiable(table)
        return work.loss(table), table

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_backward(ctx, ctx.op)
        refuse_released_since(ctx.op, ctx.partitioned)
        saved = iter(ctx.saved_tensors)
        # Each takes one launch. For the smallest of these tensors, which have several
        # dtypes, an empty launch costs the few microseconds.
        results = [
            library.scaled(next(saved), upstream, ctx.backend) if given else None
            for given in ctx.given
        ]
        return (*results, *(None,) * 5)


def linear_statistics(
    hidden: Hidden, rows: PerRow, other: OtherHead | None, measure: Measure
) -> tuple[Tensor, ...]:
    """Return the outputs of :class:`LinearStatistics`, as plain torch if that is the
    measure's backend.
    """
    if measure.ran_by() == again.TORCH:
        return _in_torch(hidden.states, hidden.head, rows, other, hidden.settings, measure)
    found: tuple[Tensor, ...] = LinearStatistics.apply(  # type: ignore[no-untyped-call]
        hidden.states, *hidden.head, rows, other, hidden.settings, measure
    )
    return found


def _in_torch(
    states: Tensor,
    head: LMHead,
    rows: PerRow,
    other: OtherHead | None,
    settings: ChunkSettings,
    measure: Measure,
) -> tuple[Tensor, ...]:
    return measure.formulas(
        torch_logits(states, head, rows, rows.ids != IGNORE_INDEX, settings, other)
    )


def _runs(hidden: Tensor, size: int) -> list[slice]:
    """Return the chunks of a call.

    Without rows there is one empty chunk, so that its results have their shapes and
    dtypes.
    """
    return list(chunks(0, hidden.size(0), max(size, 1))) or [slice(0, 0)]


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join the results of chunks into those of all rows."""
    return (
        parts[0]
        if len(parts) == 1
        else tuple(torch.cat(found) for found in zip(*parts, strict=True))
    )


def _at(found: tuple[Any, ...], rows: slice | Tensor) -> tuple[Any, ...]:
    return tuple(None if x is None else x[rows].contiguous() for x in found)


def _split(saved: list[Any], counts: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    """Split into runs of ``counts`` elements, and the rest."""
    runs = []
    for count in counts:
        runs.append(tuple(saved[:count]))
        saved = saved[count:]
    return (*runs, tuple(saved))


def _other_head(
    saved: tuple[Any, ...], settings: ChunkSettings, lora_scale: float | None
) -> OtherHead:
    values, picked, *head = saved
    return OtherHead(
        values, None if lora_scale is None else LMHead._make((*head, lora_scale)), picked, settings
    )
