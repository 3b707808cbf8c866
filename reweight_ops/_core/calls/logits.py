"""Resolution of the logits of a call: their dimensions, how a row becomes a
distribution, and whether the tensor may be overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.base import SoftmaxParams
from ..backends.select import row_primitives
from ..rows.groups import describe
from ..rows.resolve import resolve_rows
from ..rows.rows import Rows
from . import consumed
from .keywords import SoftmaxOptions
from .sampling_mask import KeptSets, mask_tensors, resolve_sampling_mask
from .softmax import Fail, resolve_softmax, resolve_temperature
from .vocab_group import VocabGroup, vocab_group


@dataclass(frozen=True)
class Logits:
    """The logits of a call: ``values`` as ``[N, V]`` or ``[B, T(+1), V]`` (a view), the
    ids of its rows, and their softmax.

    ``temperature`` is ``[1]`` or ``[N]``. ``backend`` is the one that the caller
    requested. With ``kept``, the distribution of a row is over its set, and ``ids`` are
    places in that set.
    """

    values: Tensor
    rows: Rows
    ids: Tensor
    temperature: Tensor
    softmax: SoftmaxParams
    drop_last: bool
    consume: bool
    backend: str
    original: Tensor
    kept: KeptSets | None = None
    # a vocabulary over several ranks, each with its columns
    shard: VocabGroup | None = None

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and (
            self.values.requires_grad or self.temperature.requires_grad
        )

    def mark_consumed(self) -> None:
        if self.consume:
            consumed.mark(self.original)


def resolve_logits(
    op: str,
    logits: Any,
    completion_ids: Any,
    options: SoftmaxOptions,
    data: dict[str, Any],
    validate: bool = False,
) -> Logits:
    """Check logits against ids and resolve the rows.

    ``data`` holds the other tensors of the call by their public names.
    """
    tensors = {
        "logits": logits,
        "completion_ids": completion_ids,
        "temperature": options.temperature,
        **data,
    }
    if options.sampling_mask is not None:
        tensors |= mask_tensors(options.sampling_mask)

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name in ("logits", "completion_ids"):
        if not isinstance(tensors[name], Tensor):
            raise fail(f"{name} is a {type(tensors[name]).__name__}, expected a tensor.")
    if not logits.is_floating_point() or logits.dtype.itemsize < 2:
        raise fail(f"logits are {logits.dtype}, expected fp16, bf16, fp32 or fp64.")
    if completion_ids.dtype not in (torch.int32, torch.int64):
        raise fail(f"completion_ids are {completion_ids.dtype}, expected int32 or int64.")
    if completion_ids.device != logits.device:
        raise fail(f"completion_ids are on {completion_ids.device}, logits on {logits.device}.")
    if consumed.is_consumed(logits):
        raise fail(
            "these logits were consumed by an earlier call with consume_logits=True: they hold "
            "a gradient now."
        )

    shape = tuple(completion_ids.shape)
    if logits.dim() != len(shape) + 1 or logits.shape[: max(len(shape) - 1, 0)] != shape[:-1]:
        raise fail(
            f"logits has shape {tuple(logits.shape)}; completion_ids is {shape}, so expected "
            f"{shape} + (V,)."
        )
    if not shape:
        raise fail("completion_ids has no dimension; expected [N] or [B, T].")
    positions, expected = logits.shape[-2], shape[-1] + int(options.drop_last)
    if positions != expected:
        hint = ""
        if not options.drop_last and positions == shape[-1] + 1:
            hint = "pass drop_last=True (no copy in backward), or logits[:, :-1]"
        elif options.drop_last and positions == shape[-1]:
            hint = "they match already, so drop drop_last=True"
        raise fail(
            f"logits has {positions} positions, completion_ids {shape[-1]}: "
            f"{hint or f'expected {expected}'}."
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise fail(
            "the last dimension of logits is not contiguous (any other stride is fine): pass "
            "logits.contiguous()."
        )

    softmax = resolve_softmax(op, options, logits.shape[-1], fail)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    primitives = row_primitives(logits, options.backend)
    rows = resolve_rows(
        op, shape, logits.device, dtype, tensors, softmax.total(), validate, primitives
    )
    assert rows.ids is not None
    sampled = resolve_sampling_mask(rows, options, softmax.total(), validate, fail)
    consume = options.consume_logits and torch.is_grad_enabled() and logits.requires_grad
    if consume and logits.is_leaf:
        raise fail(
            "consume_logits=True would overwrite a leaf that requires grad; use it only for "
            "logits that a model computed."
        )
    ids, kept = (rows.ids, None) if sampled is None else (sampled.position, sampled.sets)
    return Logits(
        collapsed("logits", logits, fail),
        rows,
        ids,
        resolve_temperature(rows, options.temperature, fail),
        softmax,
        options.drop_last,
        consume,
        options.backend,
        logits,
        kept,
        vocab_group(options, logits.shape[-1]),
    )


def collapsed(name: str, logits: Tensor, fail: Fail) -> Tensor:
    """Logits with at most two leading dimensions, as a view."""
    if logits.dim() <= 3:
        return logits
    try:
        return logits.view(-1, *logits.shape[-2:])
    except RuntimeError:
        raise fail(
            f"the leading dimensions of {name}, with strides {logits.stride()}, do not form a "
            f"single batch dimension: pass {name}.contiguous() or [B, T, V]."
        ) from None
