"""Token weights: multipliers of loss terms. A weight that reads no ``batch`` is evaluated inside the one-pass kernel.

They multiply the *term*, not the advantage: the two differ for negative factors, and clip metrics must use the unweighted advantage.
"""

from .._core.catalogue.registry import published_names
from .._core.rows.batch import BatchStatistics
from .covariance import ClipCov, TopCovariance
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
from .gates import BinaryKLGate, SequenceBinaryKLGate, SequenceTotalVariationGate, TotalVariationGate, divergence_gate
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
    "BinaryKLGate",
    "ClipCov",
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
    "SequenceBinaryKLGate",
    "SequenceGamma",
    "SequenceMaskedImportance",
    "SequenceTotalVariationGate",
    "SequenceTruncatedImportance",
    "SigmoidReweighting",
    "SignWeight",
    "StareState",
    "SteerExponential",
    "SteerLinear",
    "SurprisalReweighting",
    "TopCovariance",
    "TopEntropy",
    "TotalVariationGate",
    "TrainingSignalAnnealing",
    "TruncatedImportance",
    "confidence_mask",
    "divergence_gate",
    "f_distill",
    "gtpo",
    "spo_probability_mask",
    "stare_state",
    "stare_update",
    "steer",
    "tw_grpo",
]

__getattr__ = published_names("token_weight")
