"""Methods that do not read advantages: shapes of the cross-entropy, and unlearning.

Call ``policy_loss(..., advantages=None, spec=...)``.
"""

from __future__ import annotations

import math
from typing import Annotated

from .._core.catalogue.registry import published
from .._core.ranges import Interval, NonNegative, Number, Positive
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import BatchMeanRatio, Ratio, SequenceRatio
from .._core.spec.reduction import Reduction, SequenceMean, TokenMean
from ..errors import InvalidCall
from ..rules.likelihood import NLL, NPO, CompSum, LikelihoodAscent, MarginNLL
from ..weights.probability import CurrentAdvantageReweighting, SignWeight
from .penalties import is_zero

#: Weights that select the examples to forget, and those to retain, by the sign of a
#: label.
_LABELS = SignWeight(positive=0.0, negative=1.0), SignWeight(positive=1.0, negative=0.0)


@published("Supervised fine-tuning", arxiv="2304.07288")
def sft() -> PolicyLossSpec:
    """``-logp``, token mean: the cross-entropy, ``comp_sum(tau=1)``."""
    return PolicyLossSpec(surrogate=NLL())


@published(
    "Dynamic Fine-Tuning",
    paper="On the Generalization of SFT: A Reinforcement Learning Perspective with Reward "
    "Rectification",
    arxiv="2508.05629",
    certainty="secondary",
)
def dft() -> PolicyLossSpec:
    """``-sg(p)·logp``, token mean.

    This is the cross-entropy without the weight ``1/p`` that its gradient has relative
    to a policy gradient.
    """
    return PolicyLossSpec(surrogate=NLL(), weights=(CurrentAdvantageReweighting(alpha=1.0),))


@published(
    "Comp-sum losses",
    arxiv="2304.07288",
    certainty="secondary",
    example={"tau": 1.5},
)
def comp_sum(tau: NonNegative[Number]) -> PolicyLossSpec:
    """``(p^(τ-1) - 1)/(1-τ)``, token mean: τ = 0 sum-exponential, 1 cross-entropy, (1,
    2) generalised cross-entropy, 2 mean absolute error.

    Equal to the paper's ``Φ_τ(Σ_{v≠y} exp(z_v - z_y))``, since that sum is ``1/p - 1``.
    """
    return PolicyLossSpec(surrogate=CompSum(tau=tau))


@published(
    "Generalized Cross Entropy",
    paper="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    arxiv="1805.07836",
)
def gce(q: Annotated[float, Interval("(0, 1]")] = 0.7) -> PolicyLossSpec:
    """``(1 - p^q)/q``, token mean: the gradient of the cross-entropy times ``p^q``, so
    that unlikely (noisy) targets count less.
    """
    return PolicyLossSpec(surrogate=CompSum(tau=1 + q))


@published(
    "Mean absolute error",
    arxiv="2304.07288",
    certainty="secondary",
)
def mae() -> PolicyLossSpec:
    """``1 - p``, token mean: ``comp_sum(tau=2)``, half the absolute distance of the
    one-hot target to the distribution.
    """
    return PolicyLossSpec(surrogate=CompSum(tau=2.0))


@published(
    "Label-Distribution-Aware Margin loss",
    arxiv="1906.07413",
    example={"margin": 0.5},
)
def ldam(margin: NonNegative[Number]) -> PolicyLossSpec:
    """``log(1 + (1/p - 1)·e^Δ)``, token mean: the cross-entropy of logits whose target
    is Δ lower.

    ``margin`` is a number (one pass), or one per token, ``C / n_y^(1/4)`` of the
    target's class frequency (two passes). The authors' code first scales the logits by
    30: use ``temperature=1/30`` and the margin times 30. Up to a constant ``-log V`` it
    is LDR (arXiv:2112.14869) at λ = 1 with margin Δ.
    """
    return PolicyLossSpec(surrogate=MarginNLL(margin=margin))


@published("Gradient ascent (unlearning)", arxiv="2410.17509")
def gradient_ascent() -> PolicyLossSpec:
    """``logp``, token mean over the tokens to forget: minus their cross-entropy. It is
    unbounded below.
    """
    return PolicyLossSpec(surrogate=LikelihoodAscent())


@published("Gradient difference (unlearning)", arxiv="2410.17509", example={"gamma": 1.0})
def grad_diff(gamma: NonNegative[Number]) -> PolicyLossSpec:
    """``-NLL(forget) + γ·NLL(retain)``, each the mean over its own tokens, for one
    batch with both.

    ``advantages`` are the labels, one per sequence or token: negative to forget,
    positive to retain. The paper's two batches in two calls are ``gradient_ascent()``
    and ``sft()`` with ``loss_scale=γ``. WAGLE itself is a mask of parameters and not
    part of the loss.
    """
    forget, retain = _LABELS
    return PolicyLossSpec(
        surrogate=LikelihoodAscent(),
        penalties=(Penalty(NLL(), gamma, TokenMean(weight=retain)),),
        reduction=TokenMean(weight=forget),
    )


@published(
    "Negative Preference Optimization",
    paper="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
    arxiv="2404.05868",
    certainty="secondary",
)
def npo(
    beta: Positive[Number] = 0.1, gamma: NonNegative[Number] = 0.0, level: str = "sequence"
) -> PolicyLossSpec:
    """``-(2/β)·log σ(-β·log(π/π_ref))``, the log-ratio summed over the sequence, mean
    over sequences to forget. Needs ``ref_per_token_logps``.

    ``gamma`` adds ``γ·NLL(retain)``, the mean over the tokens to retain, for one batch
    with both. ``advantages`` are then the labels, one per sequence: negative to forget,
    positive to retain. The first mean is over the sequences to forget. With ``gamma=0``
    every sequence is one to forget.

    ``level="batch"`` is the form of WAGLE's code (arXiv:2410.17509): one log-ratio, the
    mean over all tokens to forget. For β → 0 the gradient is that of gradient ascent:
    of ``gradient_ascent()`` with ``level="batch"``, and on sequence sums otherwise.
    """
    if level not in ("sequence", "batch"):
        raise InvalidCall(
            f"npo: level is {level!r}, expected 'sequence' (the paper) or 'batch' (WAGLE's code)."
        )
    forget, retain = (None, None) if is_zero(gamma) else _LABELS
    ratio: Ratio = SequenceRatio(clamp=math.inf, against="ref", normalize=False)
    reduction: Reduction = SequenceMean(weight=forget)
    if level == "batch":
        ratio = BatchMeanRatio(clamp=math.inf, against="ref", negative_only=forget is not None)
        reduction = TokenMean(per_call=True, weight=forget)
    penalties = () if retain is None else (Penalty(NLL(), gamma, TokenMean(weight=retain)),)
    return PolicyLossSpec(
        surrogate=NPO(beta=beta), penalties=penalties, ratio=ratio, reduction=reduction
    )
