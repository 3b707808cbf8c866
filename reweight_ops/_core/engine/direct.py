"""A repeated policy loss in one pass.

A backend that has prepared the loss takes the arguments as they are. Everything else in
the result is computed when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends.prepared import INPUTS, OnePassArguments, OnePassPlan, OnePassRows, Prepared
from ..backends.select import load
from ..calls import consumed
from ..calls.logits import Logits
from ..calls.policy import LossCall
from ..rows.resolve import RowLayout
from ..spec.policy import PolicyLossSpec
from ..spec.reduction import Divisors
from .autograd import FinishedLoss
from .memory import empty
from .ops import clear_last, without_last_position
from .output import PolicyLossOutput
from .plan import Choice
from .policy import PolicyObjective

_DIVISORS = ("num_items_in_batch", "num_sequences_in_batch")
_SCALES = (*_DIVISORS, "loss_scale")


@dataclass(frozen=True)
class _Reader:
    """The arguments of a call that a backend receives.

    ``divisor`` is the argument that is the divisor, or the number that it always is.
    """

    reads: tuple[str | None, ...]  # the INPUTS that have an effect
    divisor: str | float
    drop_last: bool

    def arguments(self, logits: Tensor, data: Mapping[str, Any]) -> OnePassArguments:
        get = data.get
        return OnePassArguments(
            without_last_position(logits, self.drop_last),
            data["completion_ids"],
            get("completion_mask"),
            get("denominator_mask"),
            tuple([None if name is None else get(name) for name in self.reads]),
            get("temperature", 1.0),
            self.divisor if isinstance(self.divisor, float) else float(data[self.divisor]),
            float(get("loss_scale", 1.0)),
        )


@dataclass(frozen=True)
class DirectLoss:
    """A loss that a backend has prepared; see
    :mod:`~reweight_ops._core.backends.prepared`.
    """

    run: Prepared
    reader: _Reader
    layout: RowLayout
    choice: Choice
    per_sequence: bool
    consume: bool

    def __call__(
        self, spec: PolicyLossSpec, logits: Tensor, data: Mapping[str, Any]
    ) -> PolicyLossOutput | None:
        """Return the result, or None if the values are invalid for a loss. Then nothing
        has changed.
        """
        arguments, drop_last = self.reader.arguments(logits, data), self.reader.drop_last
        if not 0 < arguments.temperature < math.inf:
            return None
        grad = logits if self.consume else empty(logits.shape, logits.dtype, logits.device)
        # mark first: an interrupt is raised when the kernel returns, after it has
        # written the gradient
        if self.consume:
            consumed.mark(logits)
        found = self.run(arguments, without_last_position(grad, drop_last))
        if found is None:
            if self.consume:
                consumed.unmark(logits)
            return None
        clear_last(grad, drop_last)
        if self.consume:
            increment_version(logits)
        loss = FinishedLoss.apply(logits, grad, found.table, self.choice.backend)  # type: ignore[no-untyped-call]
        return PolicyLossOutput.later(
            loss,
            self.choice.plan,
            self.choice.backend,
            partial(self._output, spec, found, loss, tuple(map(data.get, _SCALES))),
        )

    def _output(
        self, spec: PolicyLossSpec, found: OnePassRows, loss: Tensor, scales: tuple[Any, ...]
    ) -> PolicyLossOutput:
        *divisors, scale = scales
        adv, old, ref, sampling = map(found.given, INPUTS[:4])
        call = LossCall(
            spec,
            self.layout.rows(found.masked(), {}),
            Divisors(*divisors),
            1.0 if scale is None else scale,
            adv,
            old,
            ref,
            sampling,
            found.given("token_weights"),
            self.per_sequence,
        )
        return PolicyObjective(call).from_one_pass(loss, found.table, self.choice, None)


def direct_loss(
    logits: Logits, call: LossCall, layout: RowLayout, choice: Choice
) -> DirectLoss | None:
    """Return the loss of a call that has succeeded, for similar calls.

    It is None if the call is not so simple, or if its backend prepares no loss.
    """
    spec, data, prepare = call.spec, call.rows.tensors, load(choice.backend).prepare
    if (
        choice.plan != "one_pass"
        or prepare is None
        or layout.packed is not None
        or spec.program is None
        or logits.values is not logits.original
        or call.inputs_require_grad
    ):
        return None
    numbers = (*spec.parameter_values, data["temperature"])
    weighing = spec.reduction.weighing(call.rows, call.divisors)
    if (
        not all(isinstance(x, (int, float)) for x in numbers)
        or weighing is None
        or spec.reduction.weight is not None
        or spec.reduction.masked(call.rows) is not call.rows.masked
        or any(r is not spec.reduction for r in spec.reductions)
    ):
        return None
    if any(isinstance(data.get(name), Tensor) and data[name].requires_grad for name in _SCALES):
        return None
    by = weighing.divisor
    named = next((name for name in _DIVISORS if data.get(name) is not None), None)
    unread = {name for name, value in call.by_argument().items() if value is None}
    reader = _Reader(
        tuple(None if name in unread else name for name in INPUTS),
        named or (float(by) if isinstance(by, (int, float)) else 1.0),
        logits.drop_last,
    )
    plan = OnePassPlan(
        logits.softmax,
        spec.program,
        tuple(map(float, spec.parameter_values)),
        weighing,
        len(spec.reductions),
        layout.runs.length,
    )
    run = prepare(plan, reader.arguments(logits.values, data))
    return (
        None
        if run is None
        else DirectLoss(run, reader, layout, choice, call.adv_per_sequence, logits.consume)
    )
