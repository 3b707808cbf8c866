"""Two logits tensors in a compiled backend.

Every argument is checked here, because the modules take raw addresses and check
nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import InvalidCall
from .base import DIVERGENCE_DERIVATIVES, DIVERGENCE_STATS, DivergenceInputs
from .native import Native


class NativeDivergence:
    """The divergence primitives of :class:`~.base.Backend` by the module of a
    :class:`~.native.Native`.
    """

    def __init__(self, native: Native) -> None:
        self._native, self._module = native, native.module

    def _calls(self, two: DivergenceInputs) -> tuple[Any, Any]:
        rows = [t.shape[:-1] for t in (two.logits, two.other)]
        if rows[0] != rows[1] or two.softmax.vocab_size != two.other_softmax.vocab_size:
            raise InvalidCall(
                f"the two logits tensors are {tuple(two.logits.shape)} and "
                f"{tuple(two.other.shape)}: their rows or columns differ."
            )
        if two.logits.device != two.other.device:
            raise InvalidCall(
                f"the two logits tensors are on {two.logits.device} and {two.other.device}."
            )
        return (
            self._native.call(two.logits, two.ids, two.temperature, two.softmax),
            self._native.call(two.other, two.ids, two.other_temperature, two.other_softmax),
        )

    def divergence_stats(self, two: DivergenceInputs) -> Tensor:
        calls = self._calls(two)
        table, (address, *_) = self._native.rows(DIVERGENCE_STATS, two.logits, two.ids.numel())
        self._native.check(self._module.divergence_stats(*calls, address))
        return table

    def divergence_grad(
        self, two: DivergenceInputs, table: Tensor, derivatives: Tensor, out: Tensor
    ) -> None:
        n, like = two.ids.numel(), two.logits
        known = self._native.address("table", table, (len(DIVERGENCE_STATS), n), like)
        by = self._native.address(
            "derivatives", derivatives, (len(DIVERGENCE_DERIVATIVES), n), like
        )
        strides = self._native.out_rows(like, out)
        self._native.check(
            self._module.divergence_grad(*self._calls(two), known, by, out.data_ptr(), strides)
        )

    def divergence_loss_grad(
        self, two: DivergenceInputs, constants: Tensor, weights: Tensor, out: Tensor
    ) -> Tensor:
        n, like = two.ids.numel(), two.logits
        table, (address, *_) = self._native.rows(DIVERGENCE_STATS, like, n)
        given = (
            self._native.address("constants", constants, (len(DIVERGENCE_DERIVATIVES),), like),
            self._native.address("weights", weights, (n,), like),
        )
        strides = self._native.out_rows(like, out)
        self._native.check(
            self._module.divergence_loss_grad(
                *self._calls(two), address, *given, out.data_ptr(), strides
            )
        )
        return table
