"""Reweighted policy losses for LLM reinforcement learning, straight from vocabulary-sized logits. Start at :func:`policy_loss`."""

from . import advantages, divergences, kernels, methods, objectives, preference, rewards, rules, sample_weights, schedules, weights
from .backends.select import NAMES as BACKENDS
from .coupling import Constraint, GroupContrast
from .divergences import DistillationLossOutput, distillation_loss, token_divergence
from .errors import BackendUnavailable, InvalidCall, ReweightOpsError, UnsupportedRequest
from .explain import Explanation, explain
from .linear import Lora, linear_policy_loss, linear_token_logps
from .methods.registry import METHODS, method
from .metrics import Metrics
from .output import PolicyLossOutput, TokenStats
from .policy_loss import policy_loss, policy_loss_from_logps, token_logps, token_stats
from .preference import PairSpec, PreferenceLossOutput, linear_preference_loss, preference_loss, preference_loss_from_logps
from .ratio import CenteredRatio, GeometricMeanRatio, Ratio, SegmentRatio, SequenceRatio, TokenRatio
from .reduction import FromFunction, NoReduction, Reduction, SequenceMean, TokenMean, TokenSum
from .rules.base import Rule, TokenWeight, rule, weight
from .spec import Penalty, PolicyLossSpec

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "METHODS",
    "BackendUnavailable",
    "CenteredRatio",
    "Constraint",
    "DistillationLossOutput",
    "Explanation",
    "FromFunction",
    "GeometricMeanRatio",
    "GroupContrast",
    "InvalidCall",
    "Lora",
    "Metrics",
    "NoReduction",
    "PairSpec",
    "Penalty",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "PreferenceLossOutput",
    "Ratio",
    "Reduction",
    "ReweightOpsError",
    "Rule",
    "SegmentRatio",
    "SequenceMean",
    "SequenceRatio",
    "TokenMean",
    "TokenRatio",
    "TokenStats",
    "TokenSum",
    "TokenWeight",
    "UnsupportedRequest",
    "advantages",
    "distillation_loss",
    "divergences",
    "explain",
    "kernels",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_token_logps",
    "method",
    "methods",
    "objectives",
    "policy_loss",
    "policy_loss_from_logps",
    "preference",
    "preference_loss",
    "preference_loss_from_logps",
    "rewards",
    "rule",
    "rules",
    "sample_weights",
    "schedules",
    "token_divergence",
    "token_logps",
    "token_stats",
    "weight",
    "weights",
]
