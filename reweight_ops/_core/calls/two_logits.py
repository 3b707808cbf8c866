"""Resolution of two logits tensors of a call: the rows, and how each becomes
distributions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.base import SoftmaxParams
from ..rows.groups import describe
from . import consumed
from .keywords import SoftmaxOptions
from .logits import Logits, collapsed, resolve_logits
from .sampling_mask import refuse_sampling_mask
from .softmax import Fail, refuse_learnt, resolve_softcap, resolve_temperature

#: The reason why kept sets have no divergence.
NO_TWO = (
    "a divergence compares two distributions over the whole vocabulary, and a mask belongs "
    "to one of them"
)


@dataclass(frozen=True)
class TwoLogits:
    """The logits of p, the call's rows and options, and the inputs of q."""

    p: Logits
    other: Tensor
    other_temperature: Tensor
    other_softmax: SoftmaxParams


def check_other_logits(
    logits: Tensor,
    other: Tensor,
    shape: tuple[int, ...],
    vocab_size: int | None,
    fail: Fail,
    sharded: bool = False,
) -> None:
    """Check the device, dtype and columns of ``other_logits``, ``shape + (V,)``,
    against logits of any rows.
    """
    if other.device != logits.device:
        raise fail(f"other_logits are on {other.device}, logits on {logits.device}.")
    if (
        not other.is_floating_point()
        or other.dtype.itemsize < 2
        or (other.dtype == torch.float64) != (logits.dtype == torch.float64)
    ):
        raise fail(
            f"other_logits are {other.dtype}, logits {logits.dtype}; expected fp16, bf16 or "
            "fp32, or fp64 for both."
        )
    if other.requires_grad and torch.is_grad_enabled():
        raise fail("other_logits require grad, but no gradient flows to them: pass them detached.")
    if tuple(other.shape[:-1]) != shape:
        raise fail(f"other_logits has shape {tuple(other.shape)}, expected {shape} + (V,).")
    check_columns(logits.shape[-1], other.shape[-1], vocab_size, fail, sharded)
    if other.stride(-1) != 1 and other.shape[-1] > 1:
        raise fail(
            "the last dimension of other_logits is not contiguous: pass other_logits.contiguous()."
        )
    if consumed.is_consumed(other):
        raise fail(
            "other_logits were consumed by an earlier call with consume_logits=True: they hold "
            "a gradient now."
        )


def check_columns(
    columns: int, other_columns: int, vocab_size: int | None, fail: Fail, sharded: bool = False
) -> None:
    """Check that both softmaxes are over the same columns.

    If they are ``sharded``, this rank has the same columns of both.
    """
    if sharded:
        if columns != other_columns:
            raise fail(
                f"logits have {columns} columns on this rank, other_logits {other_columns}: "
                "shard both vocabularies alike."
            )
        return
    if vocab_size is None and other_columns != columns:
        raise fail(
            f"logits have {columns} columns, other_logits {other_columns}: pass vocab_size, the "
            "columns of both softmaxes."
        )
    if vocab_size is not None and other_columns < vocab_size:
        raise fail(f"vocab_size is {vocab_size}, other_logits have {other_columns} columns.")


def resolve_two_logits(
    op: str,
    logits: Any,
    other: Any,
    mask: Any,
    options: SoftmaxOptions,
    other_temperature: Any,
    other_softcap: Any,
    more: dict[str, Any],
) -> TwoLogits:
    """Check the two tensors against each other.

    Without ``completion_ids`` in ``more``, ``mask`` alone tells which rows are valid.
    """
    refuse_sampling_mask(op, options, NO_TWO)
    tensors = {
        "logits": logits,
        "other_logits": other,
        "completion_mask": mask,
        "temperature": options.temperature,
        **more,
    }

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name in ("logits", "other_logits"):
        if not isinstance(tensors[name], Tensor) or tensors[name].dim() < 2:
            raise fail(f"{name} must be a tensor R + (V,).")
    shape = list(logits.shape[:-1])
    shape[-1] -= int(options.drop_last)
    ids = more.get("completion_ids", torch.zeros(shape, dtype=torch.int64, device=logits.device))
    call = resolve_logits(op, logits, ids, options, tensors)
    if options.drop_last and isinstance(other, Tensor) and other.shape[:-1] == logits.shape[:-1]:
        other = other[..., :-1, :]
    check_other_logits(
        logits, other, tuple(shape), options.vocab_size, fail, call.shard is not None
    )
    if call.consume and consumed.is_overwritten(other, call.original):
        raise fail(
            "consume_logits=True would overwrite other_logits, which overlap the logits and are "
            "not the same view of them: pass other_logits.clone()."
        )
    softmax = SoftmaxParams(call.softmax.vocab_size, resolve_softcap(other_softcap))
    temperature = (
        call.temperature
        if other_temperature is None
        else resolve_temperature(call.rows, other_temperature, fail)
    )
    # Both may be one tensor, also where the caller gives a number twice. torch.compile
    # does not take a tensor twice, but takes a view of it.
    temperature = temperature.view(-1)
    refuse_learnt(call.temperature, fail)
    refuse_learnt(temperature, fail, "other_temperature")
    return TwoLogits(call, collapsed("other_logits", other, fail), temperature, softmax)
