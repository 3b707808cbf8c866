"""The chunked LM head's two autograd Functions: logits of a few rows at a time in one reused buffer, and the kernels in place on it.

As for logits there are statistics (backward recomputes a chunk's logits, or has kept them) and the one-pass loss (three GEMMs in forward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls.chunking import balanced
from ...calls.hidden import ChunkSettings, LMHead
from ...calls.sampling_mask import KeptSets
from .. import again, kept_ops
from .. import ops as library
from ..autograd import FIXED, LSE_LOW, asked_for, forbid_second_backward
from .gemms import Chunk, Gradients, chunks, live_rows, padded

_DERIVATIVES = ("logp", "entropy", "lse", "log_sum_p_sq")


def _per_row(t: Tensor, rows: slice) -> Tensor:
    return t if t.size(-1) == 1 else t[..., rows].contiguous()


class LinearStatistics(torch.autograd.Function):
    """Statistics ``[M]`` of the rows of the head's logits, differentiable to everything the head is made of."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():  # already so, but where torch.export runs it
            return LinearStatistics.compute(ctx, *arguments)

    @staticmethod
    def compute(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        lora_scale: float, ids: Tensor, temperature: Tensor, sets: KeptSets | None, settings: ChunkSettings, stats: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = LMHead(weight, bias, lora_a, lora_b, lora_scale).cast(settings)
        count = hidden.size(0)
        size = min(settings.chunk_rows, count)
        wanted = asked_for(stats, any(ctx.needs_input_grad[:5]))
        working: Chunk | None = None
        kept: list[Chunk] = []
        parts = []
        for rows in chunks(0, count, max(size, 1)):
            if rows.stop <= settings.keep_rows:
                chunk = Chunk(size, head, settings)
                kept.append(chunk)
            else:
                chunk = working = working or Chunk(size, head, settings)
            z, rest = chunk.logits(hidden[rows]), (_per_row(temperature, rows), *settings.softmax[:2], False, wanted, settings.backend)
            if sets is None:
                parts.append(library.called(library.token_stats, z, ids[rows], *rest))
            else:
                parts.append(library.called(kept_ops.kept_stats, z, ids[rows], *sets.rows(rows)[:3], *rest))
        wide = torch.float64 if settings.logits_dtype == torch.float64 else torch.float32
        table = torch.cat(parts, 1) if parts else hidden.new_zeros(len(wanted.split(",")), 0, dtype=wide)
        known = table.unbind()
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.names, ctx.wanted, ctx.sets, ctx.lora_scale = settings, stats.split(","), wanted.split(","), sets, lora_scale
        outputs = tuple(known[: len(ctx.names)])
        # Backward writes over them, so they serve once; a second backward makes the same ones again.
        ctx.kept = [chunk.data for chunk in kept]
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, ids, temperature, *known)
        ctx.mark_non_differentiable(*(t for name, t in zip(ctx.names, outputs, strict=True) if name in FIXED))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lora_a, lora_b, ids, temperature, *stats = ctx.saved_tensors
        settings: ChunkSettings = ctx.settings
        if again.wants_graph():

            def formula(h: Tensor, w: Tensor, c: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
                return again.linear_stats(h, LMHead(w, c, a, b, ctx.lora_scale), ids, temperature, settings, ctx.names, ctx.sets)

            return (*again.gradient(formula, (hidden, weight, bias, lora_a, lora_b), grads), *(None,) * 6)
        by = {name: None if g is None else g.contiguous() for name, g in zip(ctx.names, grads, strict=True)}
        if all(g is None for g in by.values()):
            return (None,) * 11
        table = _Table(ids, temperature, dict(zip(ctx.wanted, stats, strict=True)), by, ctx.sets)
        parameters = LMHead(weight, bias, lora_a, lora_b, ctx.lora_scale)
        head = parameters.cast(settings)
        count, kept, ctx.kept = hidden.size(0), ctx.kept, [None] * len(ctx.kept)
        size = min(settings.chunk_rows, count)
        recomputed_from = min(len(kept) * size, count)
        # Rows without a coefficient are not even recomputed.
        index = table.rows(slice(recomputed_from, count)).live() if settings.drop_inert else None
        rest = count - recomputed_from if index is None else index.numel()
        total_chunks = len(kept) + -(-rest // max(size, 1))
        gradients = Gradients(hidden, parameters, head, ctx.needs_input_grad[:5], total_chunks, settings)
        chunk: Chunk | None = None
        for data, rows in zip(kept, chunks(0, recomputed_from, max(size, 1)), strict=True):
            part, h = table.rows(rows), hidden[rows]
            if data is None:
                chunk = chunk or Chunk(size, head, settings)
                chunk.logits(h)
                data = chunk.data
            gradients.add(rows, h, _gradient(data, h.size(0), part, settings), part.live() if settings.drop_inert else None)
        kept = data = chunk = None  # freed before the working chunk is made
        if rest:
            # Without compaction the same chunks as in forward, so that the same logits are found.
            size = size if index is None else balanced(rest, size)
            chunk = Chunk(min(size, rest), head, settings)
            for rows in chunks(0, rest, size):
                where = slice(recomputed_from + rows.start, recomputed_from + rows.stop) if index is None else recomputed_from + index[rows]
                h = hidden[where]
                chunk.logits(h)
                gradients.add(where, h, _gradient(chunk.data, h.size(0), table.rows(where), settings), None)
        return (*gradients.finish(), None, None, None, None, None, None)


class _Table:
    """Everything per row that backward reads."""

    def __init__(
        self, ids: Tensor, temperature: Tensor, known: dict[str, Tensor], by: dict[str, Tensor | None], sets: KeptSets | None
    ) -> None:
        self.ids, self.temperature, self.known, self.by, self.sets = ids, temperature, known, by, sets

    def rows(self, rows: slice | Tensor) -> _Table:
        def take(x: Tensor) -> Tensor:
            return x[rows].contiguous()

        return _Table(
            take(self.ids),
            self.temperature if self.temperature.size(-1) == 1 else take(self.temperature),
            {name: take(x) for name, x in self.known.items()},
            {name: None if x is None else take(x) for name, x in self.by.items()},
            None if self.sets is None else self.sets.rows(rows) if isinstance(rows, slice) else self.sets.select(rows),
        )

    def live(self) -> Tensor | None:
        return live_rows(*self.by.values())


def _gradient(chunk: Tensor, count: int, table: _Table, settings: ChunkSettings) -> Tensor:
    """The gradient of a chunk's first ``count`` rows of logits, and padding: over them where that may be."""
    known, by = table.known, table.by
    rest = (*settings.softmax[:2], False, settings.backend)
    if table.sets is None:
        verb, in_place = library.token_grad, library.token_grad_
        arguments: tuple[Any, ...] = (
            chunk[:count], table.ids, table.temperature, known["logp"], known["lse"], known[LSE_LOW], known.get("entropy"),
            known.get("log_sum_p_sq"), *(by.get(name) for name in _DERIVATIVES), *rest,
        )  # fmt: skip
    else:
        verb, in_place = kept_ops.kept_grad, kept_ops.kept_grad_
        arguments = (chunk[:count], table.ids, *table.sets[:3], table.temperature, *kept_ops.stacked(known, by), *rest)
    if library.may_overwrite(True):
        library.called(in_place, *arguments)
        return chunk
    return padded(library.called(verb, *arguments), chunk.size(0))


class LinearOnePassLoss(torch.autograd.Function):
    """``(loss, rows)`` with every gradient formed in forward, from one GEMM for the logits and two for the gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():  # already so, but where torch.export runs it
            return LinearOnePassLoss.compute(ctx, *arguments)

    @staticmethod
    def compute(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, lora_scale: float,
        ids: Tensor, temperature: Tensor, sets: KeptSets | None, inputs: tuple[Tensor | None, ...], params: Tensor, program: str,
        settings: ChunkSettings,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parameters = LMHead(weight, bias, lora_a, lora_b, lora_scale)
        head = parameters.cast(settings)
        count = hidden.size(0)
        size = min(settings.chunk_rows, count)
        gradients = Gradients(hidden, parameters, head, ctx.needs_input_grad[:5], -(-count // max(size, 1)), settings)
        chunk, parts = Chunk(size, head, settings), []
        for rows in chunks(0, count, max(size, 1)):
            h = hidden[rows]
            z = chunk.logits(h)
            row_inputs = [None if t is None else t[..., rows].contiguous() for t in inputs]
            t, rest = _per_row(temperature, rows), (*settings.softmax[:2], False, settings.backend)
            if sets is None:
                table = library.called(library.token_loss_grad_, z, ids[rows], t, *row_inputs, params, program, *rest)
            else:
                loss = (*row_inputs, params, program, sets.over_vocabulary)
                table = library.called(kept_ops.kept_loss_grad_, z, ids[rows], *sets.rows(rows)[:3], t, *loss, *rest)
            parts.append(table)
            gradients.add(rows, h, chunk.data, live_rows(table[4], table[5]) if settings.drop_inert else None)
        table = torch.cat(parts, 1) if parts else hidden.new_zeros(6, 0, dtype=params.dtype)
        results = gradients.finish()
        ctx.given, ctx.backend = [g is not None for g in results], settings.backend
        ctx.save_for_backward(*(g for g in results if g is not None))
        ctx.mark_non_differentiable(table)
        return table[2].sum(), table

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_backward(ctx, "linear_policy_loss")
        saved = iter(ctx.saved_tensors)
        # A launch each: of these tensors, of several dtypes, the smallest costs the few microseconds that an empty launch takes.
        results = [library.scaled(next(saved), upstream, ctx.backend) if given else None for given in ctx.given]
        return (*results, *(None,) * 8)
