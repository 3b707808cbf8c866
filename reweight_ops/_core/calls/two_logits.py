"""Two logits tensors of a call, resolved: the rows, and how each becomes distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.select import choose_divergence
from ..rows.groups import describe
from .keywords import HeadOptions
from .logits import LogitsCall, resolve_logits, temperature_rows


class TwoHeads(NamedTuple):
    """What of a call crosses the op boundary beside tensors."""

    vocab_size: int
    softcap: float
    other_softcap: float
    drop_last: bool
    backend: str


@dataclass(frozen=True)
class TwoCall:
    """A resolved call: the logits of p, and what belongs to q."""

    p: LogitsCall
    other: Tensor
    other_temperature: Tensor
    heads: TwoHeads

    @property
    def arguments(self) -> tuple[Any, ...]:
        assert self.p.rows.ids is not None
        return self.p.logits, self.other, self.p.rows.ids, self.p.temperature, self.other_temperature


def resolve_two(
    op: str, logits: Any, other: Any, mask: Any, options: HeadOptions, other_temperature: Any, other_softcap: Any, more: dict[str, Any]
) -> TwoCall:
    """Check the two tensors against each other. Without ``completion_ids`` in ``more``, ``mask`` alone says which rows are in."""
    tensors = {"logits": logits, "other_logits": other, "completion_mask": mask, "temperature": options.temperature, **more}

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name in ("logits", "other_logits"):
        if not isinstance(tensors[name], Tensor) or tensors[name].dim() < 2:
            raise fail(f"{name} must be a tensor R + (V,).")
    shape = list(logits.shape[:-1])
    shape[-1] -= int(options.drop_last)
    ids = more.get("completion_ids", torch.zeros(shape, dtype=torch.int64, device=logits.device))
    call = resolve_logits(op, logits, ids, options, tensors)
    if other.device != logits.device:
        raise fail(f"other_logits are on {other.device}, logits on {logits.device}.")
    if not other.is_floating_point() or other.dtype.itemsize < 2 or (other.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise fail(f"other_logits are {other.dtype}, logits {logits.dtype}; expected fp16, bf16 or fp32, or fp64 for both.")
    if other.requires_grad and torch.is_grad_enabled():
        raise fail("other_logits require grad, but no gradient flows to them: pass them detached.")
    if options.drop_last and other.shape[:-1] == logits.shape[:-1]:
        other = other[..., :-1, :]
    if list(other.shape[:-1]) != shape:
        raise fail(f"other_logits has shape {tuple(other.shape)}, expected {tuple(shape)} + (V,).")
    if options.vocab_size is None and other.shape[-1] != logits.shape[-1]:
        raise fail(
            f"logits have {logits.shape[-1]} columns, other_logits {other.shape[-1]}: pass vocab_size, the columns of both softmaxes."
        )
    if other.shape[-1] < call.vocab_size:
        raise fail(f"vocab_size is {call.vocab_size}, other_logits have {other.shape[-1]} columns.")
    if other.stride(-1) != 1 and other.shape[-1] > 1:
        raise fail("the last dimension of other_logits is not contiguous: pass other_logits.contiguous().")
    cap = math.inf if other_softcap is None else float(other_softcap)
    if not cap > 0:
        raise fail(f"other_softcap is {other_softcap}, expected a positive number, or None for off.")
    # A view: torch.compile takes no tensor twice.
    temperature = call.temperature.view(-1) if other_temperature is None else temperature_rows(call.rows, other_temperature, fail)
    backend = choose_divergence(call.logits.device, call.logits.dtype, other.dtype, call.backend)
    heads = TwoHeads(call.vocab_size, call.softcap, cap, call.drop_last, backend)
    return TwoCall(call, _collapsed(other, fail), temperature, heads)


def _collapsed(other: Tensor, fail: Any) -> Tensor:
    if other.dim() <= 3:
        return other
    try:
        return other.view(-1, *other.shape[-2:])
    except RuntimeError:
        raise fail("the leading dimensions of other_logits are no single batch dimension: pass other_logits.contiguous().") from None
