"""Weights and clip bounds that limit how far the policy moves, by a budget over the
call or along each sequence.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegative, Number, Positive, Real
from ..errors import InvalidCall


def _second_moment_bound(xp, t, batch, budget):
    """Return the largest ``|log r|`` among tokens that move to their advantage's side
    such that their mean ``(log r)²``, cut there, is below the budget.
    """
    harmful = ((t.adv > 0) & (t.log_ratio > 0)) | ((t.adv < 0) & (t.log_ratio < 0))
    capped = batch.capped_mean(t.log_ratio * t.log_ratio, harmful)
    within = batch.max(xp.where(harmful & (capped < budget), xp.abs(t.log_ratio), 0.0))
    exceeded = batch.max(xp.where(harmful, capped, 0.0)) > budget
    return xp.where(exceeded, within, math.inf)


@weight
class SecondMomentLower(TokenWeight):
    """``max(1 - exp(-τ), least)``: M2PO's lower clip bound, one for the whole call. See
    ``methods.m2po``.
    """

    budget: Positive[Number] = 0.04
    least: NonNegative[Number] = 0.3

    def weight(self, xp, t, batch):
        return xp.maximum(1 - xp.exp(-_second_moment_bound(xp, t, batch, self.budget)), self.least)


@weight
class SecondMomentUpper(TokenWeight):
    """``max(exp(τ) - 1, least)``: M2PO's upper clip bound, one for the whole call. See
    ``methods.m2po``.
    """

    budget: Positive[Number] = 0.04
    least: NonNegative[Number] = 0.5

    def weight(self, xp, t, batch):
        return xp.maximum(xp.expm1(_second_moment_bound(xp, t, batch, self.budget)), self.least)


@published(
    "Second-moment mask (AReaL's m2_threshold)",
    name="m2_mask",
    arxiv="2510.01161",
    certainty="secondary",
    level="batch",
)
@weight
class SecondMomentMask(TokenWeight):
    """0 for the tokens of largest ``(old_logp - sampling_logp)²``, as many as it takes
    for the mean of the others to be below ``threshold``, else 1.

    At least one token is left. ``old_logp`` is the proximal policy's, as in
    ``methods.decoupled_ppo``; a sampler's log-prob of NaN counts as no drift. Differs
    from the paper: this is AReaL's form. The authors' code clips instead
    (``methods.m2po``).
    """

    threshold: Positive[Number] = 0.04

    def weight(self, xp, t, batch):
        drift = xp.where(t.sampling_logp == t.sampling_logp, t.old_logp - t.sampling_logp, 0.0)
        square = drift * drift
        return xp.where(
            (batch.mean_below(square) < self.threshold) | (batch.rank(square) < 1), 1.0, 0.0
        )


@weight
class PositionBound(TokenWeight):
    """``exp(base·n^power) + shift`` of the n-th token of a sequence, times ``sign``:
    CTPO's clip bounds. See ``methods.ctpo``.
    """

    base: Real[Number]
    power: Real[Number] = 0.5
    shift: Real[Number] = 0.0
    sign: Real[Number] = 1.0

    def weight(self, xp, t, batch):
        position = batch.seq_cumsum(1.0)
        return self.sign * (
            xp.exp(self.base * xp.exp(self.power * xp.log(xp.maximum(position, 1.0)))) + self.shift
        )


@weight
class ProbabilityDriftMask(TokenWeight):
    """0 where ``p - p_old > high`` and ``A > 0``, or ``p - p_old < -low`` and
    ``A <= 0``, else 1: DPPO's total variation as a mask.
    """

    low: NonNegative[Number] = 0.2
    high: NonNegative[Number] = 0.2

    def weight(self, xp, t, batch):
        drift = xp.exp(t.logp) - xp.exp(t.old_logp)
        return xp.where(
            ((t.adv > 0) & (drift > self.high)) | ((t.adv <= 0) & (drift < -self.low)), 0.0, 1.0
        )


@weight
class ProbabilityDistanceMask(TokenWeight):
    """0 where ``|p - p_old| > threshold``, whatever the advantage, else 1: prime-rl's
    ``ipo`` mask.
    """

    threshold: NonNegative[Number] = 0.1

    def weight(self, xp, t, batch):
        return xp.where(xp.abs(xp.exp(t.logp) - xp.exp(t.old_logp)) > self.threshold, 0.0, 1.0)


def _k2(xp, d):
    return 0.5 * d * d


def _k3(xp, d):
    return xp.expm1(d) - d


def _tv(xp, t):
    return xp.abs(xp.exp(t.logp) - xp.exp(t.old_logp))


@weight
class MaxK2Mask(TokenWeight):
    """0 for a sequence with a token whose ``(logp - old_logp)²/2`` is above
    ``threshold``, else 1.
    """

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(
            batch.seq_max(_k2(xp, xp.clip(t.logp - t.old_logp, -20.0, 20.0))) > self.threshold,
            0.0,
            1.0,
        )


@weight
class MaxK3Mask(TokenWeight):
    """0 for a sequence with a token whose ``r - log r - 1`` is above ``threshold``,
    else 1.
    """

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(
            batch.seq_max(_k3(xp, xp.clip(t.logp - t.old_logp, -20.0, 20.0))) > self.threshold,
            0.0,
            1.0,
        )


@weight
class MaxTotalVariationMask(TokenWeight):
    """0 for a sequence with a token whose ``|p - p_old|`` is above ``threshold``, else
    1.
    """

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(batch.seq_max(_tv(xp, t)) > self.threshold, 0.0, 1.0)


@published(
    "Trust Region Masking (TRM)",
    paper="Trust Region Masking for Long-Horizon LLM Reinforcement Learning",
    arxiv="2512.23075",
    certainty="secondary",
    level="sequence",
    example={"threshold": 0.1},
)
def trm(threshold: NonNegative[float], divergence: str = "k3") -> TokenWeight:
    """0 for every token of a sequence whose largest token divergence from the old
    policy is above ``threshold``, else 1.

    ``divergence`` of a token, from the sampled token alone: ``"k3"`` ``r - log r - 1``
    and ``"k2"`` ``(log r)²/2`` (verl's ``seq_max_k3``, ``seq_max_k2``, ``log r`` cut at
    ±20), or ``"tv"`` ``|p - p_old|``. Pass the sampler's log-probs as the old ones.

    Differs from the paper: the paper bounds the divergence of whole distributions if
    they are kept. Its threshold was not found, so it must be given.
    """
    kinds: dict[str, type] = {"k2": MaxK2Mask, "k3": MaxK3Mask, "tv": MaxTotalVariationMask}
    if divergence not in kinds:
        raise InvalidCall(f"trm: divergence is {divergence!r}, expected 'k2', 'k3' or 'tv'.")
    mask: TokenWeight = kinds[divergence](threshold=threshold)
    return mask
