"""slime and Miles on our op: their policy loss in one call on the packed logits, or any
of our methods.

::

    --loss-type custom_loss --custom-loss-function-path
    reweight_ops.integrations.slime.loss

computes slime's own loss by its own options. A file for ``--custom-config-path`` names
another one::

    reweight_method: advantage_reweighting
    reweight_options: {alpha: 0.3}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core.calls.sampling_mask import SamplingMask
from .._core.calls.specs import method
from .._core.catalogue.search import entry_of
from .._core.engine.output import PolicyLossOutput
from .._core.formula.base import Rule, TokenWeight
from .._core.formula.leaves import Leaves
from .._core.formula.namespace import TorchNamespace
from .._core.losses.policy import policy_loss
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import Ratio, SequenceRatio, TokenRatio
from .._core.spec.reduction import FromFunction, SequenceMean, TokenMean
from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ..rules.penalties import K1, K2, K3, EntropyBonus, K3Corrected
from ..rules.surrogates import Cispo, Clip, DualClip
from ..weights.importance import OffPolicySequenceMask, TruncatedImportance
from .hosted import agg_mode, level_unsupported_reason
from .layouts import Packed, packed

try:
    from megatron.core import mpu
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.slime needs Megatron, which slime trains with ({error})"
    ) from error

__all__ = ["loss", "spec_of"]

#: Options of slime's surrogate, with the values at which they have no effect.
_SURROGATE = {
    "eps_clip": (0.2,),
    "eps_clip_high": (0.2, None),
    "eps_clip_c": (None,),
    "use_tis": (False,),
    "use_opsm": (False,),
}
_KL: dict[str, Rule] = {
    "k1": K1(),
    "k2": K2(clamp=math.inf),
    "k3": K3(clamp=math.inf),
    "low_var_kl": K3(clamp=math.inf, cap=10.0),
}


def _refuse(args: Any) -> None:
    """Raise for an option of slime's own loss that one call of the op
    does not support."""
    sizes = {
        "tensor": mpu.get_tensor_model_parallel_world_size(),
        "context": mpu.get_context_parallel_world_size(),
    }
    reasons = [
        f"{kind} parallelism of {size}: the rows of a call are whole"
        for kind, size in sizes.items()
        if size > 1
    ]
    for name in ("custom_tis_function_path", "custom_pg_loss_reducer_function_path"):
        if getattr(args, name, None) is not None:
            reasons.append(f"{name}: a weight of the spec does that")
    if args.use_tis and args.use_rollout_logprobs:
        reasons.append(
            "use_tis with use_rollout_logprobs: the op has one policy before the update, slime "
            "then has two"
        )
    if args.get_mismatch_metrics:
        reasons.append("get_mismatch_metrics: they are of slime's own correction")
    if reasons:
        raise UnsupportedRequest(
            f"slime's options cannot be combined with this loss: {'; '.join(reasons)}. "
            "--loss-type policy_loss is slime's own."
        )


def spec_of(args: Any) -> PolicyLossSpec:
    """Return the loss that slime's arguments ask for: ``reweight_method`` with
    ``reweight_options``, or slime's own, with slime's KL and entropy terms.

    Raises:
        InvalidCall: an option that would have no effect beside ``reweight_method``, or
            a reduction that is not slime's.
    """
    name = getattr(args, "reweight_method", None)
    spec = (
        _own(args)
        if name is None
        else method(name, **(getattr(args, "reweight_options", None) or {}))
    )
    if name is not None:
        reason = level_unsupported_reason(entry_of(name, "policy_loss"), "a micro-batch")
        if reason is not None:
            raise UnsupportedRequest(f"slime cannot train {name}: {reason}.")
        ignored = [
            f"{n}={getattr(args, n)!r}"
            for n, left_alone in _SURROGATE.items()
            if getattr(args, n, left_alone[0]) not in left_alone
        ]
        if ignored:
            raise InvalidCall(
                f"reweight_method={name!r} replaces slime's loss, so {', '.join(ignored)} would "
                "have no effect: use reweight_options."
            )
        if "adv" not in spec.requires:
            raise UnsupportedRequest(
                f"reweight_method={name!r} does not read advantages, so slime's reward would "
                "have no effect."
            )
        wanted = "token-mean" if args.calculate_per_token_loss else "seq-mean-token-mean"
        if agg_mode(spec.reduction) != wanted:
            flag = "leave out" if args.calculate_per_token_loss else "set"
            raise InvalidCall(
                f"reweight_method={name!r} reduces by "
                f"{agg_mode(spec.reduction) or spec.reduction}, slime by {wanted}: {flag} "
                "--calculate-per-token-loss."
            )
    # A coefficient of 0 still computes the entropies, which slime logs.
    penalties = [*spec.penalties, Penalty(EntropyBonus(), args.entropy_coef)]
    if args.use_kl_loss:
        penalties.append(Penalty(_kl(args), args.kl_loss_coef))
    return dataclasses.replace(spec, penalties=tuple(penalties))


def _own(args: Any) -> PolicyLossSpec:
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    surrogate: Rule = Clip(epsilon_low=args.eps_clip, epsilon_high=high)
    if args.advantage_estimator == "cispo":
        surrogate = Cispo(ratio_min=1 - args.eps_clip, ratio_max=1 + high)
    elif args.eps_clip_c is not None:
        surrogate = DualClip(
            epsilon_low=args.eps_clip, epsilon_high=high, clip_ratio_c=args.eps_clip_c
        )
    ratio: Ratio = (
        SequenceRatio(clamp=math.inf)
        if args.advantage_estimator == "gspo"
        else TokenRatio(clamp=math.inf)
    )
    weights: list[TokenWeight] = []
    if args.use_tis:
        weights.append(TruncatedImportance(ratio_min=args.tis_clip_low, ratio_max=args.tis_clip))
    if args.use_opsm:
        weights.append(OffPolicySequenceMask(threshold=args.opsm_delta))
    reduction = TokenMean() if args.calculate_per_token_loss else SequenceMean()
    return PolicyLossSpec(
        surrogate=surrogate,
        ratio=ratio,
        weights=tuple(weights),
        reduction=reduction,
        name=f"slime_{args.advantage_estimator}",
    )


def _kl(args: Any) -> Rule:
    if args.kl_loss_type not in _KL:
        raise InvalidCall(
            f"kl_loss_type is {args.kl_loss_type!r}, expected one of {', '.join(_KL)}."
        )
    if not args.use_unbiased_kl:
        return _KL[args.kl_loss_type]
    if args.kl_loss_type != "k3" or args.advantage_estimator == "gspo":
        raise UnsupportedRequest(
            "use_unbiased_kl is here for kl_loss_type=k3 and token ratios only; --loss-type "
            "policy_loss is slime's own."
        )
    return K3Corrected(clamp=math.inf)


def _kept(args: Any, batch: dict[str, Any], layout: Packed) -> SamplingMask | None:
    """Return the ids that the rollout's top-p kept at every position, or None if it
    removed none.
    """
    if args.rollout_top_p == 1.0:
        return None
    names = ("rollout_top_p_token_ids", "rollout_top_p_token_offsets")
    given = [batch.get(name) for name in names]
    if any(x is None for x in given):
        raise InvalidCall(
            f"rollout_top_p={args.rollout_top_p} needs {names[0]} and {names[1]} in the batch, "
            "as in slime's own loss."
        )
    device = layout.targets.device
    ids, offsets = (
        [torch.as_tensor(x, dtype=torch.int64, device=device) for x in parts]
        for parts in given
        if parts is not None
    )
    lengths = [x.numel() - 1 for x in offsets]
    if lengths != list(batch["response_lengths"]):
        raise UnsupportedRequest(
            f"{names[1]} are of {lengths} tokens, the responses have "
            f"{list(batch['response_lengths'])}: "
            "the op takes the kept ids of every response token, slime the whole vocabulary "
            "where it has none."
        )
    counts = layout.spread([x.diff() for x in offsets])
    return SamplingMask(torch.cat(ids), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute slime's ``policy_loss_function`` with one
    :func:`~reweight_ops.policy_loss` call on ``[1, T, V]`` logits.

    With ``rollout_top_p`` log-probs are over the tokens that the rollout kept
    (:class:`~reweight_ops.SamplingMask`), and entropies are over the vocabulary, as in
    slime. The reduction is slime's ``sum_of_sample_mean`` with any divisor. Metrics
    have slime's names: ``loss``, ``pg_loss``, ``entropy_loss``, ``pg_clipfrac``,
    ``ppo_kl``, and ``kl_loss`` and ``train_rollout_logprob_abs_diff`` if slime has
    them. With ``eps_clip_c``, ``pg_clipfrac`` counts its clip too.

    Raises:
        UnsupportedRequest: tensor or context parallelism, a top-p that did not record
            all tokens, a custom correction or reducer.
        InvalidCall: options that would have no effect; a top-p without the ids that it
            kept.
    """
    _refuse(args)
    spec = spec_of(args)
    layout = packed(batch["unconcat_tokens"], batch["response_lengths"], logits.size(1))

    def reduced(per_token: Tensor, mask: Tensor) -> Tensor:
        return sum_of_sample_mean(layout.gather(per_token))

    sampled = batch.get("rollout_log_probs")
    old = sampled if args.use_rollout_logprobs else batch.get("log_probs")
    reads, kept = spec.requires, _kept(args, batch, layout)
    out = policy_loss(
        logits[0],
        layout.targets,
        layout.spread(batch["advantages"]),
        spec=dataclasses.replace(spec, reduction=FromFunction(reduced)),
        temperature=args.rollout_temperature,
        completion_mask=layout.spread(batch["loss_masks"]),
        sequence_ids=layout.sequence_ids,
        num_sequences=layout.num_sequences,
        old_per_token_logps=layout.spread(old) if old else None,
        ref_per_token_logps=layout.spread(batch["ref_log_probs"]) if "ref_logp" in reads else None,
        sampling_per_token_logps=layout.spread(sampled)
        if "sampling_logp" in reads and sampled
        else None,
        sampling_mask=kept,
        entropy_over="kept" if kept is None else "vocabulary",
        unused="ignore",  # slime passes what it has
    )
    return out.loss, _metrics(
        spec, out, layout, sum_of_sample_mean, old, batch, args.use_rollout_logprobs
    )


@torch.no_grad()
def _metrics(
    spec: PolicyLossSpec,
    out: PolicyLossOutput,
    layout: Packed,
    reduce: Callable[[Tensor], Tensor],
    old: Any,
    batch: dict[str, Any],
    of_sampler: bool,
) -> dict[str, Tensor]:
    keep = torch.cat(list(batch["loss_masks"])) != 0

    def mean(x: Tensor) -> Tensor:
        # slime multiplies by its mask, and a NaN there would stay
        return reduce(torch.where(keep, x, 0))

    assert out.entropies is not None
    logps = layout.gather(out.per_token_logps)
    before = torch.cat(list(old)) if old else logps
    drift = layout.gather(out.ratio).log() if spec.ratio.level == "sequence" else logps - before
    entropy = mean(layout.gather(out.entropies))
    found = {"loss": out.loss.detach(), "pg_loss": out.loss.detach(), "entropy_loss": entropy}
    found |= {
        "pg_clipfrac": mean(layout.gather(out.is_clipped).to(logps.dtype)),
        "ppo_kl": mean(-drift),
    }
    leaves = {
        "logp": logps,
        "old_logp": before,
        "log_ratio": drift,
        "entropy": layout.gather(out.entropies),
    }
    if "ref_logp" in spec.requires:
        leaves["ref_logp"] = torch.cat(list(batch["ref_log_probs"]))
    for penalty in spec.penalties:
        value = mean(penalty.rule.loss(TorchNamespace(logps.dtype), Leaves(leaves)))
        found["pg_loss"] = found["pg_loss"] - penalty.coef * value
        if not isinstance(penalty.rule, EntropyBonus):
            found["kl_loss"] = value
    if batch.get("rollout_log_probs"):
        # where the policy before is the sampler, slime compares the current one
        compared = logps if of_sampler else before
        found["train_rollout_logprob_abs_diff"] = mean(
            (compared - torch.cat(list(batch["rollout_log_probs"]))).abs()
        )
    return found
