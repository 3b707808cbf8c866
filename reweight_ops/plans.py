"""The two plans of a policy loss, and which one a call takes.

``one_pass`` is an optimisation of ``two_pass``, never a different result: it needs everything but the row's own statistics beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import HeadCall, OnePassLoss, RowStatistics
from .backends.base import Program, Request
from .backends.select import candidates, choose, why_not
from .errors import InvalidCall, UnsupportedRequest
from .head import LogitsCall
from .loss_call import LossCall
from .output import PolicyLossOutput

PLANS = ("auto", "one_pass", "two_pass")


@dataclass(frozen=True)
class Choice:
    """A plan, a backend, and why not one pass (None when it is one pass)."""

    plan: str
    backend: str
    why_not_one_pass: str | None


def one_pass_obstacle(call: LossCall, logits: LogitsCall, differentiable_outputs: bool, insist: bool) -> str | None:
    """Why this call, whatever the backend, does not take one pass. ``insist``: the caller asked for it, which settles the matters of taste."""
    if not logits.needs_grad:
        return "no gradient is needed, so only statistics are computed"
    if call.spec.one_pass_obstacle is not None:
        return call.spec.one_pass_obstacle
    if differentiable_outputs:
        return "differentiable_outputs=True puts log-probs and entropies into the graph"
    if any(t is not None and t.requires_grad for t in (call.adv, call.factor)):
        return "advantages or token_weights require grad"
    if not insist and logits.logits.dtype == torch.float64:
        return "fp64 is for checking, and two_pass is the exact autograd"
    if not insist and logits.logits.dtype == torch.float16 and isinstance(call.loss_scale, (int, float)) and call.loss_scale == 1:
        return "fp16 gradients are rounded in forward: pass GradScaler's factor as loss_scale"
    return None


@torch.compiler.assume_constant_result
def pick(device: torch.device, dtype: torch.dtype, name: str, program_text: str | None) -> Choice:
    """The backend for a call; with a program, one that runs it in one pass if any does.

    Never past a backend that serves the call in two passes to the reference just because that knows every program.
    """
    program = None if program_text is None else Program.decode(program_text)
    if program is not None:
        for candidate in candidates(device.type, name):
            if candidate == "reference" and name == "auto" and _serves(candidate_before(candidate, device, name), device, dtype):
                break
            if all(why_not(candidate, Request(verb, device, dtype, program)) is None for verb in ("token_loss_grad", "token_stats")):
                return Choice("one_pass", candidate, None)
    backend = choose(Request("token_stats", device, dtype), name)
    reason = None if program is None else why_not(backend, Request("token_loss_grad", device, dtype, program))
    return Choice("two_pass", backend, reason)


def candidate_before(name: str, device: torch.device, asked: str) -> tuple[str, ...]:
    order = candidates(device.type, asked)
    return order[: order.index(name)]


def _serves(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> bool:
    return any(why_not(name, Request("token_stats", device, dtype)) is None for name in names)


def choose_plan(call: LossCall, logits: LogitsCall, plan: str, differentiable_outputs: bool, device: torch.device | None = None) -> Choice:
    """The plan and backend of a call, with the reason against one pass. Raises if the plan that was asked for is impossible."""
    if plan not in PLANS:
        raise InvalidCall(f"{call.rows.op}: plan is {plan!r}, expected one of {', '.join(PLANS)}.")
    device = device or logits.logits.device
    dtype = logits.logits.dtype
    obstacle = one_pass_obstacle(call, logits, differentiable_outputs, insist=plan == "one_pass")
    if plan == "two_pass" or (obstacle is not None and (plan == "auto" or not logits.needs_grad)):
        return Choice("two_pass", pick(device, dtype, logits.backend, None).backend, obstacle or "plan='two_pass' was asked for")
    choice = pick(device, dtype, logits.backend, call.spec.program_text) if obstacle is None else None
    if plan == "one_pass" and (choice is None or choice.plan != "one_pass"):
        raise UnsupportedRequest(f"{call.rows.op}: plan='one_pass' is impossible: {obstacle or (choice and choice.why_not_one_pass)}.")
    assert choice is not None
    return choice


def run(call: LossCall, logits: LogitsCall, choice: Choice, differentiable_outputs: bool) -> PolicyLossOutput:
    """Execute a call by its plan."""
    head = HeadCall(logits.vocab_size, logits.softcap, logits.drop_last, choice.backend, logits.consume)
    out = _one_pass(call, logits, head) if choice.plan == "one_pass" else _two_pass(call, logits, head, differentiable_outputs)
    logits.mark_consumed()
    return out


def _one_pass(call: LossCall, logits: LogitsCall, head: HeadCall) -> PolicyLossOutput:
    rows = call.rows
    assert rows.ids is not None
    loss, table = OnePassLoss.apply(logits.logits, rows.ids, logits.temperature, tuple(call.inputs()), call.params, call.spec.program_text, head)
    logp, entropy, _, per_token, by_logp, by_entropy = table.unbind()
    leaves, by = {"logp": logp, "entropy": entropy}, (by_logp, by_entropy)
    return PolicyLossOutput(
        loss, rows.unflatten(logp), rows.unflatten(entropy), "one_pass", head.backend, call.released(), leaves, per_token, by
    )


def row_statistics(logits: LogitsCall, head: HeadCall, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Differentiable statistics by name, ``[N]``."""
    assert logits.rows.ids is not None
    values = RowStatistics.apply(logits.logits, logits.rows.ids, logits.temperature, head, ",".join(names))
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
    return PolicyLossOutput(loss, rows.unflatten(shown["logp"]), entropies, "two_pass", backend, call.released(), detached, result.loss.detach())
