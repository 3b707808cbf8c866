"""Methods that weight tokens by their probability or entropy."""

from __future__ import annotations

import math
from typing import Annotated, Any

from torch import Tensor

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
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
)
from .._core.spec.policy import PolicyLossSpec
from ..errors import InvalidCall
from ..rules.surrogates import Clip, DualClip
from ..weights.entropy import Entropy, HapoLower, HapoRedistribution, HapoUpper, TopEntropy
from ..weights.probability import (
    AdvantageReweighting,
    BalancedSigmoidReweighting,
    CurrentAdvantageReweighting,
    NegativeSigmoidReweighting,
    PositiveAdvantageReweighting,
    ProbabilityBand,
    ProbabilityInterval,
    ProbabilityQuantile,
    RewardRanked,
    SigmoidReweighting,
    SignWeight,
)
from .penalties import entropy, is_zero, kl

_SIGMOIDS = ("sigmoid", "negative_sigmoid", "balanced_sigmoid")
#: Options of AR that only some modes read. ``negative_weight`` is read as the authors'
#: code reads its ``neg_adv_weight``.
_READ_BY = {
    "alpha": ("linear", "positive_linear", "raft_linear"),
    "steepness": _SIGMOIDS,
    "midpoint": _SIGMOIDS,
    "interval": ("interval",),
    "negative_weight": ("linear", "positive_linear", "sigmoid", "balanced_sigmoid"),
}


def _clip(epsilon_low: Number, epsilon_high: Number, clip_ratio_c: Number | None) -> Rule:
    """Return PPO's clip, or dual clip if there is a third bound."""
    if clip_ratio_c is None:
        return Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return DualClip(epsilon_low=epsilon_low, epsilon_high=epsilon_high, clip_ratio_c=clip_ratio_c)


@published("Advantage Reweighting (AR)", arxiv="2505.12929")
def advantage_reweighting(
    alpha: Unit[Number] = 0.3,
    probabilities: str = "old",
    mode: str = "linear",
    steepness: Positive[Number] = 5.0,
    midpoint: Unit[Number] = 0.4,
    interval: Annotated[tuple[Number, Number], Interval(entries="[0, inf]")] = (0.0, 0.25),
    negative_weight: NonNegative[Number] = 1.0,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    clip_ratio_c: AtLeastOne[Number] | None = None,
    beta: NonNegative[Number] = 0.0,
    entropy_coef: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip (with ``clip_ratio_c`` dual clip), each token's term times ``α·p + 1 - α``
    (section 4.1), token mean.

    ``probabilities``: ``"old"`` as the authors' code, ``"current"`` (detached) as the
    paper. α is 0.2 to 0.3 there, 0.1 for mathematics. The authors' script of AR alone
    (K&K logic puzzles): ``alpha=0.2, epsilon_high=0.24, clip_ratio_c=10.0,
    beta=0.001``, ``advantages.grpo`` of 8 completions sampled at temperature 0.7,
    learning rate 1e-6. AR with Lopti, α = 0.3, is ``schedules.lopti``.

    ``mode`` is one of the authors' code's: ``"linear"``; ``"positive_linear"``, where
    A > 0 only; ``"sigmoid"``, ``2σ(steepness·(p - midpoint))``; ``"negative_sigmoid"``,
    where A <= 0 only; ``"balanced_sigmoid"``, and the negatives scaled to the
    positives' mass; ``"interval"``, 1 where p is in ``interval`` (open, closed) and 0
    elsewhere; ``"raft"``, advantages ``1[A > 0]``; ``"raft_linear"``, those times the
    linear weight. ``negative_weight`` (``neg_adv_weight``) multiplies tokens with
    ``A <= 0`` besides, in the modes in which it does so there: the linear ones,
    ``"balanced_sigmoid"`` and ``"sigmoid"`` (there ``both_sigmoid_balance1``). An
    option that the mode does not read is an error.
    """
    modes: dict[str, tuple[TokenWeight, ...]] = {
        "linear": (AdvantageReweighting(alpha=alpha),),
        "positive_linear": (PositiveAdvantageReweighting(alpha=alpha),),
        "sigmoid": (SigmoidReweighting(steepness=steepness, midpoint=midpoint),),
        "negative_sigmoid": (NegativeSigmoidReweighting(steepness=steepness, midpoint=midpoint),),
        "balanced_sigmoid": (BalancedSigmoidReweighting(steepness=steepness, midpoint=midpoint),),
        "interval": (ProbabilityInterval(lower=interval[0], upper=interval[1]),),
        "raft": (RewardRanked(),),
        "raft_linear": (RewardRanked(), AdvantageReweighting(alpha=alpha)),
    }
    if mode not in modes:
        raise InvalidCall(
            f"advantage_reweighting: mode is {mode!r}, expected one of {', '.join(modes)}."
        )
    if probabilities not in ("old", "current"):
        raise InvalidCall(
            f"advantage_reweighting: probabilities is {probabilities!r}, expected 'old' or "
            "'current'."
        )
    reads = {name: mode in read_by for name, read_by in _READ_BY.items()}
    given = {
        "alpha": alpha,
        "steepness": steepness,
        "midpoint": midpoint,
        "interval": interval,
        "negative_weight": negative_weight,
    }
    forbid_unused("advantage_reweighting", advantage_reweighting, given, f"mode={mode!r}", reads)
    weights = modes[mode]
    if probabilities == "current":
        if mode != "linear":
            raise InvalidCall(
                f"advantage_reweighting: mode={mode!r} comes from the authors' code, which has "
                "probabilities='old'."
            )
        weights = (CurrentAdvantageReweighting(alpha=alpha),)
    if isinstance(negative_weight, Tensor) or negative_weight != 1:
        weights = (*weights, SignWeight(negative=negative_weight))
    clip = _clip(epsilon_low, epsilon_high, clip_ratio_c)
    return PolicyLossSpec(
        surrogate=clip, penalties=(*kl(beta), *entropy(entropy_coef)), weights=weights
    )


@published("Low-Probability Token Isolation (Lopti)", arxiv="2505.12929")
def lopti(
    half: str = "low",
    eta: Unit[Number] = 0.5,
    split: str = "probability",
    alpha: Unit[Number] = 0.0,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    clip_ratio_c: AtLeastOne[Number] | None = None,
    beta: NonNegative[Number] = 0.0,
    entropy_coef: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """One of two updates over the same batch with fixed old log-probs: ``half="low"``
    (``p_old < η``) first, then ``"high"`` (section 4.2).

    All terms are masked, over the full denominator. Two updates are not one loss with
    two halves: step the optimizer in between.

    ``split="quantile"``: the authors' other split, by ``p_old`` below or from its
    quantile η over this call's tokens (two passes); where a batch is several calls, as
    mini-batches are, theirs is the whole batch's: find it beforehand and give it as
    ``eta`` of the first split. ``alpha``: AR on top, the paper's best combination. The
    authors' scripts (K&K logic puzzles): ``eta=0.4`` alone, or ``eta=0.5, alpha=0.3``;
    both with ``epsilon_high=0.24, clip_ratio_c=10.0, beta=0.001``, ``advantages.grpo``
    of 8 completions sampled at temperature 0.7, learning rate 1e-6.
    """
    if half not in ("low", "high"):
        raise InvalidCall(f"lopti: half is {half!r}, expected 'low' (the first update) or 'high'.")
    low = half == "low"
    splits: dict[str, TokenWeight] = {
        "probability": ProbabilityBand(upper=eta)
        if low
        else ProbabilityBand(lower=eta, upper=math.inf),
        "quantile": ProbabilityQuantile(quantile=eta, below=float(low), above=float(not low)),
    }
    if split not in splits:
        raise InvalidCall(f"lopti: split is {split!r}, expected one of {', '.join(splits)}.")
    weights = (
        (splits[split],) if is_zero(alpha) else (splits[split], AdvantageReweighting(alpha=alpha))
    )
    clip = _clip(epsilon_low, epsilon_high, clip_ratio_c)
    return PolicyLossSpec(
        surrogate=clip, penalties=(*kl(beta), *entropy(entropy_coef)), weights=weights
    )


@published(
    "Forking-token GRPO (80/20)",
    paper="Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement "
    "Learning for LLM Reasoning",
    arxiv="2506.01939",
)
def top_entropy(
    fraction: Unit[Number] = 0.2,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.28,
) -> PolicyLossSpec:
    """DAPO on the ``fraction`` of the batch's tokens with the highest entropy (eq. 6).
    The other tokens stay in the denominator, as in TRL.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, weights=(TopEntropy(fraction=fraction),))


@published(
    "Heterogeneous Adaptive Policy Optimization (HAPO)",
    arxiv="2509.16591",
)
def hapo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.28,
    clip_ratio_c: AtLeastOne[Number] = 10.0,
    alpha: Unit[Number] = 1.0,
    beta: NonNegative[Number] = 1.0,
    pivot: Unit[Number] = 0.8,
    entropies: Tensor | TokenWeight | None = None,
) -> PolicyLossSpec:
    """Dual clip with separate bounds for every token, and advantages redistributed
    between tokens of high and low entropy; token mean.

    With h in [-1, 1] from the lowest entropy over the ``pivot`` quantile to the
    highest: ``ε_low·(1 - α·h)`` where h <= 0, ``ε_high·(1 + α·h)`` where h > 0, and the
    term times ``1 + β·h`` where :class:`~reweight_ops.weights.HapoRedistribution` says.
    ``entropies``: stored ones; default current.

    Differs from the authors' code, not from the paper: the code's h is never negative,
    because of a sign error. Its scripts have ``epsilon_high=0.2``.
    Its token-level group average is ``advantages.hapo``, its sampling temperature is
    outside of a loss.
    """
    shared: dict[str, Any] = {
        "alpha": alpha,
        "pivot": pivot,
        "entropies": Entropy() if entropies is None else entropies,
    }
    clip = DualClip(
        epsilon_low=HapoLower(epsilon=epsilon_low, **shared),
        epsilon_high=HapoUpper(epsilon=epsilon_high, **shared),
        clip_ratio_c=clip_ratio_c,
    )
    redistribution = HapoRedistribution(
        beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high, **shared
    )
    return PolicyLossSpec(surrogate=clip, weights=(redistribution,))
