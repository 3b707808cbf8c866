"""Custom ops of the verbs on two logits tensors, with fakes, and the autograd Functions on top of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.base import DIVERGENCE_STATS, DivergenceInputs, Head
from ..backends.select import load
from ..calls.two_logits import TwoHeads
from .autograd import hand_out_once
from .ops import clear_last, gradient_ops, may_overwrite, op, row_dtype, scaled, with_ids


def _two(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, vocab: int, cap: float, other_cap: float, drop: bool
) -> DivergenceInputs:
    return DivergenceInputs(with_ids(logits, drop), other, ids, t, t_other, Head(vocab, cap), Head(vocab, other_cap))


def _fake_table(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(DIVERGENCE_STATS), ids.numel()), dtype=row_dtype(logits))


@op(_fake_table)
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
    return load(backend).divergence_stats(_two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop))


def _write_grad(
    out: Tensor, logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, table: Tensor, coefs: Tensor, vocab: int, cap: float,
    other_cap: float, drop: bool, backend: str,
) -> None:  # fmt: skip
    load(backend).divergence_grad(_two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop), table, coefs, with_ids(out, drop))
    clear_last(out, drop)


divergence_grad, divergence_grad_ = gradient_ops("divergence_grad", _write_grad)


def _write_loss_grad(
    out: Tensor, logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, constants: Tensor, weights: Tensor, vocab: int,
    cap: float, other_cap: float, drop: bool, backend: str,
) -> Tensor:  # fmt: skip
    two = _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop)
    table = load(backend).divergence_loss_grad(two, constants, weights, with_ids(out, drop))
    clear_last(out, drop)
    return table


divergence_loss_grad, divergence_loss_grad_ = gradient_ops("divergence_loss_grad", _write_loss_grad, _fake_table)


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
        if may_overwrite(ctx.consume):
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
        ctx.backend = heads.backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(table)
        return weighted_sum(table, constants, weights), table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        hand_out_once(ctx, "distillation_loss")
        (grad,) = ctx.saved_tensors
        return scaled(grad, upstream, ctx.backend), None, None, None, None, None, None, None, None


def weighted_sum(table: Tensor, constants: Tensor, weights: Tensor) -> Tensor:
    """``Σ_i w_i·Σ_k c_k·table[k, i]``; a factor of 0 selects 0, also beside an infinite divergence."""
    terms = torch.where(constants[:, None] == 0, 0, constants[:, None] * table[:3]).sum(0)
    return torch.where(weights == 0, 0, weights * terms).sum()
