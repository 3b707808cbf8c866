"""TRL's GRPO losses by the names and defaults of GRPOConfig. They work without TRL."""

from __future__ import annotations

import math

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import TRAINERS_NAMES
from .._core.formula.base import Rule, TokenWeight
from .._core.ranges import (
    Count,
    NonNegative,
    NonNegativeOrInf,
    Number,
    Positive,
    PositiveOrInf,
    Real,
    Unit,
    ranged,
)
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import SequenceRatio, TokenRatio
from .._core.spec.reduction import Reduction, SequenceMean, TokenMean
from ..errors import InvalidCall
from ..rules.penalties import K3, K3Corrected
from ..rules.surrogates import Cispo, Clip, Reinforce, Sapo
from ..weights.entropy import TopEntropy
from ..weights.importance import (
    MaskedImportance,
    OffPolicySequenceMask,
    SequenceGamma,
    SequenceMaskedImportance,
    SequenceTruncatedImportance,
    TruncatedImportance,
)
from .penalties import entropy, is_zero, kl

#: Options that only some loss types read, with their defaults. TRL ignores them for
#: other types.
_CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")
_READ_BY: dict[str, tuple[str, ...]] = {
    "epsilon": (*_CLIPPED, "cispo"),
    "epsilon_high": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    "max_completion_length": ("dr_grpo",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
}
_IMPORTANCE = {
    "token_truncate": TruncatedImportance,
    "token_mask": MaskedImportance,
    "sequence_truncate": SequenceTruncatedImportance,
    "sequence_mask": SequenceMaskedImportance,
}
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
TRAINERS_NAMES["policy_loss"] |= {name: f"rw.methods.trl({name!r})" for name in LOSS_TYPES}
TRAINERS_NAMES["policy_loss"]["trl"] = "rw.methods.trl(...)"


@ranged
def trl(
    loss_type: str = "dapo",
    *,
    epsilon: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] | None = None,
    delta: PositiveOrInf[Number] | None = None,
    beta: NonNegative[Number] = 0.0,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    max_completion_length: Count[int] | None = None,
    top_entropy_quantile: Unit[Number] = 1.0,
    entropy_coef: Real[Number] = 0.0,
    sapo_temperature_pos: Positive[Number] = 1.0,
    sapo_temperature_neg: Positive[Number] = 1.05,
    vespo_k_pos: NonNegative[Number] = 2.0,
    vespo_lambda_pos: NonNegative[Number] = 3.0,
    vespo_k_neg: NonNegative[Number] = 3.0,
    vespo_lambda_neg: NonNegative[Number] = 2.0,
    off_policy_mask_threshold: Real[Number] | None = None,
    vllm_importance_sampling_mode: str | None = None,
    vllm_importance_sampling_clip_min: NonNegative[Number] | None = None,
    vllm_importance_sampling_clip_max: PositiveOrInf[Number] | None = 3.0,
    unused: str = "error",
) -> PolicyLossSpec:
    """The loss of TRL's ``GRPOTrainer._compute_loss`` (1.15 and later), exactly: bare
    ``exp``, k3 without a clamp.

    ``dapo``, ``cispo`` and ``vespo`` divide by ``num_items_in_batch``, a call argument
    here: pass TRL's final normalizer (see
    :mod:`reweight_ops.integrations.trl`). ``off_policy_mask_threshold`` is against
    ``old_per_token_logps``, as in TRL without vLLM; against the sampler's log-probs it
    is ``weights.SamplerSequenceMask``.

    ``vllm_importance_sampling_mode`` is TRL's correction for
    ``sampling_per_token_logps``. None, the default here, means no correction, or one
    that the call has as ``importance_sampling_ratio``. ``vespo`` puts it into its
    sequence ratio, where a ratio of the call has no effect, so pass the mode there. The
    KL's bias correction always uses the ratio to the old policy.

    An option that the loss type does not read is an error if it differs from its
    default. ``unused="ignore"`` accepts a whole configuration.
    """
    if unused not in ("error", "ignore"):
        raise InvalidCall(f"methods.trl: unused is {unused!r}, expected 'error' or 'ignore'.")
    given = {
        "epsilon": epsilon,
        "epsilon_high": epsilon_high,
        "delta": delta,
        "max_completion_length": max_completion_length,
        "sapo_temperature_pos": sapo_temperature_pos,
        "sapo_temperature_neg": sapo_temperature_neg,
        "vespo_k_pos": vespo_k_pos,
        "vespo_lambda_pos": vespo_lambda_pos,
        "vespo_k_neg": vespo_k_neg,
        "vespo_lambda_neg": vespo_lambda_neg,
        "use_bias_correction_kl": use_bias_correction_kl,
        "vllm_importance_sampling_clip_min": vllm_importance_sampling_clip_min,
        "vllm_importance_sampling_clip_max": vllm_importance_sampling_clip_max,
    }
    if loss_type not in LOSS_TYPES:
        raise InvalidCall(
            f"methods.trl: loss_type is {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}."
        )
    levels = {"token": TokenRatio(clamp=math.inf), "sequence": SequenceRatio(clamp=math.inf)}
    if importance_sampling_level not in levels:
        raise InvalidCall(
            f"methods.trl: importance_sampling_level is {importance_sampling_level!r}, expected "
            "'token' or 'sequence'."
        )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise InvalidCall(
            "methods.trl: loss_type='dr_grpo' divides by max_completion_length: pass it."
        )
    high = epsilon if epsilon_high is None else epsilon_high
    surrogate: Rule = Clip(
        epsilon_low=epsilon, epsilon_high=high, delta=math.inf if delta is None else delta
    )
    if loss_type == "cispo":
        surrogate = Cispo(ratio_max=high)
    elif loss_type == "sapo":
        surrogate = Sapo(temperature_pos=sapo_temperature_pos, temperature_neg=sapo_temperature_neg)
    elif loss_type == "vespo":
        if importance_sampling_level != "token":
            raise InvalidCall(
                "methods.trl: loss_type='vespo' has its own sequence ratio; "
                "importance_sampling_level must be 'token'."
            )
        surrogate = Reinforce()
    correction = _correction(
        loss_type,
        vllm_importance_sampling_mode,
        vllm_importance_sampling_clip_min,
        vllm_importance_sampling_clip_max,
    )
    if unused == "error":
        clips = dict.fromkeys(
            ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
            correction is not None,
        )
        forbid_unused("methods.trl", trl, given, "vllm_importance_sampling_mode=None", clips)
        forbid_unused(
            "methods.trl", trl, given, "beta=0", {"use_bias_correction_kl": not is_zero(beta)}
        )
        forbid_unused(
            "methods.trl",
            trl,
            given,
            f"loss_type={loss_type!r}",
            {name: loss_type in types for name, types in _READ_BY.items()},
        )
    reductions: dict[str, Reduction] = {
        "grpo": SequenceMean(),
        "sapo": SequenceMean(),
        "luspo": SequenceMean(per="token_sum"),
        "dr_grpo": SequenceMean(per="constant", horizon=max_completion_length),
        "bnpo": TokenMean(per_call=True),
        "dapo": TokenMean(),
        "cispo": TokenMean(),
        "vespo": TokenMean(),
    }
    masked = isinstance(top_entropy_quantile, (int, float)) and top_entropy_quantile >= 1
    top = None if masked else TopEntropy(fraction=top_entropy_quantile)
    estimator = K3Corrected(clamp=math.inf) if use_bias_correction_kl else K3(clamp=math.inf)
    # The bonus is a mean over this call's tokens, whatever the divisor of the loss type
    # is. Under a top-entropy mask it is over the masked tokens.
    bonus = entropy(entropy_coef, TokenMean(per_call=True, weight=top))
    weights: tuple[TokenWeight, ...] = () if top is None else (top,)
    if loss_type == "vespo":
        numbers = {
            "k_pos": vespo_k_pos,
            "lambda_pos": vespo_lambda_pos,
            "k_neg": vespo_k_neg,
            "lambda_neg": vespo_lambda_neg,
        }
        weights = (
            *weights,
            SequenceGamma(**numbers, correction=1.0 if correction is None else correction),  # type: ignore[arg-type]
        )
    elif correction is not None:
        weights = (*weights, correction)
    if off_policy_mask_threshold is not None:
        weights = (*weights, OffPolicySequenceMask(threshold=off_policy_mask_threshold))
    return PolicyLossSpec(
        surrogate=surrogate,
        penalties=(*kl(beta, estimator), *bonus),
        ratio=levels[importance_sampling_level],
        weights=weights,
        reduction=reductions[loss_type],
        name=f"trl_{loss_type}",
    )


def _correction(
    loss_type: str, mode: str | None, clip_min: Number | None, clip_max: Number | None
) -> TokenWeight | None:
    """Return TRL's correction of the sampler's mismatch."""
    if mode is None:
        return None
    if mode not in _IMPORTANCE:
        raise InvalidCall(
            f"methods.trl: vllm_importance_sampling_mode is {mode!r}, expected None or one of "
            f"{', '.join(_IMPORTANCE)}."
        )
    if loss_type == "vespo" and not mode.startswith("token_"):
        raise InvalidCall(
            "methods.trl: loss_type='vespo' needs a token mode of "
            "vllm_importance_sampling_mode, as in TRL."
        )
    if mode.endswith("_truncate") and clip_min is None and clip_max is None:
        raise InvalidCall(
            f"methods.trl: vllm_importance_sampling_mode={mode!r} needs "
            "vllm_importance_sampling_clip_min or _max."
        )
    return _IMPORTANCE[mode](
        ratio_min=0.0 if clip_min is None else clip_min,
        ratio_max=math.inf if clip_max is None else clip_max,
    )
