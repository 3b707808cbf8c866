"""Resolution of how a call's rows of logits become distributions:
``x = cap·tanh(z/cap)/T`` over ``vocab_size`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ...errors import InvalidCall, UnsupportedRequest
from ..backends.base import SoftmaxParams
from ..rows.constants import as_tensor, at_hand, parameter_vector, varies
from ..rows.ranks import check_group
from ..rows.rows import Rows
from ..rows.structure import is_readable
from .keywords import SoftmaxOptions
from .vocab_group import ANY_ID

Fail = Callable[[str], InvalidCall]


def refuse_process_group(op: str, process_group: Any, why: str) -> None:
    """Refuse a call that several processes cannot make together. Every refusal goes
    through here.
    """
    if process_group is not None:
        raise UnsupportedRequest(f"{op}: process_group: {why}")


def resolve_softmax(op: str, options: SoftmaxOptions, columns: int, fail: Fail) -> SoftmaxParams:
    """Return the softmax over logits with that many columns.

    For a shard it is that of its own columns until the ranks have agreed.
    """
    if options.process_group is not None:
        check_group(op, "process_group", options.process_group)
        return SoftmaxParams(
            columns, resolve_softcap(options.softcap), 0, options.vocab_size or ANY_ID
        )
    vocab_size = columns if options.vocab_size is None else options.vocab_size
    if not 0 < vocab_size <= columns:
        raise fail(f"vocab_size is {vocab_size}, logits have {columns} columns.")
    return SoftmaxParams(vocab_size, resolve_softcap(options.softcap))


def resolve_softcap(value: float | None) -> float:
    """Return the soft cap. inf disables it."""
    return math.inf if value is None else float(value)


def refuse_learnt(value: Any, fail: Fail, name: str = "temperature") -> None:
    """Raise if an op would drop the gradient by a number."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise fail(
            f"{name} requires grad, but no gradient of this op flows to it: pass it detached."
        )


def resolve_temperature(rows: Rows, value: Any, fail: Fail) -> Tensor:
    """Return the temperature as ``[1]`` or ``[N]`` in the row dtype, in the caller's
    graph.
    """
    given, value = value, at_hand(value, rows.device)
    if value is not given and not 0 < value < math.inf:
        raise fail(f"temperature is {value}, expected a positive number.")
    if isinstance(value, Tensor):
        found = (
            value.to(rows.dtype).view(1)
            if value.dim() == 0
            else rows.flatten_per_token("temperature", value)
        )
        if is_readable(found):
            _check_temperature(found, rows, fail)
            return found
        # NaN in its rows: one operation, and no wait for a GPU
        return threshold(found, 0.0, math.nan)
    if varies(value):
        return resolve_temperature(rows, as_tensor(value, rows.dtype, rows.device), fail)
    return parameter_vector((value,), rows.dtype, rows.device)


def resolve_logit_scale(value: Any, softmax: SoftmaxParams, fail: Fail) -> Any:
    """Return the factor of the logits, a positive number or a 0-d tensor.

    It is NaN for a tensor that is not positive and cannot be read.
    """
    if not isinstance(value, Tensor):
        return value
    if value.dim() != 0:
        raise fail(
            f"logit_scale has shape {tuple(value.shape)}, expected a number or a 0-d tensor."
        )
    if math.isfinite(softmax.softcap):
        raise fail(
            "logit_scale is a tensor, but softcap is a number and is divided by it: pass "
            "logit_scale as a number."
        )
    if is_readable(value):
        if not 0 < float(value.detach()) < math.inf:
            raise fail(f"logit_scale is {float(value.detach())}, expected a positive number.")
        return value
    return threshold(value, 0.0, math.nan)


def _check_temperature(temperature: Tensor, rows: Rows, fail: Fail) -> None:
    bad = rows.keep & ~((temperature > 0) & (temperature < math.inf))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        at = temperature[row if temperature.numel() > 1 else 0]
        raise fail(f"temperature is {float(at)} in row {row} (flat), expected a positive number.")
