"""Penalties: terms that do not read advantages. KL estimators follow Schulman's
"Approximating KL divergence" (2020).

``d = ref_logp - logp``. The argument of k2, k3 and of the straight-through forms is
clipped to ``±clamp`` with zero gradient outside, because a bare ``exp`` overflows in
fp32. ``clamp=inf`` is TRL's bare form.
"""

from __future__ import annotations

import math

from .._core.formula.base import Rule, rule
from .._core.ranges import Number, PositiveOrInf


def _k3(xp, d):
    return xp.expm1(d) - d


@rule("k1", kind="penalty")
class K1(Rule):
    """``logp - ref_logp``. Its gradient is not that of the KL: on-policy its
    expectation is zero.
    """

    def loss(self, xp, t):
        return t.logp - t.ref_logp


@rule("k2", kind="penalty")
class K2(Rule):
    """``d²/2``. Its gradient is the gradient of the KL, on-policy."""

    clamp: PositiveOrInf[Number] = 20.0

    def loss(self, xp, t):
        d = xp.clip(t.ref_logp - t.logp, -self.clamp, self.clamp)
        return 0.5 * d * d


@rule("k3", kind="penalty")
class K3(Rule):
    """``min(exp(d) - d - 1, cap)``: GRPO's KL (DeepSeekMath, arXiv:2402.03300, eq. 4);
    verl's ``low_var_kl`` has ``cap=10``.
    """

    clamp: PositiveOrInf[Number] = 20.0
    cap: PositiveOrInf[Number] = math.inf

    def loss(self, xp, t):
        d = xp.clip(t.ref_logp - t.logp, -self.clamp, self.clamp)
        return xp.clip(_k3(xp, d), -self.cap, self.cap)


@rule("absolute", kind="penalty")
class Absolute(Rule):
    """``|d|`` (verl's ``abs``)."""

    def loss(self, xp, t):
        return xp.abs(t.ref_logp - t.logp)


@rule("k3_corrected", kind="penalty")
class K3Corrected(Rule):
    """``r·(exp(d) - d - 1)``: k3 times the importance ratio, gradient through both
    (DeepSeek-V3.2, arXiv:2512.02556; TRL's
    ``use_bias_correction_kl``)."""

    clamp: PositiveOrInf[Number] = 20.0

    def loss(self, xp, t):
        d = xp.clip(t.ref_logp - t.logp, -self.clamp, self.clamp)
        return xp.exp(t.log_ratio) * _k3(xp, d)


@rule("k1_straight_through", kind="penalty")
class K1StraightThrough(Rule):
    """The value of k1 with the gradient of k2 (verl's ``k1+``)."""

    def loss(self, xp, t):
        k2 = 0.5 * (t.ref_logp - t.logp) * (t.ref_logp - t.logp)
        return xp.straight_through(k2, t.logp - t.ref_logp)


@rule("absolute_straight_through", kind="penalty")
class AbsoluteStraightThrough(Rule):
    """The value of ``|d|`` with the gradient of k2 (verl's ``abs+``)."""

    def loss(self, xp, t):
        k2 = 0.5 * (t.ref_logp - t.logp) * (t.ref_logp - t.logp)
        return xp.straight_through(k2, xp.abs(t.ref_logp - t.logp))


@rule("k3_straight_through", kind="penalty")
class K3StraightThrough(Rule):
    """The value of k3 with the gradient of k2 (verl's ``k3+`` and ``low_var_kl+``, with
    ``cap=10``).
    """

    clamp: PositiveOrInf[Number] = 20.0
    cap: PositiveOrInf[Number] = math.inf

    def loss(self, xp, t):
        k2 = 0.5 * (t.ref_logp - t.logp) * (t.ref_logp - t.logp)
        k3 = _k3(xp, xp.clip(t.ref_logp - t.logp, -self.clamp, self.clamp))
        return xp.straight_through(k2, xp.clip(k3, -self.cap, self.cap))


def _reverse_kl_gradient(xp, t, value, ratio_max):
    """Return ``value`` (cut at ±10) with the off-policy gradient of the reverse KL,
    which is that of ``sg(min(r, ratio_max))·k2``.
    """
    d = t.ref_logp - t.logp
    weighted = xp.stop_gradient(xp.minimum(xp.exp(t.log_ratio), ratio_max)) * 0.5 * d * d
    return xp.straight_through(weighted, xp.clip(value, -10.0, 10.0))


@rule("k1_unbiased", kind="penalty")
class K1Unbiased(Rule):
    """The value of k1, cut at ±10, with the gradient of ``sg(min(r, ratio_max))·k2``,
    the reverse KL's off-policy (arXiv:2506.09477; OpenRLHF's
    ``unbiased_gradient``)."""

    ratio_max: PositiveOrInf[Number] = 10.0

    def loss(self, xp, t):
        return _reverse_kl_gradient(xp, t, t.logp - t.ref_logp, self.ratio_max)


@rule("k2_unbiased", kind="penalty")
class K2Unbiased(Rule):
    """:class:`K1Unbiased` with the value of k2."""

    ratio_max: PositiveOrInf[Number] = 10.0

    def loss(self, xp, t):
        return _reverse_kl_gradient(
            xp, t, 0.5 * (t.ref_logp - t.logp) * (t.ref_logp - t.logp), self.ratio_max
        )


@rule("k3_unbiased", kind="penalty")
class K3Unbiased(Rule):
    """:class:`K1Unbiased` with the value of k3."""

    ratio_max: PositiveOrInf[Number] = 10.0

    def loss(self, xp, t):
        return _reverse_kl_gradient(
            xp, t, _k3(xp, xp.minimum(t.ref_logp - t.logp, 10.0)), self.ratio_max
        )


@rule("entropy_bonus", kind="penalty")
class EntropyBonus(Rule):
    """``-H``, with the exact gradient of the entropy. A positive coefficient rewards
    entropy.
    """

    def loss(self, xp, t):
        return -t.entropy
