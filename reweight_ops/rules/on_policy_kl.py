"""KL penalties to the reference with the gradient's score-function term, for tokens
that the trained policy has sampled.

The mean of an estimator over the policy's own tokens has two gradients: through the
estimator, and through the choice of tokens. ``d = ref_logp - logp``. The value is the
estimator ``k(d)``, and the derivative by ``logp`` is ``k(d) - k'(d)``.
arXiv:2506.09477; NeMo-RL's ``calculate_kl``.
"""

from __future__ import annotations

import math

from .._core.formula.base import Rule, rule
from .._core.ranges import PositiveOrInf


@rule("k1_on_policy", kind="penalty")
class K1OnPolicy(Rule):
    """``k(d) = -d``. Where ``|d| > clamp`` or ``|k| > cap`` there is no gradient."""

    clamp: PositiveOrInf[float] = 20.0
    cap: PositiveOrInf[float] = math.inf

    def estimate(self, xp, d):
        return -d

    def loss(self, xp, t):
        d = t.ref_logp - t.logp
        inside = xp.clip(d, -self.clamp, self.clamp)
        value = self.estimate(xp, inside)
        score = xp.where(xp.abs(d) <= self.clamp, xp.stop_gradient(value) * t.logp, 0.0)
        bounded = xp.clip(value, -self.cap, self.cap)
        return xp.straight_through(xp.where(xp.abs(value) <= self.cap, score + value, 0.0), bounded)


@rule("k2_on_policy", kind="penalty")
class K2OnPolicy(K1OnPolicy):
    """``k(d) = d²/2``. The bounds are those of :class:`K1OnPolicy`."""

    def estimate(self, xp, d):
        return 0.5 * d * d


@rule("k3_on_policy", kind="penalty")
class K3OnPolicy(K1OnPolicy):
    """``k(d) = exp(d) - d - 1``. The bounds are those of :class:`K1OnPolicy`."""

    def estimate(self, xp, d):
        return xp.expm1(d) - d
