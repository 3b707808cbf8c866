"""Weights that select the tokens with a large covariance of log-prob and advantage.
These tokens reduce a policy's entropy (arXiv:2505.22617).
"""

from __future__ import annotations

from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegativeOrInf, Number, Real, Unit


def _covariance(t, batch):
    """Return ``(A - mean A)·(logp - mean logp)``, with means over this
    call's tokens."""
    return (t.adv - batch.mean(t.adv)) * (t.logp - batch.mean(t.logp))


@weight
class ClipCov(TokenWeight):
    """0 for ``max(1, floor(fraction·n))`` of the n tokens, drawn among those with a
    covariance in ``(lower, upper)`` that a clip with these bounds leaves; else 1.

    The draw is a permutation of the call's positions that follows from ``seed`` (a
    number, or a 0-d tensor such as the step). It is the same on every backend.
    """

    fraction: Unit[Number] = 2e-4
    lower: Real[Number] = 1.0
    upper: Real[Number] = 5.0
    epsilon_low: NonNegativeOrInf[Number] = 0.2
    epsilon_high: NonNegativeOrInf[Number] = 0.2
    seed: Real[Number] = 0.0

    def weight(self, xp, t, batch):
        covariance, ratio = _covariance(t, batch), xp.exp(t.log_ratio)
        clipped = ((ratio < 1 - self.epsilon_low) & (t.adv < 0)) | (
            (ratio > 1 + self.epsilon_high) & (t.adv > 0)
        )
        return 1 - batch.draw(
            self.fraction,
            (covariance > self.lower) & (covariance < self.upper) & ~clipped,
            self.seed,
        )


@weight
class TopCovariance(TokenWeight):
    """``value`` for the ``max(1, floor(fraction·n))`` of the n tokens with the largest
    covariance, else 0.
    """

    fraction: Unit[Number] = 2e-4
    value: Real[Number] = 1.0

    def weight(self, xp, t, batch):
        return batch.largest(_covariance(t, batch), self.fraction) * self.value
