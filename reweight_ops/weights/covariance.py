"""Which tokens move the policy's entropy most: those whose log-prob and advantage vary together."""

from __future__ import annotations

from .._core.formula.base import TokenWeight, weight


@weight
class TopCovariance(TokenWeight):
    """``coef`` for the ``fraction`` of this call's tokens with the largest ``(A - mean A)·(logp - mean logp)``, else 0; detached.

    The Entropy Mechanism, arXiv:2505.22617: the sum of these products is, to first order, how much the entropy falls. ``max(1, floor(fraction·n))`` of n
    tokens, of equal ones the first.
    """

    fraction: float
    coef: float = 1.0

    def weight(self, xp, t, batch):
        covariance = (t.adv - batch.mean(t.adv)) * (t.logp - batch.mean(t.logp))
        known = covariance == covariance
        return xp.where(known, self.coef * batch.top_floor(covariance, self.fraction, known), covariance)
