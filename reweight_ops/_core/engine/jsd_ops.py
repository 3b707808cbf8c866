"""The generalised JSD of two logits tensors ``[N, V]`` as custom ops. :mod:`.ops` has
the divergences with kernels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import generalized_jsd as jsd
from ..backends.base import DivergenceInputs, SoftmaxParams
from .ops import clear_last, gradient_ops, op, row_dtype, without_last_position


def _fake_values(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(ids.numel(), dtype=row_dtype(logits))


@op(_fake_values)
def generalized_jsd(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    beta: float,
    vocab: int,
    cap: float,
    other_cap: float,
) -> Tensor:
    two = DivergenceInputs(
        logits, other, ids, t, t_other, SoftmaxParams(vocab, cap), SoftmaxParams(vocab, other_cap)
    )
    return jsd.generalized_jsd(two, beta)


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    weights: Tensor,
    beta: float,
    vocab: int,
    cap: float,
    other_cap: float,
) -> Tensor:
    two = DivergenceInputs(
        logits, other, ids, t, t_other, SoftmaxParams(vocab, cap), SoftmaxParams(vocab, other_cap)
    )
    return jsd.generalized_jsd(two, beta, weights, out)


generalized_jsd_grad, generalized_jsd_grad_ = gradient_ops(
    "generalized_jsd_grad", _write_gradient, _fake_values
)


def _fake_parts(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((2, ids.numel()), dtype=row_dtype(logits))


@op(_fake_parts)
def jsd_parts(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    known: Tensor,
    beta: float,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
) -> Tensor:
    """Of a shard of the vocabulary; ``known`` as in
    :func:`~reweight_ops._core.backends.generalized_jsd.to_the_mixture`.
    """
    return jsd.to_the_mixture(
        _flat(logits, other, ids, t, t_other, vocab, cap, other_cap, drop), beta, known=known
    )


def _write_part_gradient(
    out: Tensor,
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    known: Tensor,
    weights: Tensor,
    beta: float,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
) -> None:
    two, grad = (
        _flat(logits, other, ids, t, t_other, vocab, cap, other_cap, drop),
        without_last_position(out, drop),
    )
    rows = (
        grad
        if grad.dim() == 2
        else grad.flatten(0, 1)
        if grad.is_contiguous()
        else grad.new_empty(two.logits.shape)
    )
    jsd.to_the_mixture(two, beta, weights, rows, known)
    if rows.data_ptr() != grad.data_ptr():
        grad.copy_(rows.view(grad.shape))
    clear_last(out, drop)


def _flat(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
) -> DivergenceInputs:
    z, y = (
        x if x.dim() == 2 else x.reshape(-1, x.size(-1))
        for x in (without_last_position(logits, drop), other)
    )
    return DivergenceInputs(
        z, y, ids, t, t_other, SoftmaxParams(vocab, cap), SoftmaxParams(vocab, other_cap)
    )


jsd_parts_grad, jsd_parts_grad_ = gradient_ops("jsd_parts_grad", _write_part_gradient)
