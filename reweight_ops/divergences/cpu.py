"""The C++ kernels on two logits tensors. Every argument is checked here: the module takes raw addresses and checks nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import _C, _native
from ..backends.native import DTYPES
from ..errors import InvalidCall
from .verbs import COEFS, TABLE, DivergenceBackend, Two


def _unsupported_reason(device: torch.device, dtype: torch.dtype, other: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"logits are on {device}, this backend runs on the CPU"
    wrong = [str(d) for d in (dtype, other) if d not in DTYPES]
    return f"logits are {', '.join(wrong)}, expected fp32, bf16 or fp16" if wrong else None


def _calls(two: Two) -> tuple[Any, Any]:
    rows = [t.shape[:-1] for t in (two.logits, two.other)]
    if rows[0] != rows[1] or two.head.vocab_size != two.other_head.vocab_size:
        raise InvalidCall(f"the two logits tensors are {tuple(two.logits.shape)} and {tuple(two.other.shape)}: other rows or columns.")
    return (
        _native._call(two.logits, two.ids, two.temperature, two.head),
        _native._call(two.other, two.ids, two.other_temperature, two.other_head),
    )


def _vectors(name: str, t: Tensor, shape: tuple[int, ...], two: Two) -> int:
    return _native._address(name, t, shape, two.logits)


def stats(two: Two) -> Tensor:
    calls = _calls(two)
    table = torch.empty(len(TABLE), two.ids.numel())
    _C.divergence_stats(*calls, table.data_ptr())
    return table


def grad(two: Two, table: Tensor, coefs: Tensor, out: Tensor) -> None:
    n = two.ids.numel()
    known, by = _vectors("table", table, (len(TABLE), n), two), _vectors("coefs", coefs, (len(COEFS), n), two)
    _C.divergence_grad(*_calls(two), known, by, out.data_ptr(), _native._out_strides(two.logits, out))


def loss_grad(two: Two, constants: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    n = two.ids.numel()
    table = torch.empty(len(TABLE), n)
    given = _vectors("constants", constants, (len(COEFS),), two), _vectors("weights", weights, (n,), two)
    _C.divergence_loss_grad(*_calls(two), table.data_ptr(), *given, out.data_ptr(), _native._out_strides(two.logits, out))
    return table


BACKEND = DivergenceBackend("cpu", _unsupported_reason, stats, grad, loss_grad)
