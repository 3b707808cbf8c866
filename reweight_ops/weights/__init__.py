"""Token weights: factors of loss terms. A weight that does not read ``batch`` is
evaluated inside the one-pass kernel.

They multiply the *term*, not the advantage. The two differ for negative factors, and
clip metrics must use the unweighted advantage.
"""

from .._core.catalogue.search import published_names
from .._core.rows.batch import BatchStatistics
from .covariance import ClipCov, TopCovariance
from .credit import (
    FutureInfluence,
    NegativeSelfDistilledEvidence,
    PrefixDiscrepancy,
    SelfDistilledEvidence,
    SpuriousTokens,
    TokenRegulation,
)
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
from .gates import (
    BinaryKLGate,
    SequenceBinaryKLGate,
    SequenceTotalVariationGate,
    TotalVariationGate,
    divergence_gate,
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
from .trust import (
    MaxK2Mask,
    MaxK3Mask,
    MaxTotalVariationMask,
    PositionBound,
    ProbabilityDistanceMask,
    ProbabilityDriftMask,
    SecondMomentLower,
    SecondMomentMask,
    SecondMomentUpper,
    trm,
)

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
    "FutureInfluence",
    "GeometricSequenceMask",
    "HapoLower",
    "HapoRedistribution",
    "HapoUpper",
    "JensenShannonWeight",
    "MaskedImportance",
    "MaxK2Mask",
    "MaxK3Mask",
    "MaxTotalVariationMask",
    "NegativeSelfDistilledEvidence",
    "NegativeSigmoidReweighting",
    "OffPolicySequenceMask",
    "PositionBound",
    "PositiveAdvantageReweighting",
    "Precomputed",
    "PrefixDiscrepancy",
    "ProbabilityBand",
    "ProbabilityDistanceMask",
    "ProbabilityDriftMask",
    "ProbabilityInterval",
    "ProbabilityQuantile",
    "RewardRanked",
    "SamplerSequenceMask",
    "SecondMomentLower",
    "SecondMomentMask",
    "SecondMomentUpper",
    "SelfDistilledEvidence",
    "SequenceBinaryKLGate",
    "SequenceGamma",
    "SequenceMaskedImportance",
    "SequenceTotalVariationGate",
    "SequenceTruncatedImportance",
    "SigmoidReweighting",
    "SignWeight",
    "SpuriousTokens",
    "StareState",
    "SteerExponential",
    "SteerLinear",
    "SurprisalReweighting",
    "TokenRegulation",
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
    "trm",
    "tw_grpo",
]

__getattr__ = published_names("token_weight")
