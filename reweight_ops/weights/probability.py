"""Weights from a token's probability: Advantage Reweighting in all modes of its
authors, bands and masks, training signal annealing.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Positive, Unit


@published("Advantage Reweighting (AR)", arxiv="2505.12929", level="token")
@weight
class AdvantageReweighting(TokenWeight):
    """``α·p_old + 1 - α`` with the probability under the old policy. It damps the
    gradient of unlikely tokens (section 4.1).

    This is the form of the authors' code. Differs from the paper: the paper uses the
    current policy, :class:`CurrentAdvantageReweighting`. The code's other modes are
    :class:`PositiveAdvantageReweighting`, :class:`SigmoidReweighting`,
    :class:`NegativeSigmoidReweighting`, :class:`BalancedSigmoidReweighting`,
    :class:`ProbabilityInterval`, :class:`RewardRanked`, and :class:`SignWeight` for its
    ``neg_adv_weight``.
    """

    alpha: Unit[Number] = 0.3

    def weight(self, xp, t, batch):
        return self.alpha * xp.exp(t.old_logp) + 1 - self.alpha


@weight
class CurrentAdvantageReweighting(TokenWeight):
    """``α·p + 1 - α`` with the current probability, detached. AR as the paper writes
    it, arXiv:2505.12929, section 4.1.
    """

    alpha: Unit[Number] = 0.3

    def weight(self, xp, t, batch):
        return self.alpha * xp.exp(t.logp) + 1 - self.alpha


@weight
class PositiveAdvantageReweighting(TokenWeight):
    """:class:`AdvantageReweighting` where ``A > 0``, else 1 (the code's
    ``both_linear_balance1``).
    """

    alpha: Unit[Number] = 0.3

    def weight(self, xp, t, batch):
        return xp.where(t.adv > 0, self.alpha * xp.exp(t.old_logp) + 1 - self.alpha, 1.0)


def _sigmoid(xp, t, steepness, midpoint):
    return 2 * xp.sigmoid(steepness * (xp.exp(t.old_logp) - midpoint))


@weight
class SigmoidReweighting(TokenWeight):
    """``2·σ(k·(p_old - τ))`` with ``k = steepness``, ``τ = midpoint`` (the code's
    ``both_sigmoid``).
    """

    steepness: Positive[Number] = 5.0
    midpoint: Unit[Number] = 0.4

    def weight(self, xp, t, batch):
        return _sigmoid(xp, t, self.steepness, self.midpoint)


@weight
class NegativeSigmoidReweighting(TokenWeight):
    """:class:`SigmoidReweighting` where ``A <= 0``, else 1 (the code's
    ``negative_sigmoid``).
    """

    steepness: Positive[Number] = 5.0
    midpoint: Unit[Number] = 0.4

    def weight(self, xp, t, batch):
        return xp.where(t.adv > 0, 1.0, _sigmoid(xp, t, self.steepness, self.midpoint))


@weight
class BalancedSigmoidReweighting(TokenWeight):
    """:class:`NegativeSigmoidReweighting`, and the negatives scaled to the positives'
    mass: ``ΣA⁺·p / -ΣA⁻·u·p`` over the call's valid tokens.

    It is the code's ``negative_sigmoid_balance1``. ``u`` is the sigmoid weight itself.
    Without negatives nothing is scaled. Differs from the authors' code: the sums of
    that code include padding.
    """

    steepness: Positive[Number] = 5.0
    midpoint: Unit[Number] = 0.4

    def weight(self, xp, t, batch):
        u = _sigmoid(xp, t, self.steepness, self.midpoint)
        p = xp.exp(t.old_logp)
        gain = batch.sum(xp.where(t.adv > 0, t.adv * p, 0.0))
        loss = batch.sum(xp.where(t.adv > 0, 0.0, -t.adv * u * p))
        return xp.where(
            t.adv > 0, 1.0, u * xp.where(loss > 0, gain / xp.where(loss > 0, loss, 1.0), 1.0)
        )


@weight
class SignWeight(TokenWeight):
    """``positive`` where ``A > 0``, else ``negative`` (AR's ``neg_adv_weight``;
    positive-only and negative-only training with 0).
    """

    positive: NonNegative[Number] = 1.0
    negative: NonNegative[Number] = 1.0

    def weight(self, xp, t, batch):
        return xp.where(t.adv > 0, self.positive, self.negative)


@weight
class RewardRanked(TokenWeight):
    """``1/A`` where ``A > 0``, else 0: the surrogate of advantages ``1[A > 0]``,
    whatever their size.

    It is the ``RAFT`` mode of AR's code (with :class:`AdvantageReweighting`:
    ``RAFT_linear``). It is for surrogates that are linear in a positive A, which
    excludes those with a gate that depends on the size of A.
    """

    def weight(self, xp, t, batch):
        return xp.where(t.adv > 0, 1 / xp.where(t.adv > 0, t.adv, 1.0), 0.0)


@weight
class ProbabilityBand(TokenWeight):
    """1 where ``lower <= p_old < upper``, else 0. It multiplies every term, over the
    full denominator.

    It gives the two halves of Lopti, arXiv:2505.12929, section 4.2: first
    ``p_old < η``, then ``p_old >= η``, each a full update.
    """

    scope: str = "all"
    lower: NonNegative[Number] = 0.0
    upper: NonNegativeOrInf[Number] = math.inf

    def weight(self, xp, t, batch):
        p = xp.exp(t.old_logp)
        return xp.where((p >= self.lower) & (p < self.upper), 1.0, 0.0)


@weight
class ProbabilityQuantile(TokenWeight):
    """``below`` where ``p_old`` is less than its ``quantile`` over this call's tokens,
    else ``above``. It multiplies every term, over the full denominator.

    The quantile interpolates linearly between order statistics, as ``torch.quantile``
    does. This is Lopti's split by portions (its code's ``seperate_portion``).
    """

    scope: str = "all"
    quantile: Unit[Number] = 0.5
    below: NonNegative[Number] = 1.0
    above: NonNegative[Number] = 0.0

    def weight(self, xp, t, batch):
        p = xp.exp(t.old_logp)
        return xp.where(p < batch.quantile(p, self.quantile), self.below, self.above)


@weight
class ProbabilityInterval(TokenWeight):
    """1 where ``lower < p_old <= upper``, else 0; of the surrogate (the ``mask_prob``
    modes of AR's code: quarters, or all below a quarter's end).
    """

    lower: NonNegative[Number] = 0.0
    upper: NonNegativeOrInf[Number] = 1.0

    def weight(self, xp, t, batch):
        p = xp.exp(t.old_logp)
        return xp.where((p > self.lower) & (p <= self.upper), 1.0, 0.0)


@published(
    "SPO probability mask",
    arxiv="2505.23564",
    level="token",
)
def spo_probability_mask(threshold: Unit[float] = 0.9) -> TokenWeight:
    """``1[p_old < threshold]`` for every term: only tokens at which the old policy was
    uncertain are trained.

    The authors leave the others out of the denominator too:
    ``reduction=TokenMean(weight=spo_probability_mask())``, which takes one pass.
    """
    return ProbabilityBand(upper=threshold)


@published(
    "Training Signal Annealing",
    name="tsa",
    arxiv="1904.12848",
    level="token",
    example={"threshold": 0.5},
)
@weight
class TrainingSignalAnnealing(TokenWeight):
    """``1[p <= η]`` with the current probability. It leaves out tokens that are already
    learnt. A schedule raises the ``threshold`` η to 1.

    The paper's mean is over the remaining tokens:
    ``reduction=TokenMean(weight=TrainingSignalAnnealing(threshold=η))`` (two passes; as
    a weight of the spec, over the full denominator, one). Differs from the paper: it is
    per token instead of per example. The number of classes in the paper's η becomes the
    size of the vocabulary.
    """

    threshold: Unit[Number]

    def weight(self, xp, t, batch):
        return xp.where(xp.exp(t.logp) <= self.threshold, 1.0, 0.0)
