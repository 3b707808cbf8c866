"""NeMo-RL on our ops: a ``LossFunction`` that computes NeMo-RL's own loss by its own
options, or any of our methods.

::

    policy, ..., master_config, ... = setup(config, tokenizer, dataset, val_dataset)
    loss_fn = PolicyLoss(master_config)                         # NeMo-RL's loss
    # another one, from logits, which are read once
    loss_fn = PolicyLoss(master_config, "gspo", logits=True)

``logits=True`` asks NeMo-RL for logits (``LossInputType.LOGIT``). Otherwise it passes
log-probs (``LossInputType.LOGPROB``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .._core.calls.dtensors import has_dtensors
from .._core.calls.specs import METHODS, named_spec
from .._core.engine.output import PolicyLossOutput
from .._core.formula.base import Rule, TokenWeight
from .._core.formula.leaves import Leaves
from .._core.formula.namespace import TorchNamespace
from .._core.formula.trace import trace_rule
from .._core.losses.policy import policy_loss, policy_loss_from_logps
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import GeometricMeanRatio, SequenceRatio, TokenRatio
from .._core.spec.reduction import SequenceMean, TokenMean
from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ..rules.on_policy_kl import K1OnPolicy, K2OnPolicy, K3OnPolicy
from ..rules.surrogates import Cispo, Clip, DualClip, Reinforce, Unclipped
from ..weights.importance import (
    GeometricSequenceMask,
    MaskedImportance,
    SequenceMaskedImportance,
    SequenceTruncatedImportance,
    TruncatedImportance,
)
from .hosted import Host, agg_mode, divisors, level_unsupported_reason, per_sequence
from .layouts import predicted
from .trainers import check_version

try:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.nemo_rl needs NeMo-RL ({error})"
    ) from error

check_version("NeMo-RL")

__all__ = ["PolicyLoss", "spec_of"]

#: Options of NeMo-RL's surrogate and of its correction, with the values at which they
#: are left alone.
_SURROGATE = {
    "disable_ppo_ratio": False,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
_KL = {"k1": K1OnPolicy, "k2": K2OnPolicy, "k3": K3OnPolicy}


def _kl(options: Any) -> tuple[Penalty, ...]:
    """Return NeMo-RL's KL term, or none if it is in the reward."""
    if options.use_kl_in_reward or options.reference_policy_kl_penalty == 0:
        return ()
    if options.use_on_policy_kl_approximation:
        raise UnsupportedRequest(
            "use_on_policy_kl_approximation is not supported here: leave the loss to NeMo-RL's "
            "ClippedPGLossFn."
        )
    if options.reference_policy_kl_type not in _KL:
        raise InvalidCall(
            f"reference_policy_kl_type is {options.reference_policy_kl_type!r}, expected one of "
            f"{', '.join(_KL)}."
        )
    clamp, cap = (
        math.inf if x is None else x
        for x in (options.kl_input_clamp_value, options.kl_output_clamp_value)
    )
    return (
        Penalty(
            _KL[options.reference_policy_kl_type](clamp=clamp, cap=cap),
            options.reference_policy_kl_penalty,
        ),
    )


def _surrogate(options: Any) -> Rule:
    low, high, c = options.ratio_clip_min, options.ratio_clip_max, options.ratio_clip_c
    if options.disable_ppo_ratio and c is not None:
        raise UnsupportedRequest(
            "ratio_clip_c with disable_ppo_ratio clips a log-prob: leave the loss to NeMo-RL's "
            "ClippedPGLossFn."
        )
    if options.force_on_policy_ratio:
        return Unclipped()
    if options.disable_ppo_ratio:
        return Reinforce()
    if options.use_cispo:
        return Cispo(ratio_min=1 - low, ratio_max=1 + high)
    return (
        Clip(epsilon_low=low, epsilon_high=high)
        if c is None
        else DualClip(epsilon_low=low, epsilon_high=high, clip_ratio_c=c)
    )


def _correction(options: Any) -> tuple[TokenWeight, ...]:
    if not options.use_importance_sampling_correction:
        return ()
    low, high = (
        options.truncated_importance_sampling_ratio_min or 0.0,
        options.truncated_importance_sampling_ratio,
    )
    kind = options.truncated_importance_sampling_type
    truncated, masked = TruncatedImportance, MaskedImportance
    if options.sequence_level_importance_ratios:
        truncated, masked = SequenceTruncatedImportance, SequenceMaskedImportance  # type: ignore[assignment]
    if kind == "tis":
        return (truncated(ratio_min=low, ratio_max=high),)
    if kind == "icepop":
        return (masked(ratio_min=low, ratio_max=high),)
    whole = truncated(ratio_min=0.0, ratio_max=math.inf)
    return (
        (whole,) if kind is None else (whole, GeometricSequenceMask(ratio_min=low, ratio_max=high))
    )


def spec_of(options: Any) -> PolicyLossSpec:
    """Return the loss that NeMo-RL's ``ClippedPGLossConfig`` asks for.

    Raises:
        UnsupportedRequest: ``positive_example_nll_weight``,
            ``use_on_policy_kl_approximation``, or ``ratio_clip_c`` with
            ``disable_ppo_ratio``.
    """
    if options.positive_example_nll_weight > 0:
        raise UnsupportedRequest(
            "positive_example_nll_weight reads rewards: leave the loss to NeMo-RL's "
            "ClippedPGLossFn."
        )
    by_sequence = options.sequence_level_importance_ratios and not options.force_on_policy_ratio
    return PolicyLossSpec(
        surrogate=_surrogate(options),
        penalties=_kl(options),
        ratio=SequenceRatio(clamp=math.inf) if by_sequence else TokenRatio(clamp=math.inf),
        weights=_correction(options),
        reduction=TokenMean() if options.token_level_loss else SequenceMean(),
        name="nemo_rl",
    )


@dataclasses.dataclass(frozen=True)
class _Setting:
    """The part of NeMo-RL's configuration that decides whether a loss can
    be computed."""

    ranks: dict[str, int]
    filtered: bool
    fused: bool

    @classmethod
    def of(cls, policy: Any) -> _Setting:
        megatron = policy.get("megatron_cfg") or {}
        if megatron.get("enabled"):
            sizes, tensor = megatron, "tensor_model_parallel_size"
        else:
            sizes, tensor = policy.get("dtensor_cfg") or {}, "tensor_parallel_size"
        ranks = {"tensor": sizes.get(tensor, 1), "context": sizes.get("context_parallel_size", 1)}
        generation = policy.get("generation") or {}
        k, p = generation.get("top_k"), generation.get("top_p")
        filtered = (k is not None and k > 0) or (p is not None and p != 1.0)
        return cls(
            ranks,
            filtered,
            bool(megatron.get("enabled") and megatron.get("use_fused_linear_logprobs")),
        )

    def refuse(self, spec: PolicyLossSpec, logits: bool) -> None:
        """Raise if this configuration does not allow a loss of this input."""
        reasons = []
        if logits:
            reasons += [
                f"{kind} parallelism of {n}: a call's rows are whole"
                for kind, n in self.ranks.items()
                if n > 1
            ]
            if self.fused:
                reasons.append("use_fused_linear_logprobs: there are no logits")
            if self.filtered:
                reasons.append(
                    "top_k or top_p of policy.generation: log-probs over the kept tokens alone "
                    "are not here"
                )
        elif self.filtered and "ref_logp" in spec.requires:
            reasons.append(
                "top_k or top_p of policy.generation with a KL to the reference, which has the "
                "unfiltered log-probs"
            )
        if reasons:
            remedy = (
                "logits=False leaves log-probs to NeMo-RL"
                if logits
                else "ClippedPGLossFn is NeMo-RL's own"
            )
            raise UnsupportedRequest(
                "NeMo-RL's configuration cannot be combined with this loss: "
                f"{'; '.join(reasons)}. {remedy}."
            )


def _unsupported_reason(spec: PolicyLossSpec, logits: bool) -> str | None:
    leaves = {"adv", "logp", "log_ratio", "old_logp", "ref_logp", "sampling_logp"} | (
        {"entropy", "log_sum_p_sq"} if logits else set()
    )
    if any("ref_logp" in trace_rule(type(p.rule)).leaves for p in spec.penalties):
        return (
            "it has a KL penalty, and NeMo-RL's options are added: leave it out and set "
            "loss_fn.reference_policy_kl_penalty"
        )
    modes = {agg_mode(r) for r in spec.reductions}
    if not modes <= {
        "token-mean",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    }:
        return f"its reduction, {spec.reduction!r}, is not one of NeMo-RL's"
    if "token-mean" in modes and len(modes) > 1:
        return "its terms are divided by tokens and by sequences, and NeMo-RL knows one count"
    if any(
        isinstance(r, SequenceMean) and r.per == "constant" and r.horizon is None
        for r in spec.reductions
    ):
        return (
            "its reduction divides by the padded length, which differs between "
            "micro-batches: pass a horizon"
        )
    return Host("NeMo-RL", frozenset(leaves)).unsupported_reason(spec)


def _replacing(spec: PolicyLossSpec | str, options: Any, logits: bool) -> PolicyLossSpec:
    """Return a spec in place of NeMo-RL's surrogate, with NeMo-RL's KL. An option that
    would have no effect is an error.
    """
    reason = (
        level_unsupported_reason(METHODS[spec], "a micro-batch")
        if isinstance(spec, str) and spec in METHODS
        else None
    )
    spec = named_spec("nemo_rl.PolicyLoss", spec)
    name = spec.name or "the spec"
    reason = reason or _unsupported_reason(spec, logits)
    if reason is not None:
        raise UnsupportedRequest(f"NeMo-RL cannot train {name}: {reason}.")
    ignored = [
        f"{n}={getattr(options, n)!r}"
        for n, left_alone in _SURROGATE.items()
        if getattr(options, n) != left_alone
    ]
    if options.use_importance_sampling_correction and "sampling_logp" not in spec.requires:
        ignored.append("use_importance_sampling_correction=True")
    if ignored:
        raise InvalidCall(
            f"{name} replaces NeMo-RL's loss, so {', '.join(ignored)} of loss_fn would have no "
            "effect: put it into the spec "
            "(rw.weights.TruncatedImportance, MaskedImportance, ... are the corrections)."
        )
    if options.token_level_loss != (agg_mode(spec.reduction) == "token-mean"):
        raise InvalidCall(
            f"{name} reduces by {agg_mode(spec.reduction)}: set "
            f"loss_fn.token_level_loss={not options.token_level_loss}."
        )
    return dataclasses.replace(spec, penalties=(*spec.penalties, *_kl(options)))


class PolicyLoss:
    """NeMo-RL's loss by the options of ``master_config.loss_fn``, or ``spec`` (or the
    name of a method) with NeMo-RL's KL term.

    With ``logits`` it is computed from logits, which ``prepare_loss_input`` then
    passes, in one read and one write if the spec takes one pass. Entropies have
    gradients there. The loss is divided by ``global_valid_toks`` or
    ``global_valid_seqs``. Metrics have NeMo-RL's names.

    Raises:
        UnsupportedRequest: NeMo-RL, or this configuration of it, cannot train the spec;
            the reason is named.
        InvalidCall: an option of ``master_config.loss_fn`` would have no effect beside
            ``spec``.
    """

    def __init__(
        self, master_config: Any, spec: PolicyLossSpec | str | None = None, *, logits: bool = False
    ) -> None:
        options, setting = master_config.loss_fn, _Setting.of(master_config.policy)
        self.spec = spec_of(options) if spec is None else _replacing(spec, options, logits)
        setting.refuse(self.spec, logits)
        if "ref_logp" in self.spec.requires and options.reference_policy_kl_penalty == 0:
            raise UnsupportedRequest(
                "the spec reads the reference's log-probs, which NeMo-RL computes with "
                "reference_policy_kl_penalty > 0 only."
            )
        if (
            "ref_logp" in self.spec.requires
            and master_config.grpo.skip_reference_policy_logprobs_calculation
        ):
            raise UnsupportedRequest(
                "the spec reads the reference's log-probs, which "
                "skip_reference_policy_logprobs_calculation leaves out."
            )
        self.on_policy = bool(options.force_on_policy_ratio)
        self.kl_type = options.reference_policy_kl_type
        self.input_type = LossInputType.LOGIT if logits else LossInputType.LOGPROB
        self.use_fused_linear_logprobs = setting.fused  # prepare_loss_input reads it
        self.by_token = agg_mode(self.spec.reduction) == "token-mean"
        self.loss_type = LossType.TOKEN_LEVEL if self.by_token else LossType.SEQUENCE_LEVEL
        own = MetricNormalizer.TOKENS if self.by_token else MetricNormalizer.SEQUENCES
        raw = dict.fromkeys(
            ("num_valid_samples", "probs_ratio_min", "probs_ratio_max"), MetricNormalizer.NONE
        )
        self.metric_normalizations = {
            "loss": own,
            "kl_penalty": own,
            **dict.fromkeys(_TOKEN_METRICS, MetricNormalizer.TOKENS),
            **raw,
        }

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Any,
        global_valid_toks: Any,
        *,
        logits: Tensor | None = None,
        next_token_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return ``(loss, metrics)`` of ``[B, S, V]`` logits, or of ``[B, S - 1]``
        log-probs. An ignored token may have any value.
        """
        after = {
            n: predicted(data[n])
            for n in ("input_ids", "advantages", "generation_logprobs", "token_mask")
        }
        mask = after["token_mask"] * data["sample_mask"].unsqueeze(-1)
        reads = self.spec.requires
        advantages = after["advantages"]
        if isinstance(self.spec.ratio, GeometricMeanRatio):
            advantages = per_sequence(advantages, mask)
        previous = None if self.on_policy else predicted(data["prev_logprobs"])
        named = {
            "completion_mask": mask,
            "old_per_token_logps": previous,
            "sampling_per_token_logps": after["generation_logprobs"]
            if "sampling_logp" in reads
            else None,
            "ref_per_token_logps": predicted(data["reference_policy_logprobs"])
            if "ref_logp" in reads
            else None,
            "unused": "ignore",  # NeMo-RL passes what it has
            **divisors(self.spec.reduction, 1, global_valid_toks, global_valid_seqs),
        }
        if logits is not None:
            if has_dtensors([logits]):
                raise UnsupportedRequest(
                    "the logits are a DTensor: a call's rows are whole; PolicyLoss(..., "
                    "logits=False)."
                )
            ids = after["input_ids"]
            whole = logits[:, : ids.size(1) + 1]  # packed sequences are padded
            out = policy_loss(whole, ids, advantages, spec=self.spec, drop_last=True, **named)
        else:
            assert next_token_logprobs is not None, (
                "prepare_loss_input hands over logits or next_token_logprobs"
            )
            out = policy_loss_from_logps(next_token_logprobs, advantages, spec=self.spec, **named)
        return out.loss, self._metrics(out, data, mask, previous, global_valid_toks, named)

    @torch.no_grad()
    def _metrics(
        self,
        out: PolicyLossOutput,
        data: Any,
        mask: Tensor,
        previous: Tensor | None,
        tokens: Any,
        named: dict[str, Any],
    ) -> dict[str, float]:
        """Return NeMo-RL's metrics, to be summed over micro-batches except the extrema.
        It takes one transfer to the host.
        """
        keep, logps = mask != 0, out.per_token_logps
        count = mask.sum() if tokens is None else tokens
        before = logps if previous is None else previous
        sampled = predicted(data["generation_logprobs"])
        before, sampled = (torch.where(keep, x, 0) for x in (before, sampled))
        mixture = torch.logaddexp(before, sampled) - math.log(2)
        values = {
            "probs_ratio": out.ratio,
            "probs_clipped": out.is_clipped.to(logps.dtype),
            "token_mult_prob_error": (sampled - before).abs().exp(),
            "gen_kl_error": _distance(self.kl_type, before - sampled),
            "policy_kl_error": _distance(self.kl_type, sampled - before),
            "js_divergence_error": 0.5
            * (_distance("k3", before - mixture) + _distance("k3", sampled - mixture)),
            "sampling_importance_ratio": (before - sampled).exp(),
            "approx_entropy": -(logps - sampled).exp() * logps,
        }
        found = {name: torch.where(keep, x, 0).sum() / (count + 1e-8) for name, x in values.items()}
        found["probs_ratio_min"] = torch.where(keep, out.ratio, math.inf).amin()
        found["probs_ratio_max"] = torch.where(keep, out.ratio, -math.inf).amax()
        found["num_valid_samples"] = data["sample_mask"].sum()
        found["loss"] = out.loss
        found["kl_penalty"] = self._penalty(out, keep, before, named)
        numbers: list[float] = torch.stack([x.detach().float() for x in found.values()]).tolist()
        return dict(zip(found, numbers, strict=True))

    def _penalty(
        self, out: PolicyLossOutput, keep: Tensor, before: Tensor, named: dict[str, Any]
    ) -> Tensor:
        """Return NeMo-RL's KL, reduced as the loss is. It is 0 without one."""
        own: list[Rule] = [p.rule for p in self.spec.penalties if isinstance(p.rule, K1OnPolicy)]
        total = out.loss.new_zeros(())
        for rule in own:
            leaves = {
                "logp": out.per_token_logps,
                "ref_logp": torch.where(keep, named["ref_per_token_logps"], 0),
                "old_logp": before,
            }
            value = torch.where(
                keep, rule.loss(TorchNamespace(out.per_token_logps.dtype), Leaves(leaves)), 0
            )
            if self.by_token:
                total = total + value.sum() / named.get(
                    "num_items_in_batch", keep.sum().clamp(min=1)
                )
            else:
                total = total + per_sequence(value, keep).sum() / named.get(
                    "num_sequences_in_batch", keep.size(0)
                )
        return total


#: Metrics that are sums over tokens, divided by the global count of them.
_TOKEN_METRICS = (
    "probs_ratio",
    "probs_clipped",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "approx_entropy",
)


def _distance(kind: str, log_ratio: Tensor) -> Tensor:
    """Return NeMo-RL's ``calculate_kl`` without bounds, for
    ``logprobs_reference - logprobs``.
    """
    return {"k1": -log_ratio, "k2": log_ratio.square() / 2}.get(
        kind, torch.expm1(log_ratio) - log_ratio
    )
