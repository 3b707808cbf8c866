"""Losses that are not worth a kernel: a per-row formula in torch, evaluated and differentiated a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..calls.logits import LogitsCall

if TYPE_CHECKING:
    from ..calls.two_logits import TwoCall

#: Elements of a chunk: with the dozen temporaries of a formula in fp32 about a gigabyte at most.
CHUNK_ELEMENTS = 1 << 24

Formula = Callable[..., Tensor]  # x [n, V], then whatever else per row -> [n]


def _x(z: Tensor, dtype: torch.dtype, vocab: int, softcap: float, temperature: Tensor) -> Tensor:
    z = z[:, :vocab].to(dtype)
    if softcap < torch.inf:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return z / temperature[:, None]


class ChunkedRows(torch.autograd.Function):
    """``formula(x, *rest)`` of every row; backward evaluates it again, chunk by chunk, so memory is one chunk and the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, keep: Tensor, formula: Formula, prepare: Callable[..., Tensor], *rest: Tensor) -> Tensor:
        ctx.formula, ctx.prepare = formula, prepare
        ctx.save_for_backward(z, keep, *rest)
        step = max(CHUNK_ELEMENTS // max(z.size(-1), 1), 1)
        parts = [formula(prepare(z[i : i + step], i), *(r[i : i + step] for r in rest)) for i in range(0, z.size(0), step)]
        return torch.where(keep, torch.cat(parts) if parts else z.new_zeros(0), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, keep, *rest = ctx.saved_tensors
        out = torch.empty_like(z)
        step = max(CHUNK_ELEMENTS // max(z.size(-1), 1), 1)
        for i in range(0, z.size(0), step):
            with torch.enable_grad():
                part = z[i : i + step].detach().requires_grad_()
                value = ctx.formula(ctx.prepare(part, i), *(r[i : i + step] for r in rest))
            (grad,) = torch.autograd.grad(value, part, torch.where(keep[i : i + step], upstream[i : i + step], 0))
            out[i : i + step] = torch.where(keep[i : i + step, None] & (part > -torch.inf), grad, 0)
        return out, None, None, None, *(None for _ in rest)


def per_row(op: str, call: TwoCall | LogitsCall, formula: Formula, *more: Tensor) -> Tensor:
    """``formula(x, [y,] *more)`` of every row that is in, of shape R: x and y are capped and divided by their temperatures. ``more``: ``[N, ...]`` tensors."""
    p = call if isinstance(call, LogitsCall) else call.p
    if p.consume:
        raise p.rows.error("consume_logits=True: this loss is a composite that does not write over its logits.")
    rows, width = p.rows, p.logits.size(-1)
    # In a row that is out the formula sees zeros.
    logits = p.logits[..., :-1, :] if p.drop_last else p.logits
    z = logits.reshape(rows.count, width)
    z = torch.where(rows.keep[:, None], z, 0)
    temperature = p.temperature.expand(rows.count)

    def prepare(part: Tensor, i: int) -> Tensor:
        return _x(part, rows.dtype, p.vocab_size, p.softcap, temperature[i : i + len(part)])

    if isinstance(call, LogitsCall):
        return rows.unflatten(ChunkedRows.apply(z, rows.keep, formula, prepare, *more))  # type: ignore[no-untyped-call]
    other, other_temperature = call.other.reshape(rows.count, call.other.size(-1)), call.other_temperature.expand(rows.count)
    heads = call.heads

    def with_other(x: Tensor, y: Tensor, t: Tensor, inside: Tensor, *rest: Tensor) -> Tensor:
        return formula(x, _x(torch.where(inside[:, None], y, 0), rows.dtype, heads.vocab_size, heads.other_softcap, t), *rest)

    found = ChunkedRows.apply(z, rows.keep, with_other, prepare, other, other_temperature, rows.keep, *more)  # type: ignore[no-untyped-call]
    return rows.unflatten(found)
