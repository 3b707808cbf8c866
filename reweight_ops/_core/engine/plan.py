"""The two plans of a loss, and the choice between them.

``one_pass`` is an optimisation of ``two_pass`` and never gives a different result. It
needs everything except the row's own statistics beforehand.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..backends.base import Primitive, Request
from ..backends.select import NAMES, candidates, choose, load, unsupported_reason
from ..compiler import constant_result
from ..formula.loss_program import Program
from ..transforms import in_transform
from .again import TORCH
from .source import MoreMetrics, Source, SourceInfo

PLANS = ("auto", "one_pass", "two_pass")

Output = TypeVar("Output", covariant=True)


class Choice(NamedTuple):
    """A plan, a backend, and the reason against one pass (None if the plan is one
    pass).
    """

    plan: str
    backend: str
    one_pass_unsupported_reason: str | None


class Objective(Protocol[Output]):
    """A loss bound to a call's data, or the statistics alone: what a source's
    statistics become.

    ``reads`` has the names of the statistics that it takes. ``program`` is the form
    that crosses the op boundary, None for a loss without one.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def program(self) -> str | None: ...

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str | None:
        """Return why this call does not take one pass on any backend.

        ``requested`` means that the caller asked for one pass. Then reasons of
        preference do not count.
        """

    def work(self) -> Any:
        """Return what a fused loss computes, an argument of
        :meth:`~.source.Source.one_pass`.
        """

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> Output: ...

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> Output: ...


@constant_result
def pick(
    device: torch.device,
    dtype: torch.dtype,
    other_dtype: torch.dtype | None,
    name: str,
    statistics: tuple[Primitive, ...],
    one_pass: Primitive | None,
    program: str | None,
) -> Choice:
    """Return the first backend that runs the loss in one pass, if one pass is requested
    and a backend can. Otherwise return the first backend that has the statistics.
    """

    def request(primitive: Primitive, decoded: Program | None = None) -> Request:
        other = other_dtype if primitive.startswith("divergence") else None
        return Request(primitive, device, dtype, decoded, other)

    best = None  # the first that serves, with the reason against one pass
    for backend in candidates(device, name):
        # The fallback runs every program. That is no reason to prefer it to a fast
        # backend that needs two passes.
        if best is not None and load(backend).is_fallback:
            continue
        if any(
            unsupported_reason(backend, request(primitive)) is not None for primitive in statistics
        ):
            continue
        if one_pass is None:
            return Choice("two_pass", backend, None)
        reason = unsupported_reason(
            backend, request(one_pass, None if program is None else Program.decode(program))
        )
        if reason is None:
            return Choice("one_pass", backend, None)
        best = best or Choice("two_pass", backend, reason)
    if best is None:
        for primitive in statistics:
            choose(request(primitive), name)  # raises, with the reason of every backend
    assert best is not None
    return best


def choose_plan(
    source: Source, objective: Objective[Any], plan: str, info: SourceInfo | None = None
) -> Choice:
    """Return the plan and backend of a call, with the reason against one pass.

    Raises if the requested plan is impossible.
    """
    op = source.rows.op
    info = info or source.info
    transformed = in_transform()
    if plan not in PLANS:
        raise InvalidCall(f"{op}: plan is {plan!r}, expected one of {', '.join(PLANS)}.")
    if plan == "two_pass":
        reason: str | None = "plan='two_pass' was asked for"
    elif transformed:
        reason = "inside torch.func's transforms, which differentiate the torch formula"
    else:
        reason = info.one_pass_unsupported_reason or objective.one_pass_unsupported_reason(
            info, requested=plan == "one_pass"
        )
    if info.backend is None or transformed:
        if plan == "one_pass" and info.backend is not None:
            raise UnsupportedRequest(f"{op}: plan='one_pass' is impossible {reason}.")
        return Choice("two_pass", (not transformed and info.evaluator) or TORCH, reason)
    one_pass = info.one_pass if reason is None else None
    choice: Choice = pick(
        info.device,
        info.dtype,
        info.other_dtype,
        info.backend,
        info.statistics,
        one_pass,
        objective.program if one_pass else None,
    )
    if choice.plan != "one_pass":
        choice = Choice("two_pass", choice.backend, reason or choice.one_pass_unsupported_reason)
    if plan == "one_pass" and choice.plan != plan and info.needs_grad:
        raise UnsupportedRequest(
            f"{op}: plan='one_pass' is impossible: {choice.one_pass_unsupported_reason}."
        )
    return choice


def unsupported_reasons(
    info: SourceInfo, choice: Choice, program: str | None
) -> dict[str, str | None]:
    """Return every backend, and why it cannot run the chosen plan of a call (None if it
    can).
    """
    if info.backend is None:
        return {}
    if choice.plan == "one_pass":
        assert info.one_pass is not None
        primitives: tuple[Primitive, ...] = (info.one_pass,)
    else:
        primitives, program = info.statistics, None
    decoded = None if program is None else Program.decode(program)
    found: dict[str, str | None] = {}
    for name in NAMES:
        requests = [
            Request(
                p,
                info.device,
                info.dtype,
                decoded,
                info.other_dtype if p.startswith("divergence") else None,
            )
            for p in primitives
        ]
        found[name] = next(
            (
                reason
                for reason in (unsupported_reason(name, r) for r in requests)
                if reason is not None
            ),
            None,
        )
    return found
