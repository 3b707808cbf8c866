"""Repeated policy losses: the decisions of the first call with a signature are kept for
later calls.

A signature is the spec and everything about the arguments except their values: which
are given, their types, shapes, strides, dtypes, devices, and whether they require grad.
It also has the values of settings such as ``plan``, and everything else that a choice
depends on, from grad mode to an environment variable. A kept call holds no tensor. It
binds the tensors of each new call. Checks that depend on values are made each time. A
call that fails is resolved from the start, so that its message is the same.
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
from ..calls.logps import flat_statistics
from ..calls.policy import LossCall, bind_loss
from ..calls.softmax import resolve_temperature
from ..calls.specs import lasting_spec
from ..rows.constants import ConstantRows
from ..rows.resolve import RowLayout, bind_rows, packed_by
from ..spec.policy import PolicyLossSpec
from ..transforms import in_transform, is_wrapped
from . import again
from .direct import DirectLoss, direct_loss
from .output import PolicyLossOutput
from .plan import Choice
from .policy import PolicyObjective
from .run import Call
from .sources import LogitsSource, LogpsSource

#: The number of kept calls. Batches of many shapes may alternate, and each shape is one
#: call.
MOST = 256

#: Keywords that are settings. A signature holds their values. All others are data.
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

#: Calls with these keywords are not kept. The sets are data of any size, and ranks
#: agree on each call.
_NEVER_KEPT = ("sampling_mask", "process_group", "sequence_group")

#: The ranges of the numbers among a call's data.
_RANGES = {
    name: allowed
    for record in (SoftmaxOptions, PolicyOptions)
    for name, allowed in record.__ranges__.items()
    if name not in _SETTINGS
}


#: A finite number beyond this does not fit in fp32.
_LARGEST = torch.finfo(torch.float32).max


def _is_odd(value: Any) -> bool:
    """Return whether a number is NaN, or finite and too large for fp32.

    The resolution of a call raises the fitting error for it.
    """
    return value != value or (isinstance(value, (int, float)) and _LARGEST < abs(value) < math.inf)


_DIVISORS = ("num_items_in_batch", "num_sequences_in_batch")


def _in_range(data: Mapping[str, Any]) -> bool:
    """Return whether every number is allowed, whatever the rows are: it is not NaN, and
    no divisor is 0.
    """
    for name, value in data.items():
        if (
            not isinstance(value, Tensor)
            and (
                _is_odd(value)
                or (
                    name in ConstantRows.__ranges__ and not ConstantRows.__ranges__[name].has(value)
                )
            )
        ) or (name in _DIVISORS and type(value) is not Tensor and value == 0):
            return False
        allowed = _RANGES.get(name)
        if allowed is not None and not allowed.has(value):
            return False
    return True


def _kind(value: Any) -> Any:
    """Return the part of data that a signature holds.

    Raises LookupError for a tensor whose call cannot be kept.
    """
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if isinstance(value, Tensor):
            raise LookupError
        return kind
    if value.layout is not torch.strided or is_wrapped(value) or value.is_neg():
        raise LookupError
    return (
        kind,
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        value.requires_grad,
        value.is_leaf,
    )


def signature(
    spec: Any, settings: Iterable[Hashable], arguments: Mapping[str, Any]
) -> Hashable | None:
    """Return the key of a call, or None if the call is traced or transformed, or cannot
    be kept.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or in_transform():
        return None
    lasting = lasting_spec(spec)
    if lasting is None or arguments.get("validate", False) is not False:
        return None
    for name in _NEVER_KEPT:
        if arguments.get(name) is not None:
            return None
    try:
        key: list[Any] = [
            id(lasting),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            state(),
            *settings,
        ]
        for name, value in arguments.items():
            key += (name, type(value), value) if name in _SETTINGS else (name, _kind(value))
        found = (*key, _is_one(arguments.get("loss_scale", 1.0)))
        hash(found)  # a setting may be a list
    except (LookupError, TypeError):
        return None
    return found


def _is_one(scale: Any) -> bool:
    """Return whether gradients in fp16 would be rounded as they are. Only this choice
    depends on a number.
    """
    return isinstance(scale, (int, float)) and scale == 1


@dataclass(frozen=True)
class KeptLoss:
    """A loss without its values."""

    spec: weakref.ref[PolicyLossSpec]
    rows: RowLayout
    without: dict[str, None]  # arguments without effect
    choice: Choice

    @classmethod
    def of(cls, call: LossCall, choice: Choice) -> KeptLoss | None:
        """Return the loss of a call that has succeeded, or None if no backend's kernels
        found its rows and can weigh them.

        Such calls are rare, and slow anyway.
        """
        rows = call.rows
        if (
            rows.primitives is None
            or rows.masked is None
            or rows.segments is not None
            or (rows.prompts is not None and rows.by_prompt is None)
            or any(r.weighing(rows, call.divisors) is None for r in call.spec.reductions)
        ):
            return None
        layout = RowLayout(
            rows.op,
            rows.shape,
            rows.device,
            rows.dtype,
            rows.primitives,
            rows.masked.runs._replace(offsets=None, owner=None),
            packed_by(rows.tensors),
        )
        without = {name: None for name, value in call.by_argument().items() if value is None}
        return cls(weakref.ref(call.spec), layout, without, choice)

    def bind(self, data: Mapping[str, Any], vocab_size: int = 0) -> LossCall | None:
        """Return the loss with these values.

        It is None if a value is invalid, or if the spec is another object at the memory
        address of the first.
        """
        spec = self.spec()
        if spec is None or not _in_range(data):
            return None
        try:
            rows = bind_rows(self.rows, data, vocab_size)
            return bind_loss(rows, {**data, **self.without} if self.without else data, spec)
        except InvalidCall:
            return None


@dataclass(frozen=True)
class KeptLogps:
    """A call on stored statistics without its values."""

    loss: KeptLoss

    def bind(
        self, stored: Mapping[str, Tensor | None], data: Mapping[str, Any]
    ) -> Call[PolicyLossOutput] | None:
        call = self.loss.bind(data)
        if call is None:
            return None
        choice = self.loss.choice
        evaluator = None if choice.backend == again.TORCH else choice.backend
        source = LogpsSource(call.rows, flat_statistics(call.rows, stored, evaluator), evaluator)
        return Call(source, PolicyObjective(call), choice=choice)


@dataclass(frozen=True)
class KeptCall:
    """A call on logits without its values."""

    loss: KeptLoss
    softmax: SoftmaxParams
    drop_last: bool
    consume: bool
    backend: str
    differentiable_outputs: bool
    direct: DirectLoss | None

    def run(self, logits: Tensor, data: Mapping[str, Any]) -> PolicyLossOutput | None:
        """Return the result with these values if the backend has prepared the loss.

        It is None if the backend has not, or if a value is invalid.
        """
        spec = self.loss.spec()
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
        """Return the call with these values, or None if a value is invalid."""
        if consumed.is_consumed(logits):
            return None
        call = self.loss.bind(data, self.softmax.vocab_size)
        if call is None:
            return None
        rows = call.rows
        try:
            temperature = resolve_temperature(rows, data.get("temperature", 1.0), InvalidCall)
        except InvalidCall:
            return None
        assert rows.ids is not None
        values = logits if logits.dim() <= 3 else collapsed("logits", logits, InvalidCall)
        found = Logits(
            values,
            rows,
            rows.ids,
            temperature,
            self.softmax,
            self.drop_last,
            self.consume,
            self.backend,
            logits,
        )
        return Call(
            LogitsSource(found),
            PolicyObjective(call, self.differentiable_outputs),
            choice=self.loss.choice,
        )


class KeptCalls:
    """The last :data:`MOST` signatures and their calls.

    Threads may share it. A call that one thread drops is resolved again by another.
    """

    def __init__(self) -> None:
        self._calls: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def get(self, key: Hashable) -> Any:
        try:
            found = self._calls[key]
            self._calls.move_to_end(key)
        except KeyError:
            return None
        return found

    def put(self, key: Hashable, call: KeptCall | KeptLogps) -> None:
        self._calls[key] = call
        while len(self._calls) > MOST:
            with suppress(KeyError):
                self._calls.popitem(last=False)

    def keep(
        self, key: Hashable, logits: Logits, objective: PolicyObjective, choice: Choice
    ) -> None:
        """Keep a call on logits that has succeeded, if it can be kept."""
        call = objective.call
        loss = KeptLoss.of(call, choice)
        if loss is None:
            return
        direct = (
            None
            if objective.differentiable_outputs
            else direct_loss(logits, call, loss.rows, choice)
        )
        self.put(
            key,
            KeptCall(
                loss,
                logits.softmax,
                logits.drop_last,
                logits.consume,
                logits.backend,
                objective.differentiable_outputs,
                direct,
            ),
        )

    def keep_logps(self, key: Hashable, call: LossCall, choice: Choice) -> None:
        """Keep a call on stored statistics that has succeeded, if it can be kept."""
        loss = KeptLoss.of(call, choice)
        if loss is not None:
            self.put(key, KeptLogps(loss))


KEPT = KeptCalls()
