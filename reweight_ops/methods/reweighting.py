"""Methods that weight tokens by their probability or entropy."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InvalidCall
from ..rules.surrogates import Clip
from ..spec import PolicyLossSpec
from ..weights import AdvantageReweighting, CurrentAdvantageReweighting, ProbabilityBand, TopEntropy
from .parts import entropy, kl
from .registry import published

_AR_PAPER = "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs"


@published("advantage_reweighting", "Advantage Reweighting (AR)", paper=_AR_PAPER, arxiv="2505.12929")
def advantage_reweighting(
    alpha: Any = 0.3, probabilities: str = "old", epsilon_low: Any = 0.2, epsilon_high: Any = 0.2, beta: Any = 0.0, entropy_coef: Any = 0.0
) -> PolicyLossSpec:
    """Clip, each token's term times ``α·p + 1 - α`` (section 4.1), token mean.

    ``probabilities``: ``"old"`` as the authors' code, ``"current"`` (detached) as the paper. α is 0.2 to 0.3 there, 0.1 for mathematics.
    """
    kinds = {"old": AdvantageReweighting, "current": CurrentAdvantageReweighting}
    if probabilities not in kinds:
        raise InvalidCall(f"advantage_reweighting: probabilities is {probabilities!r}, expected 'old' or 'current'.")
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    penalties = (*kl(beta), *entropy(entropy_coef))
    return PolicyLossSpec(surrogate=clip, penalties=penalties, weights=(kinds[probabilities](alpha=alpha),), name="advantage_reweighting")


@published("lopti", "Low-Probability Token Isolation (Lopti)", paper=_AR_PAPER, arxiv="2505.12929")
def lopti(
    half: str = "low", eta: Any = 0.5, epsilon_low: Any = 0.2, epsilon_high: Any = 0.2, beta: Any = 0.0, entropy_coef: Any = 0.0
) -> PolicyLossSpec:
    """One of two updates over the same batch with fixed old log-probs: ``half="low"`` (``p_old < η``) first, then ``"high"`` (section 4.2).

    All terms are masked, over the full denominator. Two updates are not one loss of two halves: step the optimizer in between.
    """
    if half not in ("low", "high"):
        raise InvalidCall(f"lopti: half is {half!r}, expected 'low' (the first update) or 'high'.")
    band = ProbabilityBand(upper=eta) if half == "low" else ProbabilityBand(lower=eta, upper=math.inf)
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, penalties=(*kl(beta), *entropy(entropy_coef)), weights=(band,), name="lopti")


@published(
    "top_entropy",
    "Forking-token GRPO (80/20)",
    paper="Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning",
    arxiv="2506.01939",
)
def top_entropy(fraction: Any = 0.2, epsilon_low: Any = 0.2, epsilon_high: Any = 0.28) -> PolicyLossSpec:
    """DAPO on the ``fraction`` of the batch's tokens with the highest entropy (eq. 6); the others stay in the denominator, as in TRL."""
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, weights=(TopEntropy(fraction=fraction),), name="top_entropy")
