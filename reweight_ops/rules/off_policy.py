"""Terms for data of an older policy that bound or regularize the update without PPO's clip. ``r = exp(log_ratio)``, ``sg`` stop-gradient."""

from __future__ import annotations

from .._core.formula.base import Rule, rule


@rule("dppo_kl")
class DppoKL(Rule):
    """``-sg(min(r, ratio_max)·keep)·A·logp``, ``keep`` where the binary KL of the old to the current probability is small, or the token moves back.

    ``KL = q·log(q/p) + (1-q)·log((1-q)/(1-p))``, ``q = p_old``. Dropped: ``A > 0``, ``p > q`` and ``KL > divergence_high``; ``A <= 0``, ``p < q`` and
    ``KL > divergence_low``. Divergence PPO, arXiv:2602.04879; as in verl, 1e-8 is added to both ``1 - q`` and ``1 - p``.
    """

    divergence_low: float = 0.2
    divergence_high: float = 0.2
    ratio_max: float = 20.0

    def _outside(self, xp, t):
        p, q = xp.exp(t.logp), xp.exp(t.old_logp)
        others = xp.log((1e-8 - xp.expm1(t.old_logp)) / (1e-8 - xp.expm1(t.logp)))
        kl = q * (t.old_logp - t.logp) + (1 - q) * others
        low = (kl > self.divergence_low) & (p < q) & (t.adv <= 0)
        return low, (kl > self.divergence_high) & (p > q) & (t.adv > 0)

    def loss(self, xp, t):
        low, high = self._outside(xp, t)
        ratio = xp.where(low | high, 0.0, xp.minimum(xp.exp(t.log_ratio), self.ratio_max))
        return -xp.stop_gradient(ratio) * t.adv * t.logp

    def clipped(self, xp, t):
        return self._outside(xp, t)


@rule("dro")
class Dro(Rule):
    """``-A·logp + β/2·log_ratio²``: REINFORCE with a quadratic penalty on the move away from the old policy. DRO, arXiv:2405.19107."""

    beta: float = 0.1

    def loss(self, xp, t):
        return 0.5 * self.beta * t.log_ratio * t.log_ratio - t.adv * t.logp


@rule("kl_cov")
class KlCov(Rule):
    """``-r·A + penalty·|log_ratio|``: no clip, and a penalty on the move away from the old policy where ``penalty``, one a token, is not 0."""

    penalty: float = 0.0

    def loss(self, xp, t):
        return self.penalty * xp.abs(t.log_ratio) - xp.exp(t.log_ratio) * t.adv


@rule("topr")
class Topr(Rule):
    """``-sg(w)·A·logp``: ``w`` is 1 where ``A >= 0``, else ``min(r, ratio_max)``. TOPR, arXiv:2503.14286, eq. 8."""

    ratio_max: float = 1.0

    def loss(self, xp, t):
        tapered = xp.minimum(xp.exp(t.log_ratio), self.ratio_max)
        # A ratio that is NaN is no weight of 1.
        unread = (t.adv >= 0) & (t.log_ratio == t.log_ratio)
        return -xp.stop_gradient(xp.where(unread, 1.0, tapered)) * t.adv * t.logp


@rule("drift_k2", kind="penalty")
class DriftK2(Rule):
    """``log_ratio²/2``: k2 of the move away from the old policy."""

    def loss(self, xp, t):
        return 0.5 * t.log_ratio * t.log_ratio
