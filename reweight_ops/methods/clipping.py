"""Methods that differ in how the token-level ratio is clipped, and methods without a
ratio.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.ranges import (
    AtLeastOne,
    NonNegative,
    NonNegativeOrInf,
    Number,
    Positive,
    PositiveOrInf,
    Real,
)
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import SequenceMean, TokenMean
from ..rules.surrogates import Cispo, Clip, DppoTV, DualClip, Reinforce, Sapo
from .penalties import entropy, kl


@published(
    "Proximal Policy Optimization",
    paper="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
)
def ppo(
    epsilon: NonNegativeOrInf[Number] = 0.2, entropy_coef: Real[Number] = 0.0
) -> PolicyLossSpec:
    """``-min(r·A, clip(r, 1-ε, 1+ε)·A)``, token mean (eq. 7); ``entropy_coef`` is c₂ of
    eq. 9.

    Differs from the paper: there is no value loss, because it is not a function of the
    policy's logits.
    """
    return PolicyLossSpec(
        surrogate=Clip(epsilon_low=epsilon, epsilon_high=epsilon), penalties=entropy(entropy_coef)
    )


@published(
    "Dual-clip PPO",
    paper="Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    arxiv="1912.09729",
)
def dual_clip_ppo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    clip_ratio_c: AtLeastOne[Number] = 3.0,
) -> PolicyLossSpec:
    """PPO with a loss of at most ``-c·A`` for ``A < 0`` (eq. 5), token mean."""
    return PolicyLossSpec(
        surrogate=DualClip(
            epsilon_low=epsilon_low, epsilon_high=epsilon_high, clip_ratio_c=clip_ratio_c
        )
    )


@published(
    "Group Relative Policy Optimization",
    arxiv="2402.03300",
)
def grpo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    beta: NonNegative[Number] = 0.0,
    delta: PositiveOrInf[Number] = math.inf,
    entropy_coef: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip, mean over each sequence's tokens, then over sequences, plus ``beta`` times
    k3 (eq. 3 and 4).

    Differs from the paper: ``beta`` is 0 by default, as in TRL (the paper has 0.04).
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta)
    return PolicyLossSpec(
        surrogate=clip, penalties=(*kl(beta), *entropy(entropy_coef)), reduction=SequenceMean()
    )


@published("GRPO Done Right", arxiv="2503.20783")
def dr_grpo(
    horizon: Positive[float] | None = None,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip, each sequence's sum over a constant, ``horizon`` (the generation budget;
    default the padded length), mean over sequences.

    The advantages should be ``reward - mean``, not divided by the standard deviation.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(
        surrogate=clip, penalties=kl(beta), reduction=SequenceMean(per="constant", horizon=horizon)
    )


@published(
    "Decoupled Clip and Dynamic Sampling Policy Optimization",
    arxiv="2503.14476",
)
def dapo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.28,
    entropy_coef: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip-higher (0.2, 0.28) and the token mean over the batch, no KL (eq. 8). TRL's
    ``loss_type="dapo"`` clips at 0.2 on both sides.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, penalties=entropy(entropy_coef), reduction=TokenMean())


@published(
    "Clipped IS-weight Policy Optimization",
    paper="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    arxiv="2506.13585",
)
def cispo(
    ratio_max: PositiveOrInf[Number] = 5.0,
    ratio_min: Real[Number] = 0.0,
    entropy_coef: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """``-sg(clip(r, ratio_min, ratio_max))·A·logp``, token mean (eq. 4): no token loses
    its gradient.

    Differs from the paper: the paper does not publish its bounds. 5.0 is the cap of the
    ScaleRL recipe (arXiv:2510.13786) and of TRL's documentation.
    """
    return PolicyLossSpec(
        surrogate=Cispo(ratio_min=ratio_min, ratio_max=ratio_max), penalties=entropy(entropy_coef)
    )


@published(
    "Soft Adaptive Policy Optimization",
    paper="Soft Adaptive Policy Optimization",
    arxiv="2511.20347",
)
def sapo(
    temperature_pos: Positive[Number] = 1.0,
    temperature_neg: Positive[Number] = 1.05,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """A sigmoid gate of the ratio instead of a clip, per-sequence token mean (eq. 5 and
    6).
    """
    gate = Sapo(temperature_pos=temperature_pos, temperature_neg=temperature_neg)
    return PolicyLossSpec(surrogate=gate, penalties=kl(beta), reduction=SequenceMean())


@published(
    "Divergence PPO, total variation",
    arxiv="2602.04879",
    certainty="secondary",
)
def dppo_tv(
    divergence_low: NonNegativeOrInf[Number] = 0.2,
    divergence_high: NonNegativeOrInf[Number] = 0.2,
    ratio_max: PositiveOrInf[Number] = 20.0,
) -> PolicyLossSpec:
    """Drops the tokens whose probability has already moved too far in the update's
    direction, token mean.

    Differs from the paper: after verl's implementation (``dppo_tv``): the gradient of
    the log-prob times the truncated, detached ratio.
    """
    rule = DppoTV(
        divergence_low=divergence_low, divergence_high=divergence_high, ratio_max=ratio_max
    )
    return PolicyLossSpec(surrogate=rule)


@published(
    "REINFORCE",
    paper="Simple statistical gradient-following algorithms for connectionist reinforcement "
    "learning",
    arxiv="unknown",
)
def reinforce(entropy_coef: Real[Number] = 0.0) -> PolicyLossSpec:
    """``-A·logp``, token mean. With non-negative weights for A it is the
    advantage-weighted log-likelihood.
    """
    return PolicyLossSpec(surrogate=Reinforce(), penalties=entropy(entropy_coef))


@published("Group Policy Gradient", arxiv="2504.02546")
def gpg() -> PolicyLossSpec:
    """``-A·logp``, token mean over the batch.

    The paper's α rescales the advantages, and its filter drops groups. Both happen
    before this loss.
    """
    return PolicyLossSpec(surrogate=Reinforce())


@published(
    "Negative-enhanced GRPO (NGRPO)",
    arxiv="2509.18851",
)
def ngrpo(
    epsilon_neg: NonNegativeOrInf[Number] = 0.16, epsilon_pos: NonNegativeOrInf[Number] = 0.24
) -> PolicyLossSpec:
    """Clip with a tighter bound where ``A < 0`` (``1 - ε_neg``) than where ``A > 0``
    (``1 + ε_pos``), token mean, for ``advantages.ngrpo``.
    """
    return PolicyLossSpec(surrogate=Clip(epsilon_low=epsilon_neg, epsilon_high=epsilon_pos))
