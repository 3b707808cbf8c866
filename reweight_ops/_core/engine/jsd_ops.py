"""The generalised JSD of two logits tensors ``[N, V]`` as custom ops. :mod:`.ops` has
the divergences with kernels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import generalized_jsd as jsd
from ..backends.base import DivergenceInputs, SoftmaxParams
from .ops import gradient_ops, op, row_dtype


def _fake_values(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(ids.numel(), dtype=row_dtype(logits))


@op(_fake_values)
def generalized_jsd(
    logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, beta: float, vocab: int, cap: float, other_cap: float
) -> Tensor:
    two = DivergenceInputs(logits, other, ids, t, t_other, SoftmaxParams(vocab, cap), SoftmaxParams(vocab, other_cap))
    return jsd.generalized_jsd(two, beta)


def _write_gradient(
    out: Tensor, logits: Tensor, other: Tensor, ids: Tensor, t: Tensor, t_other: Tensor, weights: Tensor, beta: float, vocab: int, cap: float,
    other_cap: float,
) -> Tensor:  # fmt: skip
    two = DivergenceInputs(logits, other, ids, t, t_other, SoftmaxParams(vocab, cap), SoftmaxParams(vocab, other_cap))
    return jsd.generalized_jsd(two, beta, weights, out)


generalized_jsd_grad, generalized_jsd_grad_ = gradient_ops("generalized_jsd_grad", _write_gradient, _fake_values)
