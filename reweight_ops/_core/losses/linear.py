"""The public ops from hidden states: the same numbers as from logits, which never exist as a whole."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall, UnsupportedRequest
from ..calls.keywords import DataOptions, HeadOptions, LinearHeadKeywords, LinearKeywords, all_options, head_options
from ..calls.logits import temperature_rows, vocabulary
from ..calls.policy import LossCall, resolve_loss
from ..calls.specs import named_spec
from ..engine.linear.autograd import LinearOnePassLoss, LinearStatistics
from ..engine.linear.gemms import Settings, chunking, inert_rows_dropped
from ..engine.output import PolicyLossOutput
from ..engine.plan import Choice, Target, choose_plan, middle, pick
from ..rows.groups import describe
from ..rows.rows import Rows, resolve_rows
from ..spec.policy import PolicyLossSpec


class Lora(NamedTuple):
    """A low-rank term of the head: ``logits += scale · (hidden @ aᵀ) @ bᵀ``, ``a [r, D]``, ``b [V, r]``. ``W + scale·b·a`` is never built."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """The keywords of the head itself."""

    lm_head_bias: Any = None
    logit_scale: float = 1.0
    logits_dtype: torch.dtype | None = None
    accumulate_dtype: torch.dtype | None = None
    chunk_rows: int | None = None
    memory_budget: int | None = None
    lora: Lora | None = None
    row_index: Any = None
    compact_rows: bool | None = None


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """A resolved head: the rows that are computed (``index`` into all rows, None: all), and everything per row for them."""

    hidden: Tensor  # [M, D]
    weight: Tensor
    bias: Tensor | None
    lora: Lora | None
    rows: Rows
    index: Tensor | None
    temperature: Tensor
    settings: Settings

    @property
    def ids(self) -> Tensor:
        assert self.rows.ids is not None
        return self.gather(self.rows.ids)

    @property
    def target(self) -> Target:
        parts = (self.hidden, self.weight, self.bias, *(self.lora[:2] if self.lora else ()))
        needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parts)
        return Target(self.hidden.device, self.settings.logits_dtype, needs, self.settings.backend)

    def gather(self, row: Tensor) -> Tensor:
        """``[..., N] -> [..., M]``: the computed rows."""
        return row if self.index is None else row[..., self.index]

    def scatter(self, row: Tensor) -> Tensor:
        """``[M] -> [N]``, 0 in the rows that are not computed; differentiable."""
        if self.index is None:
            return row
        return row.new_zeros(self.rows.count).index_put((self.index,), row)

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
        """The leading arguments of the autograd Functions."""
        a, b, scale = self.lora or (None, None, 1.0)
        return self.hidden, self.weight, self.bias, a, b, float(scale)

    def with_backend(self, backend: str) -> LinearCall:
        return dataclasses.replace(self, settings=self.settings._replace(backend=backend))


def linear_token_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool = False,
    **keywords: Unpack[LinearHeadKeywords],
) -> Any:
    """:func:`token_logps` of ``logits = logit_scale · (hidden @ lm_head_weightᵀ + lm_head_bias)``, a few rows of logits at a time.

    Args:
        hidden: ``R + (D,)``. lm_head_weight: ``[V, D]`` in the same dtype (or under autocast, which casts as ``F.linear`` does).
        completion_ids, completion_mask, return_entropy, temperature, softcap, vocab_size, backend: as in :func:`token_logps`.
        lm_head_bias: ``[V]``. logit_scale: a number, before the soft cap.
        logits_dtype: dtype of a chunk's logits (default: hidden's). ``torch.float32`` from 16-bit operands rounds once less.
        accumulate_dtype: dtype in which the weight's gradient is summed over chunks. Default: the weight's where that is fp32 (also under
            autocast) or there are at most 8 chunks, each of which then rounds the sum once; else fp32, rounded once, for a buffer of its size.
        chunk_rows: rows a chunk; default: multiples of 64, at most 96 MiB of logits on a CPU and 1 GiB on a GPU, or 256 rows.
        memory_budget: bytes of logits. Bounds a chunk, and what is left over keeps chunks for backward, which then need not be recomputed.
            Default: one chunk.
        lora: ``Lora(a, b, scale)``, a low-rank term of the head.
        row_index: ``[M]`` int64, flat positions of the rows to compute, each once, known to the host: nothing waits. Rows that are in must be
            among them (checked on a CPU, and with ``validate=True``).
        compact_rows: drop the rows that are out before the first GEMM, and rows without a coefficient from the backward ones. On a CPU it
            costs nothing and is the default. On a GPU it waits: once for the rows, and in backward once (one_pass: in forward, once a chunk);
            off by default, and under CUDA-graph capture.

    Gradients go to hidden, weight, bias and the LoRA factors, exactly those that require one; any upstream gradient, per row too. Backward
    recomputes the logits of the chunks that were not kept (one more GEMM). For one ``chunk_rows`` a row's results are the same bits wherever
    it stands: the last chunk is padded.

    >>> import torch, reweight_ops as rw
    >>> rw.linear_token_logps(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    op = "linear_token_logps"
    linear, rest = _split(dict(keywords))
    options = head_options(op, rest, ("completion_mask", "return_entropy", *_LINEAR))
    call = _resolve_linear(op, hidden, lm_head_weight, completion_ids, linear, options, {"completion_mask": completion_mask})
    choice = pick(call.target.device, call.target.dtype, call.target.backend, None)
    stats = _statistics(call.with_backend(choice.backend), ("logp", "lse", *(("entropy",) if return_entropy else ())))
    logps = call.rows.unflatten(stats["logp"])
    return (logps, call.rows.unflatten(stats["entropy"])) if return_entropy else logps


def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    plan: str = "auto",
    differentiable_outputs: bool = False,
    **keywords: Unpack[LinearKeywords],
) -> PolicyLossOutput:
    """:func:`policy_loss` from hidden states: arguments of :func:`linear_token_logps` and of :func:`policy_loss`.

    ``one_pass`` forms every gradient in forward from three GEMMs a chunk; ``two_pass`` recomputes the logits in backward (four).

    >>> import torch, reweight_ops as rw
    >>> hidden = torch.zeros(1, 2, 3, requires_grad=True)
    >>> rw.linear_policy_loss(hidden, torch.ones(4, 3), torch.tensor([[1, 2]]), 1.0, spec="grpo").loss
    tensor(-1., grad_fn=<...>)
    """
    op = "linear_policy_loss"
    linear, rest = _split(dict(keywords))
    options, data = all_options(op, rest, ("spec", "plan", "differentiable_outputs", *_LINEAR))
    named = {"advantages": advantages, **data.named()}
    head = _resolve_linear(op, hidden, lm_head_weight, completion_ids, linear, options, named, data)
    call = resolve_loss(head.rows, advantages, named_spec(op, spec), data)
    choice = choose_plan(call, head.target, plan, differentiable_outputs)
    head = head.with_backend(choice.backend)
    if choice.plan == "one_pass":
        return _one_pass(call, head, choice)
    needs_p_sq = "log_sum_p_sq" in call.spec.requires
    stats = _statistics(head, ("logp", "lse", "entropy", *(("log_sum_p_sq",) if needs_p_sq else ())))
    del stats["lse"]
    out = middle(call, stats, choice.backend, differentiable_outputs)
    return dataclasses.replace(out, _more=_Dropped(head, head.hidden.size(0)))


def _statistics(call: LinearCall, names: tuple[str, ...]) -> dict[str, Tensor]:
    values = LinearStatistics.apply(  # type: ignore[no-untyped-call]
        *call.head(), call.ids, call.temperature, call.settings, ",".join(names)
    )
    return {name: call.scatter(value) for name, value in zip(names, values, strict=True)}


def _one_pass(call: LossCall, head: LinearCall, choice: Choice) -> PolicyLossOutput:
    rows = call.rows
    inputs = tuple(None if t is None else head.gather(t) for t in call.inputs())
    loss, table = LinearOnePassLoss.apply(  # type: ignore[no-untyped-call]
        *head.head(), head.ids, head.temperature, inputs, call.params, call.spec.program_text, head.settings
    )
    logp, entropy, _, per_token, by_logp, by_entropy = (head.scatter(row) for row in table.unbind())
    leaves, by = {"logp": logp, "entropy": entropy}, (by_logp, by_entropy)
    return PolicyLossOutput(
        loss, rows.unflatten(logp), rows.unflatten(entropy), "one_pass", choice.backend, call.released(), leaves, per_token, by,
        _Dropped(head, head.settings.chunk_rows),
    )  # fmt: skip


class _Dropped:
    """Metrics of the head: rows dropped before the first GEMM, and of the others those dropped from the backward GEMMs (in one_pass: chunk by
    chunk). Holds no tensor of the head's size."""

    def __init__(self, head: LinearCall, dropped_in: int) -> None:
        self.index, self.count, self.drop_inert, self.dropped_in = head.index, head.rows.count, head.settings.drop_inert, dropped_in

    def __call__(self, derivatives: tuple[Tensor, Tensor]) -> dict[str, Any]:
        computed = self.count if self.index is None else self.index.numel()
        found: dict[str, Any] = {"rows_dropped_forward": self.count - computed, "rows_dropped_backward": 0}
        if self.drop_inert:
            inert = (derivatives[0] == 0) & (derivatives[1] == 0)
            inert = inert if self.index is None else inert[self.index]
            found["rows_dropped_backward"] = inert_rows_dropped(inert, max(self.dropped_in, 1))
        return found


_LINEAR = tuple(f.name for f in dataclasses.fields(LinearOptions))


def _split(keywords: dict[str, Any]) -> tuple[LinearOptions, dict[str, Any]]:
    own = {name: value for name, value in keywords.items() if name in _LINEAR}
    return LinearOptions(**own), {name: value for name, value in keywords.items() if name not in _LINEAR}


def _resolve_linear(
    op: str,
    hidden: Any,
    weight: Any,
    completion_ids: Any,
    linear: LinearOptions,
    options: HeadOptions,
    named: dict[str, Any],
    data: DataOptions | None = None,
) -> LinearCall:
    lora = linear.lora
    tensors = {
        "hidden": hidden, "lm_head_weight": weight, "completion_ids": completion_ids, "lm_head_bias": linear.lm_head_bias,
        "lora.a": lora.a if lora else None, "lora.b": lora.b if lora else None, "temperature": options.temperature, **named,
    }  # fmt: skip

    def fail(message: str) -> InvalidCall:
        return InvalidCall(f"{op}: {message} {describe(tensors)}")

    for name, x in (("hidden", hidden), ("lm_head_weight", weight), ("completion_ids", completion_ids)):
        if not isinstance(x, Tensor):
            raise fail(f"{name} is a {type(x).__name__}, expected a tensor.")
    if options.process_group is not None:
        raise UnsupportedRequest(f"{op}: process_group: vocabulary-parallel heads are not supported yet.")
    for name in ("consume_logits", "drop_last"):
        if getattr(options, name):
            raise fail(f"{name} is for logits; here they are the op's own.")
    if completion_ids.dtype not in (torch.int32, torch.int64):
        raise fail(f"completion_ids are {completion_ids.dtype}, expected int32 or int64.")
    shape, width = tuple(completion_ids.shape), hidden.size(-1)
    if tuple(hidden.shape) != (*shape, width):
        raise fail(f"hidden has shape {tuple(hidden.shape)}; completion_ids is {shape}, so expected {shape} + (D,).")
    if weight.dim() != 2 or weight.size(1) != width:
        raise fail(f"lm_head_weight has shape {tuple(weight.shape)}, expected (V, {width}).")
    columns = weight.size(0)
    if linear.lm_head_bias is not None and tuple(linear.lm_head_bias.shape) != (columns,):
        raise fail(f"lm_head_bias has shape {tuple(linear.lm_head_bias.shape)}, expected ({columns},).")
    if lora is not None and (lora.a.shape != (lora.b.size(-1), width) or lora.b.size(0) != columns):
        raise fail(f"lora: a {tuple(lora.a.shape)} and b {tuple(lora.b.shape)}, expected (r, {width}) and ({columns}, r).")

    compute, autocast = _compute_dtype(hidden)
    for name, x in (
        ("lm_head_weight", weight),
        ("lm_head_bias", linear.lm_head_bias),
        ("lora.a", lora.a if lora else None),
        ("lora.b", lora.b if lora else None),
    ):
        if x is not None and (x.device != hidden.device or (x.dtype != hidden.dtype and not autocast)):
            raise fail(f"{name} is {x.dtype} on {x.device}, hidden {hidden.dtype} on {hidden.device}: cast one, or use autocast.")
    if not hidden.is_floating_point() or hidden.dtype.itemsize < 2:
        raise fail(f"hidden is {hidden.dtype}, expected fp16, bf16, fp32 or fp64.")
    logits_dtype = compute if linear.logits_dtype is None else linear.logits_dtype
    if logits_dtype not in (compute, torch.float32) or logits_dtype.itemsize < compute.itemsize:
        raise fail(f"logits_dtype is {logits_dtype}, expected {compute} or torch.float32.")
    if linear.accumulate_dtype not in (None, compute, torch.float32) or (linear.accumulate_dtype or compute).itemsize < compute.itemsize:
        raise fail(f"accumulate_dtype is {linear.accumulate_dtype}, expected None, {compute} or torch.float32.")
    if not (isinstance(linear.logit_scale, (int, float)) and math.isfinite(linear.logit_scale) and linear.logit_scale > 0):
        raise fail(f"logit_scale is {linear.logit_scale!r}, expected a positive number.")
    for name in ("chunk_rows", "memory_budget"):
        value = getattr(linear, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise fail(f"{name} is {value!r}, expected a whole number of at least 1.")

    vocab_size, softcap = vocabulary(options, columns, fail)
    row_dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    rows = resolve_rows(op, shape, hidden.device, row_dtype, tensors, vocab_size, data.validate if data is not None else False)
    # cap·tanh(s·z/cap)/T is the same function of z with cap/s and T/s: the scale costs no pass and no rounding.
    temperature = temperature_rows(rows, options.temperature, fail) / linear.logit_scale
    index, compact = _row_index(rows, linear, data is not None and data.validate, fail)
    flat = hidden.reshape(-1, width)
    flat = flat if index is None else flat.index_select(0, index)
    if index is not None and temperature.size(-1) != 1:
        temperature = temperature[index]
    size, keep = chunking(flat.size(0), columns * logits_dtype.itemsize, hidden.device, linear.chunk_rows, linear.memory_budget)
    settings = Settings(
        vocab_size, softcap / linear.logit_scale, options.backend, size, logits_dtype, compute, linear.accumulate_dtype, compact, keep
    )
    call = LinearCall(flat, weight, linear.lm_head_bias, lora, rows, index, temperature, settings)
    if torch.compiler.is_compiling() or not call.target.needs_grad:
        call = dataclasses.replace(call, settings=settings._replace(keep_rows=0))
    return call


def _row_index(rows: Rows, linear: LinearOptions, validate: bool, fail: Any) -> tuple[Tensor | None, bool]:
    """The rows to compute, and whether rows may be counted on the host."""
    readable = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    capturing = rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    compact = (readable if linear.compact_rows is None else linear.compact_rows) and not capturing
    if linear.row_index is not None:
        index = linear.row_index
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64 or index.device != rows.device:
            raise fail(f"row_index must be a tensor [M] of int64 on {rows.device}.")
        if readable or validate:
            _check_row_index(index, rows, fail)
        return index, compact
    if not compact:
        return None, False
    index = rows.keep.nonzero()[:, 0]
    return (index if index.numel() < rows.count else None), True


def _check_row_index(index: Tensor, rows: Rows, fail: Any) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows.count):
        raise fail(f"row_index has positions outside 0 to {rows.count - 1}.")
    times = torch.bincount(index, minlength=rows.count)
    if bool((times > 1).any()):
        raise fail(f"row_index names row {int((times > 1).nonzero()[0, 0])} more than once.")
    missing = rows.keep & (times == 0)
    if bool(missing.any()):
        raise fail(f"row_index leaves out row {int(missing.nonzero()[0, 0])}, which is in the loss: mask it, or name it.")


def _compute_dtype(hidden: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype of the GEMMs' operands, and whether it is autocast's, as for ``F.linear``."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden.dtype, False
    return torch.get_autocast_dtype(hidden.device.type), True
