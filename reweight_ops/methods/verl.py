"""verl's policy losses by verl's option names and defaults. They work without verl."""

from __future__ import annotations

import math
from typing import Annotated, Any

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import TRAINERS_NAMES
from .._core.formula.base import Rule, TokenWeight
from .._core.ranges import (
    AtLeastOne,
    Interval,
    NonNegative,
    NonNegativeOrInf,
    Number,
    Positive,
    Real,
    Unit,
    ranged,
)
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import GeometricMeanRatio, Ratio, SequenceRatio, TokenRatio
from .._core.spec.reduction import Reduction, SequenceMean, TokenMean, TokenSum
from ..errors import InvalidCall
from ..rules.penalties import (
    K1,
    K2,
    K3,
    Absolute,
    AbsoluteStraightThrough,
    K1StraightThrough,
    K3StraightThrough,
)
from ..rules.surrogates import Cispo, Clip, DppoTV, DualClip, Reinforce, Sapo, Unclipped
from ..weights.covariance import ClipCov, TopCovariance
from ..weights.importance import (
    MaskedImportance,
    SequenceMaskedImportance,
    SequenceTruncatedImportance,
    TruncatedImportance,
)
from .covariance import KlCov
from .dppo_kl import DppoKL
from .dro import Dro
from .penalties import entropy, is_zero, kl

LOSS_MODES = (
    "vanilla",
    "gspo",
    "sapo",
    "gpg",
    "cispo",
    "dppo_tv",
    "dppo_kl",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "bypass_mode",
)
TRAINERS_NAMES["policy_loss"] |= {
    "verl": "rw.methods.verl(...)",
    "vanilla": "rw.methods.verl()",
    **{
        name: f"rw.methods.verl(loss_mode={name!r})"
        for name in LOSS_MODES
        if name != "vanilla" and name not in TRAINERS_NAMES["policy_loss"]
    },
}
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
#: Options that only some modes read. verl ignores them in other modes.
_CLIPPED = ("vanilla", "gspo", "cispo", "dppo_tv", "dppo_kl", "clip_cov", "geo_mean", "bypass_mode")
_READ_BY: dict[str, tuple[str, ...]] = {
    "clip_ratio": _CLIPPED,
    "clip_ratio_low": _CLIPPED,
    "clip_ratio_high": _CLIPPED,
    "clip_ratio_c": ("vanilla", "dppo_tv", "dppo_kl", "bypass_mode"),
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
    "clip_cov_ratio": ("clip_cov",),
    "clip_cov_lb": ("clip_cov",),
    "clip_cov_ub": ("clip_cov",),
    "kl_cov_ratio": ("kl_cov",),
    "ppo_kl_coef": ("kl_cov",),
    "dro_beta": ("dro",),
    "rollout_loss_type": ("bypass_mode",),
    "rollout_is": ("bypass_mode",),
    "rollout_is_threshold": ("bypass_mode",),
}
#: Modes that always average their own term in the same way.
_ALONE: dict[str, Reduction] = {
    "sapo": SequenceMean(per="token_mean", count="nonempty"),
    "geo_mean": SequenceMean(),
}
KL_TYPES: dict[str, Rule] = {
    "kl": K1(),
    "k1": K1(),
    "abs": Absolute(),
    "mse": K2(clamp=math.inf),
    "k2": K2(clamp=math.inf),
    "low_var_kl": K3(cap=10.0),
    "k3": K3(cap=10.0),
    "kl+": K1StraightThrough(),
    "k1+": K1StraightThrough(),
    "abs+": AbsoluteStraightThrough(),
    "mse+": K2(clamp=math.inf),
    "k2+": K2(clamp=math.inf),
    "low_var_kl+": K3StraightThrough(cap=10.0),
    "k3+": K3StraightThrough(cap=10.0),
}


def _reduction(mode: str, loss_scale_factor: float | None) -> Reduction:
    reductions: dict[str, Reduction] = {
        "token-mean": TokenMean(),
        "token-sum": TokenSum(),
        "seq-mean-token-sum": SequenceMean(per="token_sum", count="nonempty"),
        "seq-mean-token-sum-norm": SequenceMean(
            per="constant", horizon=loss_scale_factor, count="nonempty"
        ),
        "seq-mean-token-mean": SequenceMean(per="token_mean", count="nonempty"),
    }
    if mode not in reductions:
        raise InvalidCall(
            f"methods.verl: loss_agg_mode is {mode!r}, expected one of {', '.join(LOSS_AGG_MODES)}."
        )
    if loss_scale_factor is not None and mode != "seq-mean-token-sum-norm":
        raise InvalidCall(
            f"methods.verl: loss_scale_factor has no effect with loss_agg_mode={mode!r}."
        )
    return reductions[mode]


def _bypass(
    clip: Rule, loss_type: str, level: str | None, threshold: Number
) -> tuple[Rule, tuple[TokenWeight, ...]]:
    """Return the surrogate and weights of ``bypass_mode``."""
    if loss_type not in ("ppo_clip", "reinforce"):
        raise InvalidCall(
            f"methods.verl: rollout_loss_type is {loss_type!r}, expected 'ppo_clip' or 'reinforce'."
        )
    if level not in (None, "token", "sequence"):
        raise InvalidCall(
            f"methods.verl: rollout_is is {level!r}, expected None, 'token' or 'sequence'."
        )
    if loss_type == "ppo_clip" or level is None:
        if level is not None:
            raise InvalidCall(
                "methods.verl: rollout_is has no effect with rollout_loss_type='ppo_clip': "
                "leave it out."
            )
        return (clip if loss_type == "ppo_clip" else Reinforce()), ()
    lower, upper = threshold if isinstance(threshold, tuple) else (None, threshold)
    if lower is None:
        truncated = TruncatedImportance if level == "token" else SequenceTruncatedImportance
        return Reinforce(), (truncated(ratio_max=upper),)
    masked = MaskedImportance if level == "token" else SequenceMaskedImportance
    return Reinforce(), (masked(ratio_min=lower, ratio_max=upper),)


@ranged
def verl(
    loss_mode: str = "vanilla",
    *,
    loss_agg_mode: str = "token-mean",
    clip_ratio: NonNegativeOrInf[Number] = 0.2,
    clip_ratio_low: NonNegativeOrInf[Number] | None = None,
    clip_ratio_high: NonNegativeOrInf[Number] | None = None,
    clip_ratio_c: AtLeastOne[Number] = 3.0,
    tau_pos: Positive[Number] = 1.0,
    tau_neg: Positive[Number] = 1.05,
    clip_cov_ratio: Unit[Number] = 2e-4,
    clip_cov_lb: Real[Number] = 1.0,
    clip_cov_ub: Real[Number] = 5.0,
    kl_cov_ratio: Unit[Number] = 2e-4,
    ppo_kl_coef: NonNegative[Number] = 0.1,
    dro_beta: NonNegative[Number] | None = None,
    rollout_loss_type: str = "ppo_clip",
    rollout_is: str | None = None,
    rollout_is_threshold: Annotated[Number, Interval("(0, inf]", entries="[0, inf]")] = 2.0,
    loss_scale_factor: Positive[float] | None = None,
    use_kl_loss: bool = False,
    kl_loss_coef: NonNegative[Number] = 0.001,
    kl_loss_type: str = "low_var_kl",
    entropy_coeff: Real[Number] = 0.0,
    unused: str = "error",
) -> PolicyLossSpec:
    """A loss of verl's registry (0.9.1, ``core_algos.py``) with the KL and entropy
    terms that ``ppo_loss`` adds around it.

    ``batch_num_tokens / dp_size`` is ``num_items_in_batch`` here,
    ``global_batch_size / dp_size`` is ``num_sequences_in_batch``. As in verl, ``sapo``
    averages its own term per sequence whatever ``loss_agg_mode`` is, and ``geo_mean``
    over all sequences of the call, for which ``num_sequences_in_batch`` must not be
    given; KL and entropy follow ``loss_agg_mode``. ``rollout_is_weights`` is
    ``importance_sampling_ratio`` here (of ``geo_mean``, whose advantages are one a
    sequence: its geometric mean over each). ``clip_cov`` draws its tokens by position,
    not at random.

    ``bypass_mode``: ``rollout_loss_type`` and the next two are the fields of verl's
    ``rollout_correction`` (its ``loss_type`` is the first); ``rollout_is_threshold`` is
    an upper bound, or ``(lower, upper)`` outside of which the weight is 0. With
    ``"reinforce"`` pass the sampler's log-probs as ``sampling_per_token_logps`` and no
    ``old_per_token_logps``; with ``"ppo_clip"`` as the latter. Rejection sampling is
    ``completion_mask``.

    An option that the mode does not read is an error where it differs from its default;
    ``unused="ignore"`` takes a whole configuration.
    """
    if unused not in ("error", "ignore"):
        raise InvalidCall(f"methods.verl: unused is {unused!r}, expected 'error' or 'ignore'.")
    given = {
        "clip_ratio": clip_ratio,
        "clip_ratio_low": clip_ratio_low,
        "clip_ratio_high": clip_ratio_high,
        "clip_ratio_c": clip_ratio_c,
        "tau_pos": tau_pos,
        "tau_neg": tau_neg,
        "clip_cov_ratio": clip_cov_ratio,
        "clip_cov_lb": clip_cov_lb,
        "clip_cov_ub": clip_cov_ub,
        "kl_cov_ratio": kl_cov_ratio,
        "ppo_kl_coef": ppo_kl_coef,
        "dro_beta": dro_beta,
        "rollout_loss_type": rollout_loss_type,
        "rollout_is": rollout_is,
        "rollout_is_threshold": rollout_is_threshold,
        "kl_loss_coef": kl_loss_coef,
        "kl_loss_type": kl_loss_type,
        "loss_agg_mode": loss_agg_mode,
    }
    if loss_mode not in LOSS_MODES:
        raise InvalidCall(
            f"methods.verl: loss_mode is {loss_mode!r}, expected one of {', '.join(LOSS_MODES)}."
        )
    if use_kl_loss and kl_loss_type not in KL_TYPES:
        raise InvalidCall(
            f"methods.verl: kl_loss_type is {kl_loss_type!r}, expected one of "
            f"{', '.join(KL_TYPES)}."
        )
    if unused == "error":
        reads = {name: loss_mode in modes for name, modes in _READ_BY.items()}
        around = use_kl_loss or not is_zero(entropy_coeff)
        reads |= {
            "kl_loss_coef": use_kl_loss,
            "kl_loss_type": use_kl_loss,
            "loss_agg_mode": loss_mode not in _ALONE or around,
        }
        forbid_unused("methods.verl", verl, given, f"loss_mode={loss_mode!r}", reads)
        forbid_unused(
            "methods.verl",
            verl,
            given,
            "rollout_is=None",
            {"rollout_is_threshold": rollout_is is not None},
        )
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    if loss_mode == "dro" and dro_beta is None:
        raise InvalidCall("methods.verl: loss_mode='dro' has no default for dro_beta: pass it.")
    bounds: dict[str, Any] = {"epsilon_low": low, "epsilon_high": high}
    region = {"divergence_low": low, "divergence_high": high, "ratio_max": clip_ratio_c}
    dual = DualClip(**bounds, clip_ratio_c=clip_ratio_c)
    bypassed, corrections = _bypass(dual, rollout_loss_type, rollout_is, rollout_is_threshold)
    surrogates: dict[str, Rule] = {
        "vanilla": dual,
        "gspo": Clip(**bounds),
        "sapo": Sapo(temperature_pos=tau_pos, temperature_neg=tau_neg),
        "gpg": Reinforce(),
        "cispo": Cispo(ratio_min=1 - low, ratio_max=1 + high),
        "dppo_tv": DppoTV(**region),
        "dppo_kl": DppoKL(**region),
        "clip_cov": Clip(**bounds),
        "kl_cov": KlCov(kl_coef=TopCovariance(fraction=kl_cov_ratio, value=ppo_kl_coef)),
        "geo_mean": Unclipped(),
        "bypass_mode": bypassed,
    }
    if loss_mode == "dro" and dro_beta is not None:
        surrogates["dro"] = Dro(beta=dro_beta)
    weights: dict[str, tuple[TokenWeight, ...]] = {
        "clip_cov": (
            ClipCov(fraction=clip_cov_ratio, lower=clip_cov_lb, upper=clip_cov_ub, **bounds),
        ),
        "bypass_mode": corrections,
    }
    bare = TokenRatio(clamp=math.inf)
    ratios: dict[str, Ratio] = {
        "gspo": SequenceRatio(clamp=(-math.inf, 10.0), gradient="token"),
        "geo_mean": GeometricMeanRatio(clamp=math.inf, token_advantages=True, **bounds),
        "clip_cov": bare,
        "kl_cov": bare,
        "dro": bare,
    }
    own = _reduction(loss_agg_mode, loss_scale_factor)
    outside = own if loss_mode in _ALONE else None
    return PolicyLossSpec(
        surrogate=surrogates[loss_mode],
        penalties=(
            *(kl(kl_loss_coef, KL_TYPES[kl_loss_type], outside) if use_kl_loss else ()),
            *entropy(entropy_coeff, outside),
        ),
        ratio=ratios.get(loss_mode, TokenRatio()),
        weights=weights.get(loss_mode, ()),
        reduction=_ALONE.get(loss_mode, own),
        name=f"verl_{loss_mode}",
    )
