"""Resolution of the hidden states and the LM head of a call: the rows that are
computed, and everything per row for them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.base import SoftmaxParams
from ..backends.select import row_primitives
from ..backends.shards import VocabShards
from ..ranges import Interval, Range
from ..rows.groups import describe
from ..rows.resolve import resolve_rows
from ..rows.rows import Rows
from ..rows.structure import Structure, is_readable
from ..transforms import in_transform
from .chunking import chunking
from .keywords import LMHeadOptions, Lora, SoftmaxOptions
from .released import refuse_released
from .sampling_mask import KeptSets, resolve_sampling_mask
from .softmax import Fail, resolve_logit_scale, resolve_softmax, resolve_temperature
from .vocab_group import VocabGroup, vocab_group

_LORA_SCALE = Range(Interval("(-inf, inf)", fixed=True), False, False)


class ChunkSettings(NamedTuple):
    """The settings of a chunk, which are not tensors."""

    softmax: SoftmaxParams
    backend: str
    chunk_rows: int
    logits_dtype: torch.dtype
    compute_dtype: torch.dtype  # of the GEMMs' operands
    lora_dtype: torch.dtype  # of the operands of the low-rank term
    # of the weight's gradient over chunks; None: chosen by the number of chunks
    accumulate_dtype: torch.dtype | None
    # whether rows without a coefficient may be counted on the host and dropped
    drop_zero_gradient: bool
    keep_rows: int  # two_pass keeps the logits of this many leading rows for backward
    # the shards of a vocabulary over several ranks, once the ranks have agreed on it
    shards: VocabShards | None = None


class LMHead(NamedTuple):
    """``logits = hidden @ weightᵀ + bias + lora_scale · (hidden @
    lora_aᵀ) @ lora_bᵀ``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float

    def cast(self, settings: ChunkSettings) -> LMHead:
        """Return the head in the dtypes of the GEMMs."""
        compute, lora = settings.compute_dtype, settings.lora_dtype
        w, b, lora_a, lora_b = (
            None if t is None else t.to(d)
            for t, d in zip(self[:4], (compute, compute, lora, lora), strict=True)
        )
        assert w is not None
        return LMHead(w, b, lora_a, lora_b, self.lora_scale)


@dataclass(frozen=True)
class Hidden:
    """The hidden states of the rows that are computed, the head, and everything per row
    for them.

    ``index`` selects the computed rows of the call, and None means all. With ``kept``,
    the distribution of a row is over its set, and ``ids`` are places in that set.
    """

    states: Tensor  # [M, D]
    head: LMHead
    rows: Rows
    index: Tensor | None
    ids: Tensor  # [M]
    temperature: Tensor  # [1] or [M]
    settings: ChunkSettings
    kept: KeptSets | None = None
    # a vocabulary over several ranks, each with its columns
    shard: VocabGroup | None = None

    @property
    def needs_grad(self) -> bool:
        parts = (self.states, *self.head[:4], self.temperature)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parts)

    def gather(self, row: Tensor) -> Tensor:
        """Select the computed rows: ``[..., N] -> [..., M]``."""
        return row if self.index is None else row[..., self.index]

    def scatter(self, row: Tensor, fill: int = 0) -> Tensor:
        """Scatter ``[M, ...]`` to ``[N, ...]``, with ``fill`` in the rows that are not
        computed. It is differentiable.
        """
        if self.index is None:
            return row
        found = row.new_full((self.rows.count, *row.shape[1:]), fill).index_put((self.index,), row)
        if self.rows.trust is None or not row.is_floating_point():
            return found
        return torch.where(
            self.rows.keep.view(-1, *(1,) * (row.dim() - 1)), found + self.rows.trust, 0
        )


_REQUIRED = ("hidden", "lm_head_weight", "completion_ids")


def resolve_hidden(
    op: str,
    hidden: Any,
    weight: Any,
    completion_ids: Any,
    linear: LMHeadOptions,
    options: SoftmaxOptions,
    named: dict[str, Any],
    validate: bool = False,
) -> Hidden:
    """Check hidden states, head and ids against each other.

    ``named`` holds the other tensors of the call by their public names.
    """
    lora: Any = linear.lora
    if lora is not None and not isinstance(lora, Lora):  # a plain tuple may be given
        if not isinstance(lora, tuple) or len(lora) not in (2, 3):
            raise InvalidCall(f"{op}: lora is a {type(lora).__name__}, expected a Lora.")
        lora = Lora(*lora)
    tensors = {
        "hidden": hidden,
        "lm_head_weight": weight,
        "completion_ids": completion_ids,
        "lm_head_bias": linear.lm_head_bias,
        "lora.a": lora.a if lora else None,
        "lora.b": lora.b if lora else None,
        "temperature": options.temperature,
        **named,
    }

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name, x in (
        ("hidden", hidden),
        ("lm_head_weight", weight),
        ("completion_ids", completion_ids),
        ("lm_head_bias", linear.lm_head_bias),
        ("lora.a", tensors["lora.a"]),
        ("lora.b", tensors["lora.b"]),
    ):
        if not isinstance(x, Tensor) and (x is not None or name in _REQUIRED):
            raise fail(f"{name} is a {type(x).__name__}, expected a tensor.")
    # before the shape, which a packed weight has not: bitsandbytes' 4 bits are [N, 1]
    if (kind := _quantised_as(weight)) is not None:
        raise fail(
            f"lm_head_weight is {kind}, a quantised head: dequantise it, or pass head(hidden) to "
            "the op that takes logits."
        )
    of_head = ("lm_head_weight", "lm_head_bias", "lora.a", "lora.b")
    refuse_released(op, ((name, tensors[name]) for name in of_head))
    for name in ("consume_logits", "drop_last"):
        if getattr(options, name):
            raise fail(f"{name} is for an op that takes logits; this op computes them.")
    if completion_ids.dtype not in (torch.int32, torch.int64):
        raise fail(f"completion_ids are {completion_ids.dtype}, expected int32 or int64.")
    shape, width = tuple(completion_ids.shape), hidden.size(-1) if hidden.dim() else 0
    if tuple(hidden.shape) != (*shape, width):
        raise fail(
            f"hidden has shape {tuple(hidden.shape)}; completion_ids is {shape}, so expected "
            f"{shape} + (D,)."
        )
    if weight.dim() != 2 or weight.size(1) != width:
        raise fail(f"lm_head_weight has shape {tuple(weight.shape)}, expected (V, {width}).")
    columns = weight.size(0)
    if linear.lm_head_bias is not None and tuple(linear.lm_head_bias.shape) != (columns,):
        raise fail(
            f"lm_head_bias has shape {tuple(linear.lm_head_bias.shape)}, expected ({columns},)."
        )
    if lora is not None and (
        lora.b.dim() != 2 or lora.a.shape != (lora.b.size(-1), width) or lora.b.size(0) != columns
    ):
        raise fail(
            f"lora: a {tuple(lora.a.shape)} and b {tuple(lora.b.shape)}, expected (r, {width}) "
            f"and ({columns}, r)."
        )

    compute, autocast = _compute_dtype(hidden)
    lora_dtype = hidden.dtype if lora is None else lora.a.dtype
    for name, x, dtype in (
        ("lm_head_weight", weight, hidden.dtype),
        ("lm_head_bias", linear.lm_head_bias, hidden.dtype),
        ("lora.a", lora.a if lora else None, lora_dtype),
        ("lora.b", lora.b if lora else None, lora_dtype),
    ):
        if x is not None and (x.device != hidden.device or (x.dtype != dtype and not autocast)):
            raise fail(
                f"{name} is {x.dtype} on {x.device}, expected {dtype} on {hidden.device}: cast "
                "one, or use autocast."
            )
    if not hidden.is_floating_point() or hidden.dtype.itemsize < 2:
        raise fail(f"hidden is {hidden.dtype}, expected fp16, bf16, fp32 or fp64.")
    if not autocast and torch.promote_types(lora_dtype, hidden.dtype) != lora_dtype:
        raise fail(
            f"lora is {lora_dtype}, expected hidden's {hidden.dtype} or a wider dtype: cast its "
            "factors."
        )
    logits_dtype = compute if linear.logits_dtype is None else linear.logits_dtype
    if logits_dtype not in (compute, torch.float32) or logits_dtype.itemsize < compute.itemsize:
        raise fail(f"logits_dtype is {logits_dtype}, expected {compute} or torch.float32.")
    if (
        linear.accumulate_dtype not in (None, compute, torch.float32)
        or (linear.accumulate_dtype or compute).itemsize < compute.itemsize
    ):
        raise fail(
            f"accumulate_dtype is {linear.accumulate_dtype}, expected None, {compute} or "
            "torch.float32."
        )

    softmax = resolve_softmax(op, options, columns, fail)
    row_dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    primitives = row_primitives(hidden, options.backend, logits_dtype)
    rows = resolve_rows(
        op, shape, hidden.device, row_dtype, tensors, softmax.total(), validate, primitives
    )
    sampled = resolve_sampling_mask(rows, options, softmax.total(), validate, fail)
    all_ids = rows.ids if sampled is None else sampled.position
    assert all_ids is not None
    # cap·tanh(s·z/cap)/T is the same function of z with cap/s and T/s. The scale
    # therefore costs no pass and no rounding.
    temperature = resolve_temperature(rows, options.temperature, fail) / resolve_logit_scale(
        linear.logit_scale, softmax, fail
    )
    index, compact, trust = _row_index(rows, linear, validate, fail)
    if trust is not None:
        rows = rows.also_trusted(trust)
    flat = hidden.reshape(-1, width)
    flat = flat if index is None else flat.index_select(0, index)
    if index is not None and temperature.size(-1) != 1:
        temperature = temperature[index]
    size, keep = chunking(
        flat.size(0),
        columns * logits_dtype.itemsize,
        hidden.device,
        linear.chunk_rows,
        linear.memory_budget,
    )
    settings = ChunkSettings(
        _scaled_cap(softmax, linear.logit_scale),
        options.backend,
        size,
        logits_dtype,
        compute,
        compute if autocast else lora_dtype,
        linear.accumulate_dtype,
        compact,
        keep,
    )
    a, b, scale = lora or (None, None, 1.0)
    _LORA_SCALE.check(op, "lora.scale", scale)
    head = LMHead(weight, linear.lm_head_bias, a, b, float(scale))
    ids = all_ids if index is None else all_ids[index]
    kept = (
        None if sampled is None else sampled.sets if index is None else sampled.sets.select(index)
    )
    call = Hidden(
        flat, head, rows, index, ids, temperature, settings, kept, vocab_group(options, columns)
    )
    if torch.compiler.is_compiling() or not call.needs_grad:
        call = dataclasses.replace(call, settings=settings._replace(keep_rows=0))
    return call


def _quantised_as(weight: Tensor) -> str | None:
    """What a weight is whose numbers no matrix product here can read.

    Wrappers (torchao, FP8, bitsandbytes before it quantises) have a floating dtype, and
    a class of their own; PyTorch's own subclasses are another matter.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"{weight.dtype}"
    kind = type(weight)
    if kind is Tensor or kind is torch.nn.Parameter or torch.compiler.is_compiling():
        return None
    own = kind.__module__.partition(".")[0] in ("torch", "reweight_ops")
    return None if own else f"a {kind.__name__}"


def _scaled_cap(softmax: SoftmaxParams, scale: float) -> SoftmaxParams:
    # There is no quotient without a cap. A compiled graph may take the scale as an
    # input. The quotient would then be an input too, but a cap is a constant.
    return (
        softmax._replace(softcap=softmax.softcap / scale)
        if math.isfinite(softmax.softcap)
        else softmax
    )


def _row_index(
    rows: Rows, linear: LMHeadOptions, validate: bool, fail: Fail
) -> tuple[Tensor | None, bool, Tensor | None]:
    """Return the rows to compute, whether rows may be counted on the host, and
    :attr:`Rows.trust` of rows that a caller named.
    """
    readable = (
        rows.device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform()
    )
    capturing = rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    compact = (readable if linear.compact_rows is None else linear.compact_rows) and not capturing
    if linear.row_index is not None:
        index = linear.row_index
        if (
            not isinstance(index, Tensor)
            or index.dim() != 1
            or index.dtype != torch.int64
            or index.device != rows.device
        ):
            raise fail(f"row_index must be a tensor [M] of int64 on {rows.device}.")
        if (readable and is_readable(index)) or validate:
            _check_row_index(index, rows, fail)
            return index, compact, None
        inside, trust = _unread_row_index(index, rows)
        return inside, compact, trust
    if not compact:
        return None, False, None
    index = rows.keep.nonzero()[:, 0]
    return (index if index.numel() < rows.count else None), True, None


def _unread_row_index(index: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return positions that exist, and NaN if they are invalid.

    They are invalid if a position does not exist, if a row is named twice, or if a
    valid row is missing. Nothing waits for the device.
    """
    outside = (index < 0) | (index >= rows.count)
    times = index.new_zeros(rows.count + 1)
    times = times.index_put(
        (torch.where(outside, rows.count, index),), torch.ones_like(index), accumulate=True
    )
    wrong = (times[:-1] > 1) | (rows.keep & (times[:-1] == 0))
    structure = Structure(rows.op, rows.tensors, False)
    structure.require(~(outside.any() | wrong.any()))
    trust = structure.trust(rows.dtype)
    assert trust is not None
    return torch.where(outside, 0, index), trust


def _check_row_index(index: Tensor, rows: Rows, fail: Fail) -> None:
    outside = (index < 0) | (index >= rows.count)
    if bool(outside.any()):
        at = int(outside.nonzero()[0, 0])
        raise fail(
            f"row_index[{at}] is {int(index[at])}; row_index has positions outside 0 to "
            f"{rows.count - 1}."
        )
    times = torch.bincount(index, minlength=rows.count)
    if bool((times > 1).any()):
        raise fail(f"row_index names row {int((times > 1).nonzero()[0, 0])} more than once.")
    missing = rows.keep & (times == 0)
    if bool(missing.any()):
        raise fail(
            f"row_index leaves out row {int(missing.nonzero()[0, 0])}, but it is in the loss: "
            "mask it, or name it."
        )


def _compute_dtype(hidden: Tensor) -> tuple[torch.dtype, bool]:
    """Return the dtype of the GEMMs' operands, and whether autocast sets it, as for
    ``F.linear``.
    """
    # A meta tensor's device has no autocast, and raises when it is asked.
    if (
        hidden.device.type == "meta"
        or hidden.dtype == torch.float64
        or not torch.is_autocast_enabled(hidden.device.type)
    ):
        return hidden.dtype, False
    return torch.get_autocast_dtype(hidden.device.type), True
