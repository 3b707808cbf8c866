"""The public policy losses: from logits, and from log-probs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..calls.keywords import (
    PolicyKeywords,
    PolicyLossKeywords,
    PolicyOptions,
    SoftmaxOptions,
    check_flag,
    parse,
)
from ..calls.logits import resolve_logits
from ..calls.logps import STATISTICS, check_statistics, flat_statistics, resolve_logps
from ..calls.policy import resolve_loss
from ..calls.specs import named_spec
from ..engine.kept import KEPT, KeptCall, KeptLogps, signature
from ..engine.output import PolicyLossOutput
from ..engine.policy import PolicyObjective
from ..engine.run import Again, Call
from ..engine.sources import LogitsSource, LogpsSource
from ..engine.stored import evaluator_of
from ..spec.policy import PolicyLossSpec
from .explain import public_op


@public_op
def policy_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    plan: str = "auto",
    differentiable_outputs: bool = False,
    **keywords: Unpack[PolicyLossKeywords],
) -> Call[PolicyLossOutput] | Again[PolicyLossOutput]:
    """A reweighted policy loss from logits, and its gradient.

    The loss is ``loss_scale · Σ_k coef_k · Σ_i w_ki · u_ki · ℓ_k(row i)``.

    A per-row argument has exactly one of the shapes R (token), ``R[:-1]`` or
    ``R[:-1] + (1,)`` (sequence; with ``cu_seqlens`` ``[S]`` or ``[S, 1]``), or is a
    number. Log-probs are fp32 or fp64 and detached.

    Args:
        logits, completion_ids, completion_mask, temperature, softcap, vocab_size,
            drop_last, sampling_mask, entropy_over, backend: as in :func:`token_logps`.
        advantages: one per row or per sequence, or a number; None only if the spec does
            not read it.
        spec: a :class:`PolicyLossSpec` or a method's name.
        plan: ``"auto"``, ``"one_pass"`` (gradient in forward, one read and one write
            per logit) or ``"two_pass"`` (everything else).
        differentiable_outputs: put ``per_token_logps`` and ``entropies`` into the
            graph; selects two_pass.
        denominator_mask: the rows that count in denominators; default: the rows that
            are not ignored.
        cu_seqlens: ``[S + 1]``, packed rows; or ``sequence_ids`` with
            ``num_sequences``; else one sequence per last dimension.
        segment_ids: sub-sequence segments, for :class:`SegmentRatio`.
        group_ids: ``[S]``, which prompt each sequence answers, in ``[0, num_groups)``,
            for a reduction or weight that reads prompts.
        num_groups: the number of prompts, an int. Memory grows with it and with
            ``num_sequences``, also of empty ones.
        old_per_token_logps: log-probs of the behaviour policy. None means on-policy
            (ratio 1, gradient kept).
        ref_per_token_logps: log-probs of the reference policy, if a penalty reads them.
        sampling_per_token_logps: log-probs of the sampler, if a weight reads them.
        importance_sampling_ratio: a detached factor of the surrogate only, already
            clipped by the caller.
        token_weights: one more detached factor of the surrogate, one per row.
        num_items_in_batch: the final divisor of this call's sum. DDP and FSDP average
            gradients, so pass total / world_size.
        num_sequences_in_batch: the final divisor of a mean over sequences.
        loss_scale: multiplies loss and gradient before any rounding (GradScaler's
            scale, 1/accumulation steps); metrics stay unscaled.
        validate: check ids, offsets and groups on a GPU too. The call then waits for
            the GPU. Without it, bad values make the loss and its gradient NaN there.
        differentiable_inputs: give gradients to old, reference and sampling log-probs
            that require them, through the ratio, the rules, and weights that are not
            detached. Without it such log-probs are an error.
        unused: an argument that the spec does not read is an ``"error"``. ``"ignore"``
            drops it, for trainers that always pass everything.
        consume_logits: overwrite the logits with their gradient, which needs no extra
            memory. Using them afterwards is an error.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
    >>> ids, advantages = torch.tensor([[1, 2]]), torch.tensor([1.0])
    >>> out = rw.policy_loss(logits, ids, advantages, spec="grpo")
    >>> out.loss
    tensor(-1., grad_fn=<...>)
    >>> out.loss.backward()
    """
    given: dict[str, Any] = {"completion_ids": completion_ids, "advantages": advantages, **keywords}
    key = signature(spec, (plan, differentiable_outputs), {"logits": logits, **given})
    kept: KeptCall | None = None if key is None else KEPT.get(key)

    def resolve() -> Call[PolicyLossOutput]:
        if kept is not None and (call := kept.bind(logits, given)) is not None:
            return call
        op, own = "policy_loss", ("spec", "plan", "differentiable_outputs")
        check_flag(op, "differentiable_outputs", differentiable_outputs)
        options, data = parse(op, dict(keywords), SoftmaxOptions, PolicyOptions, own=own)
        resolved = resolve_logits(
            op,
            logits,
            completion_ids,
            options,
            {"advantages": advantages, **data.named()},
            data.validate,
        )
        loss = resolve_loss(resolved.rows, advantages, named_spec(op, spec), data)
        objective = PolicyObjective(loss, differentiable_outputs)
        return Call(
            LogitsSource(resolved),
            objective,
            plan,
            keep=None if key is None else partial(KEPT.keep, key, resolved, objective),
        )

    return resolve() if kept is None else Again(partial(kept.run, logits, given), resolve)


@public_op
def policy_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    entropies: Tensor | None = None,
    log_sum_p_sq: Tensor | None = None,
    **keywords: Unpack[PolicyKeywords],
) -> Call[PolicyLossOutput]:
    """The policy loss from log-probs, for trainers that have them already (verl,
    prime-rl, OpenRLHF).

    It is exact under autograd to ``per_token_logps`` (R, fp32 or fp64), and to
    ``entropies`` and ``log_sum_p_sq`` if the spec reads them. The other arguments are
    those of :func:`policy_loss`.

    The row kernels of a backend evaluate a loss in fp32 whose terms are pointwise, and
    ``out.backend`` names it. PyTorch evaluates any other, and ``out.backend`` is
    ``"torch"``. ``REWEIGHT_OPS_BACKEND=reference`` selects PyTorch for all.

    >>> import torch, reweight_ops as rw
    >>> logps = torch.full((1, 2), -1.0, requires_grad=True)
    >>> rw.policy_loss_from_logps(logps, torch.tensor([0.5]), spec="reinforce").loss
    tensor(0.5000, grad_fn=<...>)
    """
    stored = {
        "per_token_logps": per_token_logps,
        "entropies": entropies,
        "log_sum_p_sq": log_sum_p_sq,
    }
    given: dict[str, Any] = {"advantages": advantages, **keywords}
    key = signature(spec, (), {**stored, **given})
    kept: KeptLogps | None = None if key is None else KEPT.get(key)
    if kept is not None and (call := kept.bind(stored, given)) is not None:
        return call
    op = "policy_loss_from_logps"
    (data,) = parse(op, dict(keywords), PolicyOptions, own=("spec", *list(stored)[1:]))
    tensors = {**stored, "advantages": advantages, **data.named()}
    rows = resolve_logps(op, per_token_logps, tensors, data.validate)
    loss = resolve_loss(rows, advantages, named_spec(op, spec), data)
    check_statistics(rows, stored)
    for name, leaf in STATISTICS.items():
        if stored[name] is None and leaf in loss.spec.requires:
            raise rows.error(f"the spec reads {leaf}: pass {name}.")
    if (
        log_sum_p_sq is not None
        and "log_sum_p_sq" not in loss.spec.requires
        and data.unused == "error"
    ):
        raise rows.error(
            "log_sum_p_sq would have no effect: no part of the spec reads it. Leave it out, or "
            'pass unused="ignore".'
        )
    evaluator = evaluator_of(loss, per_token_logps)
    return Call(
        LogpsSource(rows, flat_statistics(rows, stored, evaluator), evaluator),
        PolicyObjective(loss),
        keep=None if key is None else partial(KEPT.keep_logps, key, loss),
    )
