"""The logits of a call, resolved: which dimension is what, how a row becomes a distribution, and whether the tensor may be overwritten."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..rows.constants import parameter_vector
from ..rows.groups import describe
from ..rows.rows import Rows, resolve_rows
from .keywords import HeadOptions

_CONSUMED = "_reweight_ops_consumed"


@dataclass(frozen=True)
class LogitsCall:
    """Logits as ``[N, V]`` or ``[B, T(+1), V]`` (a view), the rows, the temperature as ``[1]`` or ``[N]``."""

    logits: Tensor
    rows: Rows
    temperature: Tensor
    vocab_size: int
    softcap: float
    drop_last: bool
    consume: bool
    backend: str
    original: Tensor

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and self.logits.requires_grad

    def mark_consumed(self) -> None:
        if self.consume and not torch.compiler.is_compiling():
            setattr(self.original, _CONSUMED, True)


def resolve_logits(
    op: str, logits: Any, completion_ids: Any, options: HeadOptions, data: dict[str, Any], validate: bool = False
) -> LogitsCall:
    """Check logits against ids and resolve the rows. ``data`` holds the other tensors of the call by their public names."""
    tensors = {"logits": logits, "completion_ids": completion_ids, "temperature": options.temperature, **data}

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name in ("logits", "completion_ids"):
        if not isinstance(tensors[name], Tensor):
            raise fail(f"{name} is a {type(tensors[name]).__name__}, expected a tensor.")
    if options.process_group is not None:
        raise UnsupportedRequest(f"{op}: process_group: vocabulary-parallel logits are not supported yet; gather the vocabulary first.")
    if not logits.is_floating_point() or logits.dtype.itemsize < 2:
        raise fail(f"logits are {logits.dtype}, expected fp16, bf16, fp32 or fp64.")
    if completion_ids.dtype not in (torch.int32, torch.int64):
        raise fail(f"completion_ids are {completion_ids.dtype}, expected int32 or int64.")
    if completion_ids.device != logits.device:
        raise fail(f"completion_ids are on {completion_ids.device}, logits on {logits.device}.")
    if getattr(logits, _CONSUMED, False):
        raise fail("these logits were consumed by an earlier call with consume_logits=True: they hold a gradient now.")

    shape = tuple(completion_ids.shape)
    if logits.dim() != len(shape) + 1 or logits.shape[: max(len(shape) - 1, 0)] != shape[:-1]:
        raise fail(f"logits has shape {tuple(logits.shape)}; completion_ids is {shape}, so expected {shape} + (V,).")
    if not shape:
        raise fail("completion_ids has no dimension; expected [N] or [B, T].")
    positions, expected = logits.shape[-2], shape[-1] + int(options.drop_last)
    if positions != expected:
        hint = ""
        if not options.drop_last and positions == shape[-1] + 1:
            hint = "pass drop_last=True (no copy in backward), or logits[:, :-1]"
        elif options.drop_last and positions == shape[-1]:
            hint = "they match already, so drop drop_last=True"
        raise fail(f"logits has {positions} positions, completion_ids {shape[-1]}: {hint or f'expected {expected}'}.")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise fail("the last dimension of logits is not contiguous (any other stride is fine): pass logits.contiguous().")

    vocab_size, softcap = vocabulary(options, logits.shape[-1], fail)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = resolve_rows(op, shape, logits.device, dtype, tensors, vocab_size, validate)
    consume = options.consume_logits and torch.is_grad_enabled() and logits.requires_grad
    if consume and logits.is_leaf:
        raise fail("consume_logits=True would overwrite a leaf that requires grad; it is for logits that a model computed.")
    return LogitsCall(
        _collapsed(logits, fail),
        rows,
        temperature_rows(rows, options.temperature, fail),
        vocab_size,
        softcap,
        options.drop_last,
        consume,
        options.backend,
        logits,
    )


def _collapsed(logits: Tensor, fail: Any) -> Tensor:
    if logits.dim() <= 3:
        return logits
    try:
        return logits.view(-1, *logits.shape[-2:])
    except RuntimeError:
        raise fail(
            f"leading dimensions with strides {logits.stride()} are no single batch dimension: pass logits.contiguous() or [B, T, V]."
        ) from None


def vocabulary(options: HeadOptions, columns: int, fail: Any) -> tuple[int, float]:
    """``(vocab_size, softcap)`` of a head with that many columns; an off soft cap is inf."""
    vocab_size = columns if options.vocab_size is None else options.vocab_size
    if not 0 < vocab_size <= columns:
        raise fail(f"vocab_size is {vocab_size}, logits have {columns} columns.")
    softcap = math.inf if options.softcap is None else float(options.softcap)
    if not softcap > 0:
        raise fail(f"softcap is {options.softcap}, expected a positive number, or None for off.")
    return vocab_size, softcap


def temperature_rows(rows: Rows, value: Any, fail: Any) -> Tensor:
    """The temperature as ``[1]`` or ``[N]`` in the row dtype."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise fail("temperature requires grad, but no gradient flows to it: pass it detached.")
        return value.to(rows.dtype).view(1) if value.dim() == 0 else rows.per_row("temperature", value)
    if not value > 0 or math.isinf(value):
        raise fail(f"temperature is {value}, expected a positive number.")
    return parameter_vector((value,), rows.dtype, rows.device)
