"""Surrogates: the advantage-weighted term of a policy loss. ``r = exp(log_ratio)``,
``A`` the advantage, ``sg`` stop-gradient.
"""

from __future__ import annotations

import math
from typing import Annotated

from .._core.formula.base import Rule, rule
from .._core.ranges import AtLeastOne, Interval, NonNegativeOrInf, Number, Positive, PositiveOrInf


@rule("clip")
class Clip(Rule):
    """``-min(min(r, delta)·A, clip(r, 1-epsilon_low, 1+epsilon_high)·A)``.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. Asymmetric bounds: DAPO,
    arXiv:2503.14476, eq. 10. ``delta``: TRL's two-sided clipping (INTELLECT-2,
    arXiv:2505.07291), an upper bound on the unclipped ratio for both signs of A; off is
    ``inf``.
    """

    epsilon_low: NonNegativeOrInf[Number] = 0.2
    epsilon_high: NonNegativeOrInf[Number] = 0.2
    delta: PositiveOrInf[Number] = math.inf

    def loss(self, xp, t):
        ratio = xp.exp(t.log_ratio)
        bound = xp.clip(ratio, 1 - self.epsilon_low, 1 + self.epsilon_high)
        return -xp.minimum(xp.minimum(ratio, self.delta) * t.adv, bound * t.adv)

    def clipped(self, xp, t):
        ratio = xp.minimum(xp.exp(t.log_ratio), self.delta)
        return (ratio < 1 - self.epsilon_low) & (t.adv < 0), (ratio > 1 + self.epsilon_high) & (
            t.adv > 0
        )


@rule("unclipped")
class Unclipped(Rule):
    """``-r·A``: the importance-weighted advantage without a clip."""

    def loss(self, xp, t):
        return -xp.exp(t.log_ratio) * t.adv


@rule("dual_clip")
class DualClip(Rule):
    """:class:`Clip` without ``delta``. For ``A < 0`` the loss is never above
    ``-clip_ratio_c·A``.

    Ye et al. 2019, arXiv:1912.09729, eq. 5. It is verl's default.
    """

    epsilon_low: NonNegativeOrInf[Number] = 0.2
    epsilon_high: NonNegativeOrInf[Number] = 0.2
    clip_ratio_c: AtLeastOne[Number] = 3.0

    def loss(self, xp, t):
        ratio = xp.exp(t.log_ratio)
        bound = xp.clip(ratio, 1 - self.epsilon_low, 1 + self.epsilon_high)
        surrogate = xp.minimum(ratio * t.adv, bound * t.adv)
        return -xp.where(t.adv < 0, xp.maximum(surrogate, self.clip_ratio_c * t.adv), surrogate)

    def clipped(self, xp, t):
        ratio = xp.exp(t.log_ratio)
        low = (ratio < 1 - self.epsilon_low) & (t.adv < 0)
        return low, ((ratio > 1 + self.epsilon_high) & (t.adv > 0)) | (
            (ratio > self.clip_ratio_c) & (t.adv < 0)
        )


@rule("cispo")
class Cispo(Rule):
    """``-sg(clip(r, ratio_min, ratio_max))·A·logp``.

    MiniMax-M1, arXiv:2506.13585, eq. 4. ``ratio_max`` is the cap itself: TRL's
    ``epsilon_high``, verl's ``1 + clip_ratio_high``.
    """

    ratio_min: Annotated[Number, Interval("[-inf, inf)")] = 0.0
    ratio_max: PositiveOrInf[Number] = 5.0

    def loss(self, xp, t):
        return (
            -xp.stop_gradient(xp.clip(xp.exp(t.log_ratio), self.ratio_min, self.ratio_max))
            * t.adv
            * t.logp
        )

    def clipped(self, xp, t):
        ratio = xp.exp(t.log_ratio)
        return (ratio < self.ratio_min) & (t.adv < 0), (ratio > self.ratio_max) & (t.adv > 0)


@rule("sapo")
class Sapo(Rule):
    """``-(4/τ)·sigmoid(τ·(r-1))·A`` with ``τ = temperature_pos`` where ``A > 0``, else
    ``temperature_neg``.

    Soft Adaptive Policy Optimization, arXiv:2511.20347, eq. 5-6.
    """

    temperature_pos: Positive[Number] = 1.0
    temperature_neg: Positive[Number] = 1.05

    def loss(self, xp, t):
        tau = xp.where(t.adv > 0, self.temperature_pos, self.temperature_neg)
        return -xp.sigmoid(tau * (xp.exp(t.log_ratio) - 1)) * 4 / tau * t.adv


@rule("reinforce")
class Reinforce(Rule):
    """``-A·logp``: REINFORCE (Williams 1992), advantage-weighted log-likelihood, and
    GPG (arXiv:2504.02546). It does not read the ratio.
    """

    def loss(self, xp, t):
        return -t.adv * t.logp


@rule("dppo_tv")
class DppoTV(Rule):
    """``-sg(min(r, ratio_max)·keep)·A·logp``, ``keep``:
    ``p - p_old <= divergence_high`` where ``A > 0``, else ``>= -divergence_low``.

    Divergence PPO with the binary total variation, arXiv:2602.04879. Differs from the
    paper: as in verl, it is written with the log-prob instead of the ratio (the same
    gradient), and the ratio is truncated at ``ratio_max`` (the paper's section 5.4).
    """

    divergence_low: NonNegativeOrInf[Number] = 0.2
    divergence_high: NonNegativeOrInf[Number] = 0.2
    ratio_max: PositiveOrInf[Number] = 20.0

    def _outside(self, xp, t):
        drift = xp.exp(t.logp) - xp.exp(t.old_logp)
        return (drift < -self.divergence_low) & (t.adv <= 0), (drift > self.divergence_high) & (
            t.adv > 0
        )

    def loss(self, xp, t):
        low, high = self._outside(xp, t)
        ratio = xp.stop_gradient(xp.minimum(xp.exp(t.log_ratio), self.ratio_max))
        # A ratio of inf and a log-prob of -inf are only multiplied where they are kept.
        kept = xp.where(low | high, 0.0, ratio)
        return xp.where(low | high, 0.0, -kept * t.adv * t.logp)

    def clipped(self, xp, t):
        return self._outside(xp, t)
