"""GLM-5: REINFORCE on the tokens whose importance ratio lies between two bounds, times
that ratio.
"""

from .._core.catalogue.registry import published
from .._core.ranges import NonNegative, Number
from .._core.spec.policy import PolicyLossSpec
from ..rules import Rule, rule


@rule("ratio_mask")
class RatioMask(Rule):
    """``-sg(w)·A·logp``: ``w`` is r where ``1 - epsilon_low < r < 1 + epsilon_high``,
    else 0. arXiv:2602.15763.
    """

    epsilon_low: NonNegative[Number] = 0.2
    epsilon_high: NonNegative[Number] = 0.2

    def loss(self, xp, t):
        r = xp.exp(t.log_ratio)
        # a NaN is not dropped, so that it shows
        outside = (r <= 1 - self.epsilon_low) | (r >= 1 + self.epsilon_high)
        # A ratio of inf and a log-prob of -inf are only multiplied where they are kept.
        kept = xp.where(outside, 0.0, xp.stop_gradient(r))
        adv = xp.where(outside, 0.0, t.adv)
        return xp.where(outside, 0.0, -kept * adv * t.logp)


@published(
    "GLM-5's double-sided mask",
    paper="GLM-5: from Vibe Coding to Agentic Engineering",
    arxiv="2602.15763",
    certainty="derived",
)
def glm5(
    epsilon_low: NonNegative[float] = 0.2, epsilon_high: NonNegative[float] = 0.2
) -> PolicyLossSpec:
    """Tokens that moved too far either way are dropped; token mean. Derived: from
    SkyRL's ``rollout_is``; the bounds are ours.
    """
    return PolicyLossSpec(surrogate=RatioMask(epsilon_low=epsilon_low, epsilon_high=epsilon_high))
