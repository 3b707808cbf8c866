"""Divergences of two chunked heads: the logits of both models exist for one chunk of rows, and the kernels write the gradient over the first's.

As for one head there are statistics (backward computes a chunk's logits again, or has kept them) and the one-pass loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.base import DIVERGENCE_STATS
from ...calls.chunking import balanced
from ...calls.hidden import ChunkSettings, LMHead
from ...rows.groups import OUT
from .. import again, jsd_ops
from .. import ops as library
from ..autograd import forbid_graph, forbid_second_backward, weighted_sum, with_empty
from .autograd import _per_row
from .gemms import Chunk, Gradients, chunks, live_rows, padded


class OtherHead(NamedTuple):
    """The frozen second model: hidden states of the computed rows and their head; or logits of all rows, of which ``picked`` names the computed ones."""

    values: Tensor
    head: LMHead | None
    picked: Tensor | None


class Measure(NamedTuple):
    """What is computed of two chunks of logits, and by whom: the statistics of a backend's kernels, and with ``beta`` the generalised JSD besides."""

    softmaxes: tuple[int, float, float]
    backend: str
    beta: float | None
    sharded: bool = False  # over ranks, each with its columns of both models

    def stats(self, two: tuple[Tensor, ...]) -> Tensor:
        """A row of the table for every one of ``DIVERGENCE_STATS``, and one for the JSD."""
        table: Tensor = library.divergence_stats(*two, *self.softmaxes, False, self.backend)
        if self.sharded:
            return with_empty(table, two, self.softmaxes, self.backend)
        if self.beta is None:
            return table
        return torch.cat([table, jsd_ops.generalized_jsd(*two, self.beta, *self.softmaxes)[None]])

    def gradient(self, two: tuple[Tensor, ...], table: Tensor, coefs: Tensor) -> Tensor | None:
        """The gradient by the first logits, from ``coefs`` of the statistics ``[3, n]``, or of the JSD ``[1, n]``; None if it stands over them now."""
        over = library.may_overwrite(True)
        if self.beta is not None:
            arguments = (*two, coefs[0], self.beta, *self.softmaxes)
            if not over:
                _, found = jsd_ops.generalized_jsd_grad(*arguments)
                return found  # type: ignore[no-any-return]
            jsd_ops.generalized_jsd_grad_(*arguments)
            return None
        arguments = (*two, table, coefs, *self.softmaxes, False, self.backend)
        if not over:
            return library.divergence_grad(*arguments)  # type: ignore[no-any-return]
        library.divergence_grad_(*arguments)
        return None

    def loss_gradient_(self, two: tuple[Tensor, ...], constants: Tensor, weights: Tensor) -> Tensor:
        """The table; over the first logits their gradient of ``Σ weights·Σ_k constants_k·stat_k``, or of ``Σ weights·JSD``."""
        if self.beta is None:
            fused: Tensor = library.divergence_loss_grad_(*two, constants, weights, *self.softmaxes, False, self.backend)
            return fused
        table = library.divergence_stats(*two, *self.softmaxes, False, self.backend)
        jsd = jsd_ops.generalized_jsd_grad_(*two, weights, self.beta, *self.softmaxes)
        return torch.cat([table, jsd[None]])

    def loss(self, table: Tensor, constants: Tensor, weights: Tensor) -> Tensor:
        if self.beta is None:
            return weighted_sum(table, constants, weights)
        return torch.where(weights == 0, 0, weights * table[-1]).sum()


class OtherChunk:
    """The second model's logits of some rows: into a reused buffer, or rows of those that were given."""

    def __init__(self, size: int, other: OtherHead, settings: ChunkSettings) -> None:
        self.other = other
        self.chunk = None if other.head is None else Chunk(size, other.head.cast(settings), settings)

    def logits(self, where: slice | Tensor) -> Tensor:
        """Of the computed rows ``where``."""
        values, _, picked = self.other
        if self.chunk is not None:
            return self.chunk.logits(values[where])
        if picked is not None:
            where = picked[where]
        if values.dim() == 2:
            return values[where]
        if isinstance(where, slice):
            where = torch.arange(where.start, min(where.stop, values.size(0) * values.size(1)), device=values.device)
        return values[where // values.size(1), where % values.size(1)]

    def made(self, rows: slice) -> Tensor:
        """Those that were computed last, of the run ``rows``."""
        return self.logits(rows) if self.chunk is None else self.chunk.data[: rows.stop - rows.start]


class Heads(NamedTuple):
    """Both models' settings of a chunk, and what is computed of their logits."""

    own: ChunkSettings
    other: ChunkSettings
    measure: Measure


class LinearDivergences(torch.autograd.Function):
    """``(KL(q‖p), KL(p‖q), H(p), H(q)[, JSD])`` ``[M]`` of every row, with gradients to everything that p's head is made of: of the JSD where it is
    asked for, else of the others but H(q)."""

    @staticmethod
    @torch.no_grad()  # already so, but where torch.export runs it
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, lora_scale: float,
        ids: Tensor, t: Tensor, t_other: Tensor, other: OtherHead, heads: Heads,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        settings, measure = heads.own, heads.measure
        head = LMHead(weight, bias, lora_a, lora_b, lora_scale).cast(settings)
        count = hidden.size(0)
        size = min(settings.chunk_rows, count)
        kept: list[tuple[Chunk, OtherChunk]] = []
        working, parts = None, []
        for rows in chunks(0, count, max(size, 1)):
            if rows.stop <= settings.keep_rows:
                both = Chunk(size, head, settings), OtherChunk(size, other, heads.other)
                kept.append(both)
            else:
                both = working = working or (Chunk(size, head, settings), OtherChunk(size, other, heads.other))
            two = (both[0].logits(hidden[rows]), both[1].logits(rows), ids[rows], _per_row(t, rows), _per_row(t_other, rows))
            parts.append(measure.stats(two))
        table = torch.cat(parts, 1) if parts else _no_rows(hidden, measure, t.dtype)
        if settings.shards is not None:
            table = settings.shards.merged_divergences(table, ids)
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.lora_scale = heads, lora_scale
        # Backward writes over p's, so they serve once; a second backward makes the same ones again.
        ctx.kept = kept
        ctx.other_scale = 1.0 if other.head is None else other.head.lora_scale
        others = (other.values, other.picked, *(other.head[:4] if other.head is not None else ()))
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, ids, t, t_other, table, *others)
        outputs = tuple(table[i].clone() for i in (0, 1, 2, 3, *((table.size(0) - 1,) if measure.beta is not None else ())))
        ctx.mark_non_differentiable(*(outputs[3:4] if measure.beta is None else outputs[:4]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lora_a, lora_b, ids, t, t_other, table, values, picked, *rest = ctx.saved_tensors
        heads: Heads = ctx.heads
        settings, measure = heads.own, heads.measure
        forbid_graph(settings.shards)
        other = OtherHead(values, LMHead._make((*rest, ctx.other_scale)) if rest else None, picked)
        grads = grads[:3] if measure.beta is None else grads[4:]
        if all(g is None for g in grads):
            return (None,) * 11
        if again.wants_graph():

            def formula(h: Tensor, w: Tensor, c: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
                values = formulas(h, LMHead(w, c, a, b, ctx.lora_scale), ids, t, t_other, other, heads)
                return values[:3] if measure.beta is None else values[4:]

            found = again.gradient(formula, (hidden, weight, bias, lora_a, lora_b), grads)
            return (*found, *(None,) * 6)
        parameters = LMHead(weight, bias, lora_a, lora_b, ctx.lora_scale)
        head = parameters.cast(settings)
        coefs = torch.stack([torch.zeros_like(table[0]) if g is None else g for g in grads])
        count, kept, ctx.kept = hidden.size(0), ctx.kept, [None] * len(ctx.kept)
        size = min(settings.chunk_rows, count)
        again_from = min(len(kept) * size, count)
        # Rows without a coefficient are not even computed again.
        live = live_rows(*coefs[:, again_from:]) if settings.drop_inert and again_from < count else None
        left = count - again_from if live is None else live.numel()
        gradients = Gradients(hidden, parameters, head, ctx.needs_input_grad[:5], len(kept) + -(-left // max(size, 1)), settings)

        def add(where: slice | Tensor, z: Tensor, y: Tensor, chunk: Tensor, drop: bool) -> None:
            two = (z, y, *(x[where].contiguous() if x.numel() > 1 or x is ids else x for x in (ids, t, t_other)))
            by = coefs[:, where].contiguous()
            found = measure.gradient(two, table[:, where].contiguous(), by)
            whole = chunk if found is None else padded(found, chunk.size(0))
            gradients.add(where, hidden[where], whole, live_rows(*by) if drop else None)

        nothing: Any = None
        both = working = first = second = z = y = nothing
        for both, rows in zip(kept, chunks(0, again_from, max(size, 1)), strict=True):
            if both is None:
                working = working or (Chunk(size, head, settings), OtherChunk(size, other, heads.other))
                first, second = working
                z, y = first.logits(hidden[rows]), second.logits(rows)
            else:
                first, second = both
                z, y = first.data[: rows.stop - rows.start], second.made(rows)
            add(rows, z, y, first.data, settings.drop_inert)
        kept = both = working = first = second = z = y = nothing  # freed before the working chunk is made
        if left:
            # Without compaction the same chunks as in forward, so that the same logits are found.
            size = size if live is None else min(balanced(left, size), left)
            first, second = Chunk(size, head, settings), OtherChunk(size, other, heads.other)
            for rows in chunks(0, left, size):
                where = slice(again_from + rows.start, again_from + rows.stop) if live is None else again_from + live[rows]
                z = first.logits(hidden[where])
                add(where, z, second.logits(where), first.data, False)
        return (*gradients.finish(), *(None,) * 6)


class LinearOnePassDivergence(torch.autograd.Function):
    """``(loss, table)`` with every gradient formed in forward, from p's three GEMMs a chunk and q's one."""

    @staticmethod
    @torch.no_grad()  # already so, but where torch.export runs it
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, lora_scale: float,
        ids: Tensor, t: Tensor, t_other: Tensor, constants: Tensor, weights: Tensor, other: OtherHead, heads: Heads,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        settings, measure = heads.own, heads.measure
        parameters = LMHead(weight, bias, lora_a, lora_b, lora_scale)
        head = parameters.cast(settings)
        count = hidden.size(0)
        size = min(settings.chunk_rows, count)
        gradients = Gradients(hidden, parameters, head, ctx.needs_input_grad[:5], -(-count // max(size, 1)), settings)
        chunk, second, parts = Chunk(size, head, settings), OtherChunk(size, other, heads.other), []
        for rows in chunks(0, count, max(size, 1)):
            h, w = hidden[rows], weights[rows].contiguous()
            two = (chunk.logits(h), second.logits(rows), ids[rows], _per_row(t, rows), _per_row(t_other, rows))
            parts.append(measure.loss_gradient_(two, constants, w))
            gradients.add(rows, h, chunk.data, live_rows(w) if settings.drop_inert else None)
        table = torch.cat(parts, 1) if parts else _no_rows(hidden, measure, t.dtype)
        results = gradients.finish()
        ctx.given, ctx.backend = [g is not None for g in results], measure.backend
        ctx.save_for_backward(*(g for g in results if g is not None))
        ctx.mark_non_differentiable(table)
        return measure.loss(table, constants, weights), table

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_backward(ctx, "linear_distillation_loss")
        saved = iter(ctx.saved_tensors)
        results = [library.scaled(next(saved), upstream, ctx.backend) if given else None for given in ctx.given]
        return (*results, *(None,) * 8)


def _no_rows(hidden: Tensor, measure: Measure, dtype: torch.dtype) -> Tensor:
    return hidden.new_zeros(len(DIVERGENCE_STATS) + int(measure.beta is not None), 0, dtype=dtype)


def formulas(hidden: Tensor, head: LMHead, ids: Tensor, t: Tensor, t_other: Tensor, other: OtherHead, heads: Heads) -> tuple[Tensor, ...]:
    """The outputs of :class:`LinearDivergences` as differentiable torch."""
    keep, measure = ids != OUT, heads.measure
    z = again.head_logits(hidden, head, keep, heads.own)
    y = again.other_logits(other.values, other.head, other.picked, keep, heads.other)
    return again.divergence_stats((z, y, ids, t, t_other), measure.softmaxes, False, measure.beta)
