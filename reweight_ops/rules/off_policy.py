"""Terms for data of an older policy that bound or regularize the update without PPO's
clip. ``r = exp(log_ratio)``, ``sg`` stop-gradient.
"""

from __future__ import annotations

from .._core.formula.base import Rule, rule
from .._core.ranges import Number, Positive


@rule("topr")
class Topr(Rule):
    """``-sg(w)·A·logp``: ``w`` is 1 where ``A >= 0``, else ``min(r, ratio_max)``. TOPR,
    arXiv:2503.14286, eq. 8.
    """

    ratio_max: Positive[Number] = 1.0

    def loss(self, xp, t):
        tapered = xp.minimum(xp.exp(t.log_ratio), self.ratio_max)
        # A NaN ratio must not become a weight of 1.
        unread = (t.adv >= 0) & (t.log_ratio == t.log_ratio)
        return -xp.stop_gradient(xp.where(unread, 1.0, tapered)) * t.adv * t.logp


@rule("drift_k2", kind="penalty")
class DriftK2(Rule):
    """``log_ratio²/2``: the k2 estimator of the distance from the old policy."""

    def loss(self, xp, t):
        return 0.5 * t.log_ratio * t.log_ratio
