"""The two plans of a policy loss, and which one a call takes.

``one_pass`` is an optimisation of ``two_pass``, never a different result: it needs everything but the row's own statistics beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..backends.base import Request
from ..backends.select import candidates, choose, load, why_not
from ..calls.logits import LogitsCall
from ..calls.policy import LossCall
from ..formula.loss_program import Program
from ..formula.trace import trace_weight
from .autograd import HeadCall, OnePassLoss, RowStatistics
from .output import PolicyLossOutput

PLANS = ("auto", "one_pass", "two_pass")


@dataclass(frozen=True)
class Choice:
    """A plan, a backend, and why not one pass (None when it is one pass)."""

    plan: str
    backend: str
    why_not_one_pass: str | None


@dataclass(frozen=True)
class Target:
    """What a plan depends on of the logits, materialised or not."""

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    backend: str


def one_pass_obstacle(call: LossCall, target: Target, differentiable_outputs: bool, insist: bool) -> str | None:
    """Why this call, whatever the backend, does not take one pass. ``insist``: the caller asked for it, which settles the matters of taste."""
    if not target.needs_grad:
        return "no gradient is needed, so only statistics are computed"
    if call.spec.one_pass_obstacle is not None:
        return call.spec.one_pass_obstacle
    if call.old_logp is None and any(
        r.weight is not None and "old_logp" in trace_weight(type(r.weight)).leaves for r in call.spec.reductions
    ):
        return "a reduction is over the old log-probs, which on-policy are the current ones"
    if differentiable_outputs:
        return "differentiable_outputs=True puts log-probs and entropies into the graph"
    if any(t is not None and t.requires_grad for t in (call.adv, call.factor)):
        return "advantages or token_weights require grad"
    if not insist and target.dtype == torch.float64:
        return "fp64 is for checking, and two_pass is the exact autograd"
    if not insist and target.dtype == torch.float16 and isinstance(call.loss_scale, (int, float)) and call.loss_scale == 1:
        return "fp16 gradients are rounded in forward: pass GradScaler's factor as loss_scale"
    return None


@torch.compiler.assume_constant_result
def pick(device: torch.device, dtype: torch.dtype, name: str, program_text: str | None) -> Choice:
    """The backend for a call; with a program, the first that runs it in one pass, if any does."""

    best = None  # the first that serves, with why it takes no one pass
    for backend in candidates(device.type, name):
        # The reference knows every program, which is no reason to prefer it to a fast backend that needs two passes.
        if (best is not None and load(backend).is_fallback) or why_not(backend, Request("token_stats", device, dtype)) is not None:
            continue
        if program_text is None:
            return Choice("two_pass", backend, None)
        reason = why_not(backend, Request("token_loss_grad", device, dtype, Program.decode(program_text)))
        if reason is None:
            return Choice("one_pass", backend, None)
        best = best or Choice("two_pass", backend, reason)
    if best is None:
        choose(Request("token_stats", device, dtype), name)  # raises, with everybody's reason
    assert best is not None
    return best


def choose_plan(call: LossCall, target: Target, plan: str, differentiable_outputs: bool) -> Choice:
    """The plan and backend of a call, with the reason against one pass. Raises if the plan that was asked for is impossible."""
    if plan not in PLANS:
        raise InvalidCall(f"{call.rows.op}: plan is {plan!r}, expected one of {', '.join(PLANS)}.")
    if plan == "two_pass":
        obstacle: str | None = "plan='two_pass' was asked for"
    else:
        obstacle = one_pass_obstacle(call, target, differentiable_outputs, insist=plan == "one_pass")
    if obstacle is None:
        choice: Choice = pick(target.device, target.dtype, target.backend, call.spec.program_text)
    else:
        choice = Choice("two_pass", pick(target.device, target.dtype, target.backend, None).backend, obstacle)
    if plan == "one_pass" and choice.plan != plan and target.needs_grad:
        raise UnsupportedRequest(f"{call.rows.op}: plan='one_pass' is impossible: {choice.why_not_one_pass}.")
    return choice


def target_of(logits: LogitsCall, device: torch.device | None = None) -> Target:
    """The target of a call on materialised logits; ``device`` replaces theirs (for explaining a meta tensor)."""
    return Target(device or logits.logits.device, logits.logits.dtype, logits.needs_grad, logits.backend)


def run(call: LossCall, logits: LogitsCall, choice: Choice, differentiable_outputs: bool) -> PolicyLossOutput:
    """Execute a call by its plan."""
    head = HeadCall(logits.vocab_size, logits.softcap, logits.drop_last, choice.backend, logits.consume)
    out = _one_pass(call, logits, head) if choice.plan == "one_pass" else _two_pass(call, logits, head, differentiable_outputs)
    logits.mark_consumed()
    return out


def _one_pass(call: LossCall, logits: LogitsCall, head: HeadCall) -> PolicyLossOutput:
    rows = call.rows
    assert rows.ids is not None
    loss, table = OnePassLoss.apply(  # type: ignore[no-untyped-call]
        logits.logits, rows.ids, logits.temperature, tuple(call.inputs()), call.params, call.spec.program_text, head
    )
    logp, entropy, _, per_token, by_logp, by_entropy = table.unbind()
    leaves, by = {"logp": logp, "entropy": entropy}, (by_logp, by_entropy)
    return PolicyLossOutput(
        loss, rows.unflatten(logp), rows.unflatten(entropy), "one_pass", head.backend, call.released(), leaves, per_token, by
    )


def row_statistics(logits: LogitsCall, head: HeadCall, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Differentiable statistics by name, ``[N]``."""
    assert logits.rows.ids is not None
    values = RowStatistics.apply(  # type: ignore[no-untyped-call]
        logits.logits, logits.rows.ids, logits.temperature, head, ",".join(names)
    )
    return dict(zip(names, values, strict=True))


def _two_pass(call: LossCall, logits: LogitsCall, head: HeadCall, differentiable_outputs: bool) -> PolicyLossOutput:
    needs_p_sq = "log_sum_p_sq" in call.spec.requires
    stats = row_statistics(logits, head, ("logp", "lse", "entropy", *(("log_sum_p_sq",) if needs_p_sq else ())))
    leaves = {name: value for name, value in stats.items() if name != "lse"}
    return middle(call, leaves, head.backend, differentiable_outputs)


def middle(call: LossCall, leaves: dict[str, Tensor], backend: str, differentiable_outputs: bool) -> PolicyLossOutput:
    """From statistics to the output, in torch: the half of two_pass that has no vocabulary."""
    rows = call.rows
    result = call.evaluate(leaves)
    loss = result.weighted_loss.sum() if call.spec.reduction.scalar else rows.unflatten(result.weighted_loss)
    detached = {name: value.detach() for name, value in leaves.items()}
    shown = leaves if differentiable_outputs else detached
    entropies = rows.unflatten(shown["entropy"]) if "entropy" in shown else None
    return PolicyLossOutput(
        loss, rows.unflatten(shown["logp"]), entropies, "two_pass", backend, call.released(), detached, result.loss.detach()
    )
