"""DRO: a log-likelihood weighted by the advantage, with the square of the log-ratio
instead of a clip.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.formula.base import Rule, rule
from .._core.ranges import NonNegative, Number
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import TokenRatio


@rule("dro")
class Dro(Rule):
    """``-A·logp + beta/2·(log r)²``."""

    beta: NonNegative[Number] = 0.1  # default of the rule only: the method has none

    def loss(self, xp, t):
        return -t.adv * t.logp + 0.5 * self.beta * t.log_ratio * t.log_ratio


@published(
    "Direct Reward Optimisation (DRO)",
    paper="Offline Regularised Reinforcement Learning for Large Language Models Alignment",
    arxiv="2405.19107",
    certainty="secondary",
    example={"beta": 0.1},
)
def dro(beta: NonNegative[Number]) -> PolicyLossSpec:
    """``-(A·logp - β/2·(log r)²)``, token mean.

    This is the square of ``A - β·log r`` over β, without the terms that do not depend
    on the policy.

    Differs from the paper: it is per token and against the old policy, as in verl
    (``dro``) and Tinker. The paper has one square per response, against the reference,
    with a learned value for A's baseline. No trainer states a default for β.
    """
    return PolicyLossSpec(surrogate=Dro(beta=beta), ratio=TokenRatio(clamp=math.inf))
