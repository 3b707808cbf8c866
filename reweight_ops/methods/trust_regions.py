"""Methods whose clip or mask depends on a token's position in its sequence, on the
whole call, or on probabilities instead of ratios.
"""

from __future__ import annotations

import math
from typing import Any

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
from .._core.ranges import AtLeastOne, NonNegative, NonNegativeOrInf, Number, Positive, Real
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import CumulativeRatio, TokenRatio
from ..errors import InvalidCall
from ..rules.off_policy import DriftK2
from ..rules.surrogates import Clip, DualClip, Unclipped
from ..weights.credit import FutureInfluence
from ..weights.trust import (
    PositionBound,
    ProbabilityDistanceMask,
    ProbabilityDriftMask,
    SecondMomentLower,
    SecondMomentUpper,
)
from .penalties import is_zero


@published(
    "Two-sided GRPO clipping (INTELLECT-2)",
    paper="INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement "
    "Learning",
    arxiv="2505.07291",
    certainty="secondary",
    example={"delta": 4.0},
)
def two_sided_clip(
    delta: AtLeastOne[Number], epsilon: NonNegativeOrInf[Number] = 0.2
) -> PolicyLossSpec:
    """``-min(min(r, δ)·A, clip(r, 1-ε, 1+ε)·A)``, token mean: also for ``A < 0`` no
    ratio counts as more than ``δ > 1+ε``.

    It is TRL's ``delta``. The paper's values were not found in print, so ``delta`` must
    be given.
    """
    return PolicyLossSpec(surrogate=Clip(epsilon_low=epsilon, epsilon_high=epsilon, delta=delta))


@published(
    "Second-Moment Trust Policy Optimization (M2PO)",
    arxiv="2510.01161",
    level="batch",
)
def m2po(
    budget: Positive[Number] = 0.04,
    least_low: NonNegative[Number] = 0.3,
    least_high: NonNegative[Number] = 0.5,
) -> PolicyLossSpec:
    """Clip to ``[1 - max(1-e^-τ, least_low), 1 + max(e^τ-1, least_high)]``, token mean,
    with one τ for the call that keeps a second moment in budget.

    τ is the largest ``|log r|`` such that, cut there, the mean of ``(log r)²`` over the
    tokens that have moved to their advantage's side (``A > 0`` and ``r > 1``, or
    ``A < 0`` and ``r < 1``) is below ``budget``; nothing is clipped while that mean is
    within the budget. The authors' code and values.

    Differs from the paper: its objective has a mask of those tokens instead of the
    clip.
    """
    bounds: dict[str, Any] = {
        "epsilon_low": SecondMomentLower(budget=budget, least=least_low),
        "epsilon_high": SecondMomentUpper(budget=budget, least=least_high),
    }
    return PolicyLossSpec(surrogate=Clip(**bounds), ratio=TokenRatio(clamp=math.inf))


@published(
    "Cumulative Token Policy Optimization (CTPO)",
    paper="Rethinking Importance Sampling in LLM Policy Optimization: A Cumulative Token "
    "Perspective",
    arxiv="2605.07331",
)
def ctpo(
    log_clip_low: Positive[Number] = 0.025,
    log_clip_high: Positive[Number] = 0.05,
    log_clip_c: Positive[Number] = 0.05,
    power: Real[Number] = 0.5,
) -> PolicyLossSpec:
    """Dual clip, token mean, of the ratio of the sequence up to each token,
    ``Π_{s<=t} r_s``, with bounds that widen as its logarithm does, by ``√t``.

    ``log r`` of the n-th completion token is clipped to
    ``[-log_clip_low·n^power, log_clip_high·n^power]``, and for ``A < 0`` the loss is at
    most ``-exp(log_clip_c·n^power)·A``. The gradient is the token's own. The authors'
    ``cum-token-cumprod-la`` and the values of its script.
    """
    bounds: dict[str, Any] = {
        "epsilon_low": PositionBound(base=-log_clip_low, power=power, shift=-1.0, sign=-1.0),
        "epsilon_high": PositionBound(base=log_clip_high, power=power, shift=-1.0),
        "clip_ratio_c": PositionBound(base=log_clip_c, power=power),
    }
    return PolicyLossSpec(
        surrogate=DualClip(**bounds), ratio=CumulativeRatio(clamp=(-math.inf, 10.0))
    )


@published(
    "prime-rl's losses: DPPO or IPO masks with the KL of Kimi K2.5",
    paper="Kimi K2.5: Visual Agentic Intelligence",
    arxiv="2602.02276",
    certainty="secondary",
)
def prime_rl(
    mask: str = "dppo",
    mask_low: NonNegative[Number] = 0.2,
    mask_high: NonNegative[Number] = 0.2,
    kl_tau: NonNegative[Number] = 1e-3,
) -> PolicyLossSpec:
    """``-m·r·A + τ·(log r)²``, token mean, ``m`` 0 where the probability has moved too
    far and else 1. Pass the sampler's log-probs as the old ones.

    ``mask="dppo"``, its default loss: 0 where ``p - p_old > mask_high`` and ``A > 0``,
    or ``p - p_old < -mask_low`` and ``A <= 0`` (arXiv:2602.04879). ``"ipo"``: 0 where
    ``|p - p_old| > mask_high``, for which it has 0.1; ``mask_low`` is then an error. A
    masked token still pays for its KL.

    Differs from the paper: transcribed from prime-rl, which names Kimi K2.5 as the
    source of the squared log-ratio; the mask is DPPO's.
    """
    masks = {
        "dppo": lambda: ProbabilityDriftMask(low=mask_low, high=mask_high),
        "ipo": lambda: ProbabilityDistanceMask(threshold=mask_high),
    }
    if mask not in masks:
        raise InvalidCall(f"prime_rl: mask is {mask!r}, expected 'dppo' or 'ipo'.")
    forbid_unused(
        "prime_rl", prime_rl, {"mask_low": mask_low}, f"mask={mask!r}", {"mask_low": mask == "dppo"}
    )
    penalties = () if is_zero(kl_tau) else (Penalty(DriftK2(), 2 * kl_tau),)
    return PolicyLossSpec(
        surrogate=Unclipped(),
        penalties=penalties,
        ratio=TokenRatio(clamp=math.inf),
        weights=(masks[mask](),),
    )


@published(
    "Future-KL Influenced Policy Optimization (FIPO)",
    arxiv="2603.19835",
    certainty="secondary",
    level="token",
)
def fipo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    half_life: Positive[Number] = 32.0,
) -> PolicyLossSpec:
    """Clip, token mean, weighted by :class:`~reweight_ops.weights.FutureInfluence`.

    The weight tells how the policy has moved on the tokens that follow.

    Differs from the paper: transcribed from ms-swift, with TRL's symmetric clip as its
    default.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, weights=(FutureInfluence(half_life=half_life),))
