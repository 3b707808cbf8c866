"""Methods with one term per response, in its log-ratio to the reference: a regression
onto the reward, and unpaired preferences.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.formula.base import Rule, rule
from .._core.ranges import NonNegative, Number, Positive, Real
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import SequenceRatio
from .._core.spec.reduction import SequenceMean


@rule("advantage_regression")
class AdvantageRegression(Rule):
    """``(beta·log_ratio - A)²``."""

    beta: Positive[Number] = 1e-3

    def loss(self, xp, t):
        return (self.beta * t.log_ratio - t.adv) * (self.beta * t.log_ratio - t.adv)


@rule("kto")
class Kto(Rule):
    """``desirable_weight·(1 - σ(β·(log_ratio - z)))`` where ``A > 0``, else
    ``undesirable_weight·(1 - σ(β·(z - log_ratio)))``, ``z`` = ``kl``.
    """

    beta: Positive[Number] = 0.1
    kl: Real[Number] = 0.0
    desirable_weight: NonNegative[Number] = 1.0
    undesirable_weight: NonNegative[Number] = 1.0

    def loss(self, xp, t):
        x = self.beta * (t.log_ratio - self.kl)
        desirable = t.adv > 0
        return xp.where(desirable, self.desirable_weight, self.undesirable_weight) * xp.sigmoid(
            xp.where(desirable, -x, x)
        )


def _against_reference() -> SequenceRatio:
    return SequenceRatio(clamp=math.inf, against="ref", normalize=False)


@published(
    "A*-PO: optimal advantage regression",
    arxiv="2505.20686",
    certainty="secondary",
)
def a_star_po(beta: Positive[Number] = 1e-3) -> PolicyLossSpec:
    """``(β·log(π(y)/π_ref(y)) - (r - V*))²``, mean over responses. Needs
    ``ref_per_token_logps``.

    ``advantages`` come from ``advantages.a_star_po``: the reward minus the prompt's
    optimal value. Transcribed from TRL's ``A2POTrainer``; β is its ``beta2``.
    """
    return PolicyLossSpec(
        surrogate=AdvantageRegression(beta=beta),
        ratio=_against_reference(),
        reduction=SequenceMean(),
    )


@published(
    "Kahneman-Tversky Optimization (KTO)",
    paper="KTO: Model Alignment as Prospect Theoretic Optimization",
    arxiv="2402.01306",
    certainty="secondary",
)
def kto(
    beta: Positive[Number] = 0.1,
    desirable_weight: NonNegative[Number] = 1.0,
    undesirable_weight: NonNegative[Number] = 1.0,
    kl: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """``λ_D·(1 - σ(β·(x - z)))`` of a desirable response, ``λ_U·(1 - σ(β·(z - x)))`` of
    another, ``x = log(π(y)/π_ref(y))``; mean over responses (eq. 7).

    The preferences are unpaired: ``advantages`` are the labels, one per sequence,
    desirable where above 0. It needs ``ref_per_token_logps``. ``kl`` is z, a number or
    a 0-d tensor, from ``preference.kto_baseline`` and the batch's mismatched pairs.
    ``kl=0`` is TRL's ``apo_zero_unpaired``.

    It follows TRL's ``KTOTrainer`` (``desirable_weight`` and ``undesirable_weight`` are
    its names), whose mean includes every response. A response
    without valid tokens adds 0 and counts in the mean.
    """
    rule = Kto(
        beta=beta, kl=kl, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    return PolicyLossSpec(surrogate=rule, ratio=_against_reference(), reduction=SequenceMean())
