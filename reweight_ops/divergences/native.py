"""Two logits tensors in a compiled backend. Every argument is checked here: the modules take raw addresses and check nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.native import Native
from ..errors import InvalidCall
from .verbs import COEFS, TABLE, Two


class NativeDivergence:
    """The verbs of :class:`~.verbs.DivergenceBackend` by the module of a :class:`~..backends.native.Native`."""

    def __init__(self, native: Native) -> None:
        self._native, self._module = native, native.module

    def _calls(self, two: Two) -> tuple[Any, Any]:
        rows = [t.shape[:-1] for t in (two.logits, two.other)]
        if rows[0] != rows[1] or two.head.vocab_size != two.other_head.vocab_size:
            raise InvalidCall(f"the two logits tensors are {tuple(two.logits.shape)} and {tuple(two.other.shape)}: other rows or columns.")
        if two.logits.device != two.other.device:
            raise InvalidCall(f"the two logits tensors are on {two.logits.device} and {two.other.device}.")
        return (
            self._native._call(two.logits, two.ids, two.temperature, two.head),
            self._native._call(two.other, two.ids, two.other_temperature, two.other_head),
        )

    def stats(self, two: Two) -> Tensor:
        calls = self._calls(two)
        table, (address, *_) = self._native._rows(TABLE, two.logits, two.ids.numel())
        self._native._check(self._module.divergence_stats(*calls, address))
        return table

    def grad(self, two: Two, table: Tensor, coefs: Tensor, out: Tensor) -> None:
        n, like = two.ids.numel(), two.logits
        known = self._native._address("table", table, (len(TABLE), n), like)
        by = self._native._address("coefs", coefs, (len(COEFS), n), like)
        strides = self._native._out_rows(like, out)
        self._native._check(self._module.divergence_grad(*self._calls(two), known, by, out.data_ptr(), strides))

    def loss_grad(self, two: Two, constants: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        n, like = two.ids.numel(), two.logits
        table, (address, *_) = self._native._rows(TABLE, like, n)
        given = (
            self._native._address("constants", constants, (len(COEFS),), like),
            self._native._address("weights", weights, (n,), like),
        )
        strides = self._native._out_rows(like, out)
        self._native._check(self._module.divergence_loss_grad(*self._calls(two), address, *given, out.data_ptr(), strides))
        return table
