"""Losses without a kernel: a per-row formula in torch that is evaluated and
differentiated a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..calls.logits import Logits
from ..calls.softmax import refuse_learnt
from ..calls.two_logits import TwoLogits
from ..rows.rows import Rows
from ..transforms import in_transform
from . import again
from .run import Call
from .source import PlainSource, SourceInfo
from .statistics import StatisticsObjective

#: The number of elements of a chunk. With the dozen temporaries of a formula in fp32 it
#: takes about a gigabyte at most.
CHUNK_ELEMENTS = 1 << 24

Formula = Callable[..., Tensor]  # x [n, V], then whatever else per row -> [n]


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
        *rest: Tensor,
    ) -> Tensor:
        ctx.formula, ctx.prepare = formula, prepare
        ctx.save_for_backward(z, keep, *rest)
        step = max(CHUNK_ELEMENTS // max(z.size(-1), 1), 1)
        parts = [
            formula(prepare(z[i : i + step], i), *(r[i : i + step] for r in rest))
            for i in range(0, z.size(0), step)
        ]
        return torch.where(keep, torch.cat(parts) if parts else z.new_zeros(0), 0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, keep, *rest = ctx.saved_tensors
        if again.wants_graph():
            return again.gradient(
                lambda x: (_whole(x, keep, ctx.formula, ctx.prepare, *rest),), (z,), (upstream,)
            )[0], *(None,) * (3 + len(rest))
        out = torch.empty_like(z)
        step = max(CHUNK_ELEMENTS // max(z.size(-1), 1), 1)
        for i in range(0, z.size(0), step):
            with torch.enable_grad():
                part = z[i : i + step].detach().requires_grad_()
                x = ctx.prepare(part, i)
                value = ctx.formula(x, *(r[i : i + step] for r in rest))
            selected = keep[i : i + step] & (upstream[i : i + step] != 0)
            (grad,) = torch.autograd.grad(
                value, part, torch.where(selected, upstream[i : i + step], 0)
            )
            # As the kernels': NaN in every column of a row that is selected and has no
            # value, 0 in one that is not selected.
            columns = grad[:, : x.size(-1)]
            columns[:] = torch.where(
                value.isnan()[:, None],
                torch.nan,
                torch.where(part[:, : x.size(-1)] > -torch.inf, columns, 0),
            )
            out[i : i + step] = torch.where(selected[:, None], grad, 0)
        return out, None, None, None, *(None for _ in rest)


def _whole(
    z: Tensor, keep: Tensor, formula: Formula, prepare: Callable[..., Tensor], *rest: Tensor
) -> Tensor:
    """Evaluate the formula on all rows, so that autograd can differentiate it any
    number of times.
    """
    # no gradient to columns without mass
    x = torch.where(z == -torch.inf, -torch.inf, z)
    return torch.where(keep, formula(prepare(x, 0), *rest), 0)


@dataclass(frozen=True)
class FormulaSource(PlainSource):
    """``formula(x, [y,] *more)`` of every valid row, under the name ``value``.

    x and y are capped and divided by their temperatures. ``more`` has ``[N, ...]``
    tensors.

    ``more``: ``[N, ...]`` tensors.
    """

    logits: Logits | TwoLogits
    formula: Formula
    more: tuple[Tensor, ...] = ()

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
        p, rows = self.p, self.rows
        refuse_learnt(p.temperature, rows.error)
        refuse_consumed(p)
        # In an ignored row the formula sees zeros.
        values = p.values[..., :-1, :] if p.drop_last else p.values
        z = torch.where(rows.keep[:, None], values.reshape(rows.count, values.size(-1)), 0)
        temperature = p.temperature.expand(rows.count)

        def prepare(part: Tensor, i: int) -> Tensor:
            return _x(part, rows.dtype, p.softmax, temperature[i : i + len(part)])

        formula, more = self.formula, self.more
        if isinstance(self.logits, TwoLogits):
            two = self.logits
            more = (
                two.other.reshape(rows.count, two.other.size(-1)),
                two.other_temperature.expand(rows.count),
                rows.keep,
                *more,
            )

            def formula(x: Tensor, y: Tensor, t: Tensor, inside: Tensor, *rest: Tensor) -> Tensor:
                return self.formula(
                    x,
                    _x(torch.where(inside[:, None], y, 0), rows.dtype, two.other_softmax, t),
                    *rest,
                )

        # the compiler chooses its own chunks
        if in_transform() or torch.compiler.is_compiling():
            return {"value": _whole(z, rows.keep, formula, prepare, *more)}
        return {"value": ChunkedRows.apply(z, rows.keep, formula, prepare, *more)}  # type: ignore[no-untyped-call]


def refuse_consumed(p: Logits) -> None:
    if p.consume:
        raise p.rows.error(
            "consume_logits=True has no effect: this loss does not write over its logits."
        )


def formula_call(source: FormulaSource) -> Call[Tensor]:
    """Return the call of an op that returns the formula's value per
    token, of shape R."""
    if source.p.shard is not None:
        raise source.rows.unsupported(
            "process_group: this loss is a formula of whole rows in PyTorch, and no rank has one."
        )
    return Call(
        source, StatisticsObjective(("value",), lambda found: source.rows.unflatten(found["value"]))
    )
