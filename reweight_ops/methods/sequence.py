"""Methods with one importance ratio, or weight, per sequence."""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Real
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import GeometricMeanRatio, SequenceRatio
from .._core.spec.reduction import SequenceMean
from ..errors import InvalidCall
from ..rules.surrogates import Clip, Reinforce, Unclipped
from ..weights.importance import OffPolicySequenceMask, SamplerSequenceMask, SequenceGamma
from .penalties import kl


@published("Group Sequence Policy Optimization", arxiv="2507.18071")
def gspo(
    epsilon_low: NonNegativeOrInf[Number] = 3e-4,
    epsilon_high: NonNegativeOrInf[Number] = 4e-4,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip of the length-normalised sequence ratio, mean over sequences (eq. 5 and 7);
    clip bounds of section 5.1.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(
        surrogate=clip, penalties=kl(beta), ratio=SequenceRatio(), reduction=SequenceMean()
    )


@published("GSPO, token-level variant", arxiv="2507.18071")
def gspo_token(
    epsilon_low: NonNegativeOrInf[Number] = 3e-4,
    epsilon_high: NonNegativeOrInf[Number] = 4e-4,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """GSPO with each token's own gradient, so that advantages may differ inside a
    sequence (eq. 13 and 14).
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    ratio = SequenceRatio(gradient="token")
    return PolicyLossSpec(surrogate=clip, penalties=kl(beta), ratio=ratio, reduction=SequenceMean())


@published(
    "Length-Unbiased Sequence Policy Optimization",
    paper="Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response "
    "Length Variation in RLVR",
    arxiv="2602.05261",
    certainty="secondary",
)
def luspo(
    epsilon_low: NonNegativeOrInf[Number] = 3e-4,
    epsilon_high: NonNegativeOrInf[Number] = 4e-4,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """GSPO with each sequence's loss times its length: the sum over tokens, then the
    mean over sequences.

    Differs from the paper: transcribed from TRL's ``loss_type="luspo"``. The default
    bounds are GSPO's.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    reduction = SequenceMean(per="token_sum")
    return PolicyLossSpec(
        surrogate=clip, penalties=kl(beta), ratio=SequenceRatio(), reduction=reduction
    )


@published(
    "Geometric-Mean Policy Optimization",
    paper="Geometric-Mean Policy Optimization",
    arxiv="2507.20673",
)
def gmpo(
    epsilon_low: NonNegativeOrInf[Number] = 0.4,
    epsilon_high: NonNegativeOrInf[Number] = 0.4,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """``-A·(Π_t r_t)^(1/L)``, each ``log r_t`` clipped to ``[-ε_low, ε_high]`` on the
    side that its advantage pushes to; mean over sequences.

    The bounds are in log space: ratios of ``e^±0.4``. The paper's A belongs to the
    sequence. For tokens of different signs the geometric mean is undefined, so a tensor
    with one advantage per token is an error (TRL's ``GMPOTrainer`` takes one per
    sequence; verl's ``geo_mean`` says that it supports no other).
    """
    ratio = GeometricMeanRatio(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(
        surrogate=Unclipped(), penalties=kl(beta), ratio=ratio, reduction=SequenceMean()
    )


@published(
    "Variational Sequence-level Soft Policy Optimization",
    paper="VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM "
    "Training",
    arxiv="2602.10693",
    certainty="secondary",
    level="sequence",
)
def vespo(
    k_pos: NonNegative[Number] = 2.0,
    lambda_pos: NonNegative[Number] = 3.0,
    k_neg: NonNegative[Number] = 3.0,
    lambda_neg: NonNegative[Number] = 2.0,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """``-sg(W^k·exp(λ(1 - W)))·A·logp``, token mean, with W the product of the
    sequence's token ratios, and k, λ by the sign of A.

    To measure W against the sampler (staleness and mismatch together), pass its
    log-probs as ``old_per_token_logps``.
    Differs from the paper: transcribed from TRL's ``loss_type="vespo"``, whose clamps
    of log W it has.
    """
    gamma = SequenceGamma(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
    return PolicyLossSpec(surrogate=Reinforce(), penalties=kl(beta), weights=(gamma,))


@published(
    "Off-Policy Sequence Masking",
    paper="DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
    arxiv="2512.02556",
    certainty="secondary",
    level="sequence",
    example={"threshold": 0.5},
)
def opsm(
    threshold: Real[Number],
    against: str = "old",
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    beta: NonNegative[Number] = 0.0,
) -> PolicyLossSpec:
    """GRPO without the sequences that have a negative advantage and have drifted: mean
    of ``old_logp - logp`` above ``threshold`` (eq. 9).

    ``against="sampler"`` measures the drift from ``sampling_per_token_logps``. The
    masked tokens stay in the denominator, and a KL penalty acts on them as on all
    (TRL's ``off_policy_mask_threshold``, which it documents with 0.5; the paper states
    no value).
    """
    masks = {"old": OffPolicySequenceMask, "sampler": SamplerSequenceMask}
    if against not in masks:
        raise InvalidCall(f"opsm: against is {against!r}, expected 'old' or 'sampler'.")
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    mask = masks[against](threshold=threshold)
    return PolicyLossSpec(
        surrogate=clip, penalties=kl(beta), weights=(mask,), reduction=SequenceMean()
    )
