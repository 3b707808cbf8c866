"""Custom ops of the verbs on two logits tensors, with fakes, and the autograd Functions on top of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from .. import library
from ..backends.base import Head
from ..errors import ReweightOpsError
from ..memory import empty
from .verbs import TABLE, Two, load


class TwoHeads(NamedTuple):
    """What of a call crosses the op boundary beside tensors."""

    vocab_size: int
    softcap: float
    other_softcap: float
    drop_last: bool
    backend: str


def _rows(t: Tensor, drop_last: bool) -> Tensor:
    return t[..., :-1, :] if drop_last else t


def _two(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, vocab: int, cap: float, other_cap: float, drop: bool
) -> Two:
    return Two(_rows(logits, drop), other, ids, t, t_other, Head(vocab, cap), Head(vocab, other_cap))


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _clear_last(out: Tensor, drop_last: bool) -> None:
    if drop_last:
        out[..., -1, :].zero_()


@custom_op("reweight_ops::divergence_stats", mutates_args=())
def divergence_stats(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
    backend: str,
) -> Tensor:
    return load(backend).stats(_two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop))


@divergence_stats.register_fake
def _(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(TABLE), ids.numel()), dtype=_row_dtype(logits))


@custom_op("reweight_ops::divergence_grad", mutates_args=())
def divergence_grad(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, table: Tensor, coefs: Tensor, vocab: int, cap: float, other_cap: float,
    drop: bool, backend: str,
) -> Tensor:  # fmt: skip
    out = empty(logits.shape, logits.dtype, logits.device)
    load(backend).grad(_two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop), table, coefs, _rows(out, drop))
    _clear_last(out, drop)
    return out


@divergence_grad.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@custom_op("reweight_ops::divergence_grad_", mutates_args=("logits",))
def divergence_grad_(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, table: Tensor, coefs: Tensor, vocab: int, cap: float, other_cap: float,
    drop: bool, backend: str,
) -> None:  # fmt: skip
    load(backend).grad(_two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop), table, coefs, _rows(logits, drop))
    _clear_last(logits, drop)


@divergence_grad_.register_fake
def _(*args: Any) -> None:
    return None


@custom_op("reweight_ops::divergence_loss_grad", mutates_args=())
def divergence_loss_grad(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, constants: Tensor, weights: Tensor, vocab: int, cap: float,
    other_cap: float, drop: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = empty(logits.shape, logits.dtype, logits.device)
    two = _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop)
    table = load(backend).loss_grad(two, constants, weights, _rows(out, drop))
    _clear_last(out, drop)
    return table, out


@divergence_loss_grad.register_fake
def _(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty((len(TABLE), ids.numel()), dtype=_row_dtype(logits)), logits.new_empty(logits.shape)


@custom_op("reweight_ops::divergence_loss_grad_", mutates_args=("logits",))
def divergence_loss_grad_(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, constants: Tensor, weights: Tensor, vocab: int, cap: float,
    other_cap: float, drop: bool, backend: str,
) -> Tensor:  # fmt: skip
    two = _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop)
    table = load(backend).loss_grad(two, constants, weights, _rows(logits, drop))
    _clear_last(logits, drop)
    return table


@divergence_loss_grad_.register_fake
def _(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(TABLE), ids.numel()), dtype=_row_dtype(logits))


class DivergenceStatistics(torch.autograd.Function):
    """``(KL(q‖p), KL(p‖q), H(p), H(q))`` of every row, ``[N]`` each; the first three are differentiable with respect to the logits of p."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, heads: TwoHeads, consume: bool
    ) -> tuple[Tensor, ...]:
        table = divergence_stats(logits, other, ids, t, t_other, *heads)
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.consume = heads, consume
        outputs = tuple(row.clone() for row in table[:4])
        ctx.mark_non_differentiable(outputs[3])
        ctx.save_for_backward(logits, other, ids, t, t_other, table)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads[:3]):
            return (None,) * 7
        *tensors, table = ctx.saved_tensors
        coefs = torch.stack([torch.zeros_like(table[0]) if g is None else g for g in grads[:3]])
        if ctx.consume:
            divergence_grad_(*tensors, table, coefs, *ctx.heads)
            return tensors[0], None, None, None, None, None, None
        return divergence_grad(*tensors, table, coefs, *ctx.heads), None, None, None, None, None, None


class OnePassDivergence(torch.autograd.Function):
    """``(Σ weights·Σ_k constants_k·stat_k, table)``: the gradient for upstream 1 is computed in forward; backward hands it out."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, constants: Tensor, weights: Tensor, heads: TwoHeads,
        consume: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        arguments = (logits, other, ids, t, t_other, constants, weights, *heads)
        if consume:
            table, grad = divergence_loss_grad_(*arguments), logits
        else:
            table, grad = divergence_loss_grad(*arguments)
        ctx.save_for_backward(grad)
        ctx.spent = False
        ctx.mark_non_differentiable(table)
        return weighted_sum(table, constants, weights), table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            if ctx.spent:
                raise ReweightOpsError(
                    'distillation_loss: a second backward; its gradient was handed out by the first. plan="two_pass" keeps the logits.'
                )
            ctx.spent = True
        (grad,) = ctx.saved_tensors
        library.scale_(grad, upstream)
        return grad, None, None, None, None, None, None, None, None


def weighted_sum(table: Tensor, constants: Tensor, weights: Tensor) -> Tensor:
    """``Σ_i w_i·Σ_k c_k·table[k, i]``; a factor of 0 selects 0, also beside an infinite divergence."""
    terms = torch.where(constants[:, None] == 0, 0, constants[:, None] * table[:3]).sum(0)
    return torch.where(weights == 0, 0, weights * terms).sum()
