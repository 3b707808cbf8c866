"""Token weights: multipliers of loss terms. A weight that reads no ``batch`` is evaluated inside the one-pass kernel.

They multiply the *term*, not the advantage: the two differ for negative factors, and clip metrics must use the unweighted advantage.
"""

from .._core.rows.batch import BatchStatistics
from .covariance import TopCovariance
from .entropy import (
    DualLevelDownSampling,
    Entropy,
    HapoLower,
    HapoRedistribution,
    HapoUpper,
    SteerExponential,
    SteerLinear,
    TopEntropy,
    steer,
)
from .groups import Precomputed, confidence_mask, gtpo, tw_grpo
from .importance import (
    ForwardKLWeight,
    GeometricSequenceMask,
    JensenShannonWeight,
    MaskedImportance,
    OffPolicySequenceMask,
    SamplerSequenceMask,
    SequenceGamma,
    SequenceMaskedImportance,
    SequenceTruncatedImportance,
    TruncatedImportance,
    f_distill,
)
from .probability import (
    AdvantageReweighting,
    BalancedSigmoidReweighting,
    CurrentAdvantageReweighting,
    NegativeSigmoidReweighting,
    PositiveAdvantageReweighting,
    ProbabilityBand,
    ProbabilityInterval,
    ProbabilityQuantile,
    RewardRanked,
    SigmoidReweighting,
    SignWeight,
    TrainingSignalAnnealing,
    spo_probability_mask,
)
from .surprisal import StareState, SurprisalReweighting, stare_state, stare_update

__all__ = [
    "AdvantageReweighting",
    "BalancedSigmoidReweighting",
    "BatchStatistics",
    "CurrentAdvantageReweighting",
    "DualLevelDownSampling",
    "Entropy",
    "ForwardKLWeight",
    "GeometricSequenceMask",
    "HapoLower",
    "HapoRedistribution",
    "HapoUpper",
    "JensenShannonWeight",
    "MaskedImportance",
    "NegativeSigmoidReweighting",
    "OffPolicySequenceMask",
    "PositiveAdvantageReweighting",
    "Precomputed",
    "ProbabilityBand",
    "ProbabilityInterval",
    "ProbabilityQuantile",
    "RewardRanked",
    "SamplerSequenceMask",
    "SequenceGamma",
    "SequenceMaskedImportance",
    "SequenceTruncatedImportance",
    "SigmoidReweighting",
    "SignWeight",
    "StareState",
    "SteerExponential",
    "SteerLinear",
    "SurprisalReweighting",
    "TopCovariance",
    "TopEntropy",
    "TrainingSignalAnnealing",
    "TruncatedImportance",
    "confidence_mask",
    "f_distill",
    "gtpo",
    "spo_probability_mask",
    "stare_state",
    "stare_update",
    "steer",
    "tw_grpo",
]
