"""Likelihood terms. They do not read advantages, and are surrogates
(``advantages=None``) or penalties. ``p = exp(logp)``.
"""

from __future__ import annotations

from .._core.formula.base import Rule, rule
from .._core.ranges import NonNegative, Number, Positive


@rule("nll", kind="any")
class NLL(Rule):
    """``-logp``: cross-entropy, supervised fine-tuning."""

    def loss(self, xp, t):
        return -t.logp


@rule("likelihood_ascent", kind="any")
class LikelihoodAscent(Rule):
    """``logp``: gradient ascent on the cross-entropy (unlearning). It is unbounded
    below.
    """

    def loss(self, xp, t):
        return t.logp


@rule("comp_sum", kind="any")
class CompSum(Rule):
    """``(p^(τ-1) - 1)/(1-τ)``, at ``τ = 1`` its limit ``-logp``. Comp-sum losses,
    arXiv:2304.07288.

    It depends on the log-prob alone, since ``Σ_v≠y e^(z_v-z_y) = 1/p - 1``.

    τ = 0 sum-exponential loss, 1 cross-entropy, between 1 and 2 generalised
    cross-entropy with ``q = τ-1``, 2 ``1 - p`` (mean absolute error). Below τ = 1 it
    overflows fp32 for ``p < exp(-88/(1-τ))``.
    """

    tau: NonNegative[Number] = 1.0

    def loss(self, xp, t):
        limit = self.tau == 1
        return xp.where(
            limit, -t.logp, xp.expm1((self.tau - 1) * t.logp) / xp.where(limit, 1.0, 1 - self.tau)
        )


@rule("margin_nll", kind="any")
class MarginNLL(Rule):
    """``log(1 + (1/p - 1)·e^Δ)``: cross-entropy with ``margin`` Δ taken off the
    target's logit (LDAM, arXiv:1906.07413; LDR at λ = 1).

    It is computed as ``log1p((1-p)·(e^Δ - 1)) - logp``, which keeps every digit as p
    goes to 1.
    """

    margin: NonNegative[Number] = 0.1

    def loss(self, xp, t):
        return xp.log1p(xp.expm1(t.logp) * -xp.expm1(self.margin)) - t.logp


@rule("npo", kind="any")
class NPO(Rule):
    """``-(2/β)·log σ(-β·log_ratio)``. Negative Preference Optimization,
    arXiv:2404.05868.

    The log-ratio is a sequence's sum against the reference.
    """

    beta: Positive[Number] = 0.1

    def loss(self, xp, t):
        # log(1 + exp(x)) without overflow, and with its slope of 1/2 at x = 0, where
        # training starts
        x = self.beta * t.log_ratio
        positive = x > 0
        above = x + xp.log1p(xp.exp(-xp.where(positive, x, 0.0)))
        return (
            2 / self.beta * xp.where(positive, above, xp.log1p(xp.exp(xp.where(positive, 0.0, x))))
        )


@rule("likelihood_ratio", kind="any")
class LikelihoodRatio(Rule):
    """``-r``: minus the importance ratio, the score of DisCO's L-ratio variant."""

    def loss(self, xp, t):
        return -xp.exp(t.log_ratio)


@rule("drift_k1", kind="any")
class DriftK1(Rule):
    """``-log_ratio``: the k1 estimator of KL(old, current) on tokens that the old
    policy sampled.
    """

    def loss(self, xp, t):
        return -t.log_ratio


@rule("drift_k3", kind="penalty")
class DriftK3(Rule):
    """``r - log_ratio - 1``: the k3 estimator of KL(old, current) on tokens that the
    old policy sampled.
    """

    def loss(self, xp, t):
        return xp.expm1(t.log_ratio) - t.log_ratio
