"""Reweighted policy losses for LLM reinforcement learning, straight from
vocabulary-sized logits. Start at :func:`policy_loss`.
"""

import sys as _sys
import warnings as _warnings
from typing import TYPE_CHECKING as _TYPE_CHECKING

# PyTorch warns at its import if there is no numpy; nothing here needs numpy
with _warnings.catch_warnings():
    _warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from . import (
    advantages,
    divergences,
    kernels,
    methods,
    objectives,
    preference,
    recipes,
    rewards,
    rules,
    sample_weights,
    schedules,
    weights,
)
from ._core import moved as _moved
from ._core.backends.select import NAMES as BACKENDS
from ._core.calls.keywords import HiddenLogits, Lora, Teacher, TopKLogps
from ._core.calls.sampling_mask import SamplingMask
from ._core.calls.specs import METHODS, method
from ._core.catalogue.lookup import recipe
from ._core.catalogue.recipes import Recipe
from ._core.catalogue.search import find
from ._core.catalogue.surface import complete as _complete
from ._core.engine.metrics import Metrics
from ._core.engine.output import PolicyLossOutput, TokenStats
from ._core.formula.base import Rule, TokenWeight, rule, weight
from ._core.losses.explain import PREPARED as _OPS
from ._core.losses.explain import Explanation, explain
from ._core.losses.linear import linear_policy_loss, linear_token_logps, linear_token_stats
from ._core.losses.linear_distillation import linear_distillation_loss, linear_token_divergence
from ._core.losses.policy import policy_loss, policy_loss_from_logps
from ._core.losses.statistics import token_logps, token_stats
from ._core.names import renamed as _renamed
from ._core.spec.coupled import GroupClassification, GroupContrast, HingeConstraint
from ._core.spec.policy import Penalty, PolicyLossSpec
from ._core.spec.ratio import (
    BatchMeanRatio,
    CenteredRatio,
    CumulativeRatio,
    GeometricMeanRatio,
    Ratio,
    SegmentRatio,
    SequenceRatio,
    TokenRatio,
)
from ._core.spec.reduction import (
    FromFunction,
    NoReduction,
    PromptMean,
    Reduction,
    SequenceMean,
    TokenMean,
    TokenSum,
)
from .divergences import DistillationLossOutput, distillation_loss, token_divergence
from .errors import BackendUnavailable, InvalidCall, ReweightOpsError, UnsupportedRequest
from .nn import FusedLinearLogProbs, FusedLinearPolicyLoss
from .preference import (
    PairSpec,
    PreferenceLossOutput,
    linear_preference_loss,
    preference_loss,
    preference_loss_from_logps,
)

__version__ = "0.1.0"

_moved.install()

if not _TYPE_CHECKING:  # which would take any name for one
    __getattr__ = _renamed(__name__, {"Constraint": "HingeConstraint"})

__all__ = [
    "BACKENDS",
    "METHODS",
    "BackendUnavailable",
    "BatchMeanRatio",
    "CenteredRatio",
    "CumulativeRatio",
    "DistillationLossOutput",
    "Explanation",
    "FromFunction",
    "FusedLinearLogProbs",
    "FusedLinearPolicyLoss",
    "GeometricMeanRatio",
    "GroupClassification",
    "GroupContrast",
    "HiddenLogits",
    "HingeConstraint",
    "InvalidCall",
    "Lora",
    "Metrics",
    "NoReduction",
    "PairSpec",
    "Penalty",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "PreferenceLossOutput",
    "PromptMean",
    "Ratio",
    "Recipe",
    "Reduction",
    "ReweightOpsError",
    "Rule",
    "SamplingMask",
    "SegmentRatio",
    "SequenceMean",
    "SequenceRatio",
    "Teacher",
    "TokenMean",
    "TokenRatio",
    "TokenStats",
    "TokenSum",
    "TokenWeight",
    "TopKLogps",
    "UnsupportedRequest",
    "advantages",
    "distillation_loss",
    "divergences",
    "explain",
    "find",
    "kernels",
    "linear_distillation_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_token_divergence",
    "linear_token_logps",
    "linear_token_stats",
    "method",
    "methods",
    "objectives",
    "policy_loss",
    "policy_loss_from_logps",
    "preference",
    "preference_loss",
    "preference_loss_from_logps",
    "recipe",
    "recipes",
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

for _module in (
    advantages,
    divergences,
    methods,
    objectives,
    preference,
    rewards,
    sample_weights,
    schedules,
    weights,
    _sys.modules[__name__],
):
    _complete(_module, _OPS)


def __dir__() -> list[str]:
    """Return the public names. Names that the package's modules import are not among
    them.
    """
    return sorted([*__all__, "__version__"])
