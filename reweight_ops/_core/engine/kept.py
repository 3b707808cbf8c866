"""Policy losses are called again and again with the same signature: what was found for the first such call is kept for the others.

A signature is the spec and everything about the arguments but their values: which are given, their types, shapes, strides, dtypes, devices,
whether they require grad; settings such as ``plan`` by their values; and what a choice depends on besides, from grad mode to an environment
variable. A kept call holds no tensor, and binds the tensors of each new one. Whatever depends on values is checked each time; a call that fails is
resolved from the start, so that its message is the same.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.base import SoftmaxParams
from ..backends.select import state
from ..calls import consumed
from ..calls.keywords import PolicyOptions, SoftmaxOptions
from ..calls.logits import Logits, collapsed
from ..calls.policy import bind_loss
from ..calls.softmax import resolve_temperature
from ..calls.specs import lasting_spec
from ..rows.rows import RowLayout, bind_rows
from ..spec.policy import PolicyLossSpec
from ..transforms import in_transform, is_wrapped
from .direct import DirectLoss, direct_loss
from .output import PolicyLossOutput
from .plan import Choice
from .policy import PolicyObjective
from .run import Call
from .sources import LogitsSource

#: How many calls are kept: batches of many shapes may alternate with each other, and each shape is one.
MOST = 256

#: Keywords that choose what is done, which a signature holds by value. All others are data.
_SETTINGS = frozenset(
    [
        "softcap",
        "vocab_size",
        "drop_last",
        "consume_logits",
        "entropy_over",
        "backend",
        "num_sequences",
        "num_groups",
        "validate",
        "unused",
        "differentiable_inputs",
    ]
)

#: Keywords of calls that are not kept: the sets are data of any size, and ranks agree on each call.
_NEVER_KEPT = ("sampling_mask", "process_group", "sequence_group")

#: The ranges of the numbers among a call's data.
_RANGES = {
    name: allowed
    for record in (SoftmaxOptions, PolicyOptions)
    for name, allowed in record.RANGES.items()
    if name not in _SETTINGS
}  # fmt: skip


#: Beyond it a finite number has no fp32.
_LARGEST = torch.finfo(torch.float32).max


def _is_odd(value: Any) -> bool:
    """NaN, or finite and too large for fp32: what to say of it is known where a call is resolved."""
    return value != value or (isinstance(value, (int, float)) and _LARGEST < abs(value) < math.inf)


_DIVISORS = ("num_items_in_batch", "num_sequences_in_batch")


def _in_range(data: Mapping[str, Any]) -> bool:
    """Whether every number is one that may be, whatever the rows are: not NaN, and no divisor is 0."""
    for name, value in data.items():
        if (not isinstance(value, Tensor) and _is_odd(value)) or (name in _DIVISORS and type(value) is not Tensor and value == 0):
            return False
        allowed = _RANGES.get(name)
        if allowed is not None and not allowed.has(value):
            return False
    return True


def _kind(value: Any) -> Any:
    """What a signature holds of data. LookupError for a tensor of which a call cannot be kept."""
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if isinstance(value, Tensor):
            raise LookupError
        return kind
    if value.layout is not torch.strided or is_wrapped(value) or value.is_neg():
        raise LookupError
    return kind, value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_leaf


def signature(spec: Any, settings: Iterable[Hashable], arguments: Mapping[str, Any]) -> Hashable | None:
    """The key of a call; None if it is being traced or transformed, or is none to keep."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or in_transform():
        return None
    lasting = lasting_spec(spec)
    if lasting is None or arguments.get("validate"):
        return None
    for name in _NEVER_KEPT:
        if arguments.get(name) is not None:
            return None
    try:
        key: list[Any] = [id(lasting), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), state(), *settings]
        for name, value in arguments.items():
            key += (name, type(value), value) if name in _SETTINGS else (name, _kind(value))
        found = (*key, _is_one(arguments.get("loss_scale", 1.0)))
        hash(found)  # a setting may be a list
    except (LookupError, TypeError):
        return None
    return found


def _is_one(scale: Any) -> bool:
    """Whether gradients in fp16 would be rounded as they are: the one choice that depends on a number."""
    return isinstance(scale, (int, float)) and scale == 1


@dataclass(frozen=True)
class KeptCall:
    """What a call is beside its values."""

    spec: weakref.ref[PolicyLossSpec]
    rows: RowLayout
    softmax: SoftmaxParams
    drop_last: bool
    consume: bool
    backend: str
    differentiable_outputs: bool
    without: dict[str, None]  # arguments without effect
    choice: Choice
    direct: DirectLoss | None

    def run(self, logits: Tensor, data: Mapping[str, Any]) -> PolicyLossOutput | None:
        """The result with these values, where the backend has prepared the loss; None if it has not, or something about them is wrong."""
        spec = self.spec()
        if (
            self.direct is None
            or spec is None
            or not _in_range(data)
            or consumed.is_consumed(logits)
            or torch._C._autograd._profiler_enabled()
        ):
            return None
        return self.direct(spec, logits, data)

    def bind(self, logits: Tensor, data: Mapping[str, Any]) -> Call[Any] | None:
        """The call with these values; None if something about them is wrong, or the spec is another that is where the first was in memory."""
        spec = self.spec()
        if spec is None or not _in_range(data) or consumed.is_consumed(logits):
            return None
        try:
            rows = bind_rows(self.rows, data, self.softmax.vocab_size)
            temperature = resolve_temperature(rows, data.get("temperature", 1.0), InvalidCall)
            call = bind_loss(rows, {**data, **self.without} if self.without else data, spec)
        except InvalidCall:
            return None
        assert rows.ids is not None
        values = logits if logits.dim() <= 3 else collapsed("logits", logits, InvalidCall)
        found = Logits(values, rows, rows.ids, temperature, self.softmax, self.drop_last, self.consume, self.backend, logits)
        return Call(LogitsSource(found), PolicyObjective(call, self.differentiable_outputs), choice=self.choice)


class KeptCalls:
    """The last :data:`MOST` signatures and their calls. Threads may share it: what one drops, another finds anew."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Hashable, KeptCall] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def get(self, key: Hashable) -> KeptCall | None:
        found = self._calls.get(key)
        if found is not None:
            with suppress(KeyError):
                self._calls.move_to_end(key)
        return found

    def put(self, key: Hashable, call: KeptCall) -> None:
        self._calls[key] = call
        while len(self._calls) > MOST:
            with suppress(KeyError):
                self._calls.popitem(last=False)

    def keep(self, key: Hashable, logits: Logits, objective: PolicyObjective, choice: Choice) -> None:
        """A call that has succeeded, if a backend's kernels found its rows and can weigh them: others are rare, and slow anyway."""
        call, rows = objective.call, objective.call.rows
        if (
            rows.primitives is None
            or rows.masked is None
            or rows.trust is not None
            or rows.segments is not None
            or rows.prompts is not None
        ):
            return
        if any(r.coupled or r.weighing(rows, call.divisors) is None for r in call.spec.reductions):
            return
        layout = RowLayout(rows.op, rows.shape, rows.device, rows.dtype, rows.sequences, rows.primitives)
        direct = None if objective.differentiable_outputs else direct_loss(logits, call, layout, choice)
        self.put(
            key,
            KeptCall(
                weakref.ref(call.spec), layout, logits.softmax, logits.drop_last, logits.consume, logits.backend,
                objective.differentiable_outputs, {name: None for name, value in call.by_argument().items() if value is None}, choice, direct,
            ),
        )  # fmt: skip


KEPT = KeptCalls()
