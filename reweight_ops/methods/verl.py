"""verl's policy losses by its own option names and defaults; works without verl."""

from __future__ import annotations

import math
from typing import Any

from .._core.formula.base import Rule
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import Ratio, SequenceRatio, TokenRatio
from .._core.spec.reduction import Reduction, SequenceMean, TokenMean, TokenSum
from ..errors import InvalidCall
from ..rules.off_policy import DppoKL, Dro, KlCov
from ..rules.penalties import K1, K2, K3, Absolute, AbsoluteStraightThrough, K1StraightThrough, K3StraightThrough
from ..rules.surrogates import Cispo, Clip, DppoTV, DualClip, Reinforce, Sapo
from ..weights.covariance import TopCovariance
from .penalties import entropy, kl
from .unused import forbid_unused

LOSS_MODES = ("vanilla", "gspo", "sapo", "gpg", "cispo", "dppo_tv", "dppo_kl", "dro", "kl_cov")
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
#: Options that only some modes read; verl ignores them elsewhere.
_CLIPPED = ("vanilla", "gspo", "cispo", "dppo_tv", "dppo_kl")
_READ_BY: dict[str, tuple[str, ...]] = {
    "clip_ratio": _CLIPPED, "clip_ratio_low": _CLIPPED, "clip_ratio_high": _CLIPPED, "clip_ratio_c": ("vanilla", "dppo_tv", "dppo_kl"),
    "tau_pos": ("sapo",), "tau_neg": ("sapo",), "dro_beta": ("dro",),
    "kl_cov_ratio": ("kl_cov",), "ppo_kl_coef": ("kl_cov",),
}  # fmt: skip
KL_TYPES: dict[str, Rule] = {
    "kl": K1(), "k1": K1(), "abs": Absolute(), "mse": K2(clamp=math.inf), "k2": K2(clamp=math.inf), "low_var_kl": K3(cap=10.0), "k3": K3(cap=10.0),
    "kl+": K1StraightThrough(), "k1+": K1StraightThrough(), "abs+": AbsoluteStraightThrough(), "mse+": K2(clamp=math.inf), "k2+": K2(clamp=math.inf),
    "low_var_kl+": K3StraightThrough(cap=10.0), "k3+": K3StraightThrough(cap=10.0),
}  # fmt: skip


def _reduction(mode: str, loss_scale_factor: float | None) -> Reduction:
    reductions: dict[str, Reduction] = {
        "token-mean": TokenMean(),
        "token-sum": TokenSum(),
        "seq-mean-token-sum": SequenceMean(per="token_sum", count="nonempty"),
        "seq-mean-token-sum-norm": SequenceMean(per="constant", horizon=loss_scale_factor, count="nonempty"),
        "seq-mean-token-mean": SequenceMean(per="token_mean", count="nonempty"),
    }
    if mode not in reductions:
        raise InvalidCall(f"methods.verl: loss_agg_mode is {mode!r}, expected one of {', '.join(LOSS_AGG_MODES)}.")
    if loss_scale_factor is not None and mode != "seq-mean-token-sum-norm":
        raise InvalidCall(f"methods.verl: loss_scale_factor has no effect with loss_agg_mode={mode!r}.")
    return reductions[mode]


def verl(
    loss_mode: str = "vanilla",
    *,
    loss_agg_mode: str = "token-mean",
    clip_ratio: Any = 0.2,
    clip_ratio_low: Any = None,
    clip_ratio_high: Any = None,
    clip_ratio_c: Any = 3.0,
    tau_pos: Any = 1.0,
    tau_neg: Any = 1.05,
    dro_beta: Any = None,
    kl_cov_ratio: Any = 0.0002,
    ppo_kl_coef: Any = 0.1,
    loss_scale_factor: float | None = None,
    use_kl_loss: bool = False,
    kl_loss_coef: Any = 0.001,
    kl_loss_type: str = "low_var_kl",
    entropy_coeff: Any = 0.0,
    unused: str = "error",
) -> PolicyLossSpec:
    """A loss of verl's registry (0.9.1, ``core_algos.py``) with the KL and entropy terms that ``ppo_loss`` adds around it.

    ``batch_num_tokens / dp_size`` is ``num_items_in_batch`` here, ``global_batch_size / dp_size`` is ``num_sequences_in_batch``.
    As in verl, ``sapo`` averages its own term per sequence whatever ``loss_agg_mode`` is; KL and entropy follow ``loss_agg_mode``.

    An option that the mode does not read is an error where it differs from its default; ``unused="ignore"`` takes a whole configuration.
    """
    if unused not in ("error", "ignore"):
        raise InvalidCall(f"methods.verl: unused is {unused!r}, expected 'error' or 'ignore'.")
    given = locals()
    if loss_mode not in LOSS_MODES:
        raise InvalidCall(f"methods.verl: loss_mode is {loss_mode!r}, expected one of {', '.join(LOSS_MODES)}.")
    if use_kl_loss and kl_loss_type not in KL_TYPES:
        raise InvalidCall(f"methods.verl: kl_loss_type is {kl_loss_type!r}, expected one of {', '.join(KL_TYPES)}.")
    if unused == "error":
        reads = {name: loss_mode in modes for name, modes in _READ_BY.items()}
        forbid_unused(
            "methods.verl", verl, given, f"loss_mode={loss_mode!r}", reads | {"kl_loss_coef": use_kl_loss, "kl_loss_type": use_kl_loss}
        )
    if loss_mode == "dro" and dro_beta is None:
        raise InvalidCall("methods.verl: loss_mode='dro' needs dro_beta.")
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    surrogates: dict[str, Rule] = {
        "vanilla": DualClip(epsilon_low=low, epsilon_high=high, clip_ratio_c=clip_ratio_c),
        "gspo": Clip(epsilon_low=low, epsilon_high=high),
        "sapo": Sapo(temperature_pos=tau_pos, temperature_neg=tau_neg),
        "gpg": Reinforce(),
        "cispo": Cispo(ratio_min=1 - low, ratio_max=1 + high),
        "dppo_tv": DppoTV(divergence_low=low, divergence_high=high, ratio_max=clip_ratio_c),
        "dppo_kl": DppoKL(divergence_low=low, divergence_high=high, ratio_max=clip_ratio_c),
        "dro": Dro(beta=dro_beta),
        "kl_cov": KlCov(penalty=TopCovariance(fraction=kl_cov_ratio, coef=ppo_kl_coef)),  # type: ignore[arg-type]
    }
    ratios: dict[str, Ratio] = {
        "gspo": SequenceRatio(clamp=(-math.inf, 10.0), gradient="token"),
        "dro": TokenRatio(clamp=math.inf),
        "kl_cov": TokenRatio(clamp=math.inf),
    }
    own = _reduction(loss_agg_mode, loss_scale_factor)
    around = own if loss_mode == "sapo" else None
    return PolicyLossSpec(
        surrogate=surrogates[loss_mode],
        penalties=(*(kl(kl_loss_coef, KL_TYPES[kl_loss_type], around) if use_kl_loss else ()), *entropy(entropy_coeff, around)),
        ratio=ratios.get(loss_mode, TokenRatio()),
        reduction=SequenceMean(per="token_mean", count="nonempty") if loss_mode == "sapo" else own,
        name=f"verl_{loss_mode}",
    )
