"""Resolution of hidden states beside a second model's hidden states or logits.

It finds the rows that are computed, and how each becomes distributions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.base import SoftmaxParams
from ..rows.groups import describe
from .chunking import chunking
from .hidden import ChunkSettings, Hidden, LMHead, resolve_hidden
from .keywords import HiddenLogits, LMHeadOptions, SoftmaxOptions
from .logits import collapsed
from .sampling_mask import refuse_sampling_mask
from .softmax import Fail, refuse_learnt, resolve_softcap, resolve_temperature
from .two_logits import NO_TWO, check_columns, check_other_logits


@dataclass(frozen=True)
class OtherRows:
    """The frozen logits of q.

    ``values`` are the hidden states ``[M, D]`` of the computed rows. With ``head=None``
    they are the logits of all rows.
    """

    values: Tensor
    head: LMHead | None
    temperature: Tensor  # [1] or [M]
    softmax: SoftmaxParams
    settings: ChunkSettings

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype if self.head is None else self.settings.logits_dtype


@dataclass(frozen=True)
class TwoHidden:
    """The hidden states and head of p, the call's rows and options, and the inputs of
    q.
    """

    p: Hidden
    other: OtherRows


@dataclass(frozen=True)
class OtherOptions:
    """The keywords of q, and their names in messages."""

    temperature: Any
    softcap: float | None
    name: str = "other"


def no_ids(op: str, hidden: Any) -> Tensor:
    """Return ids for an op that does not take any. ``completion_mask`` alone tells
    which rows are valid.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        raise InvalidCall(f"{op}: hidden must be a tensor R + (D,).")
    return torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)


def resolve_two_hidden(
    op: str,
    hidden: Any,
    weight: Any,
    other: Any,
    mask: Any,
    head: LMHeadOptions,
    softmax: SoftmaxOptions,
    of_other: OtherOptions,
    named: dict[str, Any],
) -> TwoHidden:
    """Check the two models against each other.

    ``mask`` alone tells which rows are valid. ``named`` holds the other tensors of the
    call.
    """
    refuse_sampling_mask(op, softmax, NO_TWO)
    p = resolve_hidden(
        op, hidden, weight, no_ids(op, hidden), head, softmax, {"completion_mask": mask, **named}
    )
    tensors = {
        "hidden": hidden,
        "lm_head_weight": weight,
        of_other.name: other,
        "completion_mask": mask,
        **named,
    }
    return beside(p, tensors, other, mask, head, softmax, of_other)


def beside(
    p: Hidden,
    tensors: dict[str, Any],
    other: Any,
    mask: Any,
    head: LMHeadOptions,
    softmax: SoftmaxOptions,
    of_other: OtherOptions,
) -> TwoHidden:
    """Return resolved hidden states, and the second model for the same rows, those of
    ``mask``.

    ``tensors`` are those of the call, for messages.
    """
    op, weight = p.rows.op, p.head.weight

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    if isinstance(other, HiddenLogits):
        q = _other_head(op, p, other, mask, head, softmax, of_other, fail)
    elif isinstance(other, Tensor):
        q = _other_logits(p, weight, other, softmax, of_other, fail)
    else:
        raise fail(
            f"{of_other.name} is a {type(other).__name__}, expected a HiddenLogits, a "
            "TopKLogps, or logits R + (V,)."
        )
    refuse_learnt(p.temperature, fail)
    refuse_learnt(q.temperature, fail, f"{of_other.name}_temperature")
    return TwoHidden(*_chunked(p, q, head))


def _other_head(
    op: str,
    p: Hidden,
    other: HiddenLogits,
    mask: Any,
    head: LMHeadOptions,
    softmax: SoftmaxOptions,
    of_other: OtherOptions,
    fail: Fail,
) -> OtherRows:
    parts = {
        "hidden": other.hidden,
        "lm_head_weight": other.lm_head_weight,
        "lm_head_bias": other.lm_head_bias,
    }
    parts |= {} if other.lora is None else {"lora.a": other.lora[0], "lora.b": other.lora[1]}
    for name, x in parts.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise fail(
                f"{of_other.name}.{name} requires grad, but no gradient flows to it: pass it "
                "detached."
            )
    LMHeadOptions.__ranges__["logit_scale"].check(
        op, f"{of_other.name}.logit_scale", other.logit_scale
    )
    ids = torch.zeros(p.rows.shape, dtype=torch.int64, device=p.states.device)
    theirs = LMHeadOptions(
        lm_head_bias=other.lm_head_bias,
        logit_scale=other.logit_scale,
        logits_dtype=other.logits_dtype,
        lora=other.lora,
        row_index=head.row_index,
        compact_rows=head.compact_rows,
    )
    temperature = softmax.temperature if of_other.temperature is None else of_other.temperature
    options = SoftmaxOptions(
        temperature=temperature,
        softcap=of_other.softcap,
        vocab_size=softmax.vocab_size,
        backend=softmax.backend,
    )
    options = dataclasses.replace(options, process_group=softmax.process_group)
    q = resolve_hidden(
        f"{op}, {of_other.name}",
        other.hidden,
        other.lm_head_weight,
        ids,
        theirs,
        options,
        {"completion_mask": mask},
    )
    dtypes = (p.settings.logits_dtype, q.settings.logits_dtype)
    if q.states.device != p.states.device or (dtypes[0] == torch.float64) != (
        dtypes[1] == torch.float64
    ):
        raise fail(
            f"{of_other.name} has logits in {dtypes[1]} on {q.states.device}, expected "
            f"{p.states.device}, and fp64 for both or for none."
        )
    check_columns(
        p.head.weight.size(0), q.head.weight.size(0), softmax.vocab_size, fail, p.shard is not None
    )
    return OtherRows(q.states, q.head, q.temperature, q.settings.softmax, q.settings)


def _other_logits(
    p: Hidden,
    weight: Tensor,
    other: Tensor,
    softmax: SoftmaxOptions,
    of_other: OtherOptions,
    fail: Fail,
) -> OtherRows:
    like = torch.empty(0, weight.size(0), dtype=p.settings.logits_dtype, device=p.states.device)
    check_other_logits(like, other, p.rows.shape, softmax.vocab_size, fail, p.shard is not None)
    given = softmax.temperature if of_other.temperature is None else of_other.temperature
    temperature = resolve_temperature(p.rows, given, fail)
    if p.index is not None and temperature.size(-1) != 1:
        temperature = temperature[p.index]
    params = p.settings.softmax._replace(softcap=resolve_softcap(of_other.softcap))
    return OtherRows(
        collapsed(f"{of_other.name}_logits", other, fail), None, temperature, params, p.settings
    )


def _chunked(p: Hidden, q: OtherRows, head: LMHeadOptions) -> tuple[Hidden, OtherRows]:
    """Return both with the same chunks. Their budget is for the logits of
    both models."""
    row_bytes = p.head.weight.size(0) * p.settings.logits_dtype.itemsize
    if q.head is not None:
        row_bytes += q.head.weight.size(0) * q.settings.logits_dtype.itemsize
    size, keep = chunking(
        p.states.size(0), row_bytes, p.states.device, head.chunk_rows, head.memory_budget
    )
    # nothing is kept without a gradient or in a graph
    keep = keep if p.settings.keep_rows else 0
    own = p.settings._replace(chunk_rows=size, keep_rows=keep)
    return dataclasses.replace(p, settings=own), dataclasses.replace(
        q, settings=q.settings._replace(chunk_rows=size, keep_rows=keep)
    )
