"""Methods whose importance ratio is one number a sequence."""

from __future__ import annotations

from typing import Any

from ..ratio import SequenceRatio
from ..reduction import SequenceMean
from ..rules.surrogates import Clip
from ..spec import PolicyLossSpec
from .parts import kl
from .registry import published


@published("gspo", "Group Sequence Policy Optimization", paper="Group Sequence Policy Optimization", arxiv="2507.18071")
def gspo(epsilon_low: Any = 3e-4, epsilon_high: Any = 4e-4, beta: Any = 0.0) -> PolicyLossSpec:
    """Clip of the length-normalised sequence ratio, mean over sequences (eq. 5 and 7); clip bounds of section 5.1."""
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, penalties=kl(beta), ratio=SequenceRatio(), reduction=SequenceMean(), name="gspo")


@published("gspo_token", "GSPO, token-level variant", paper="Group Sequence Policy Optimization", arxiv="2507.18071")
def gspo_token(epsilon_low: Any = 3e-4, epsilon_high: Any = 4e-4, beta: Any = 0.0) -> PolicyLossSpec:
    """GSPO with each token's own gradient, so that advantages may differ inside a sequence (eq. 13 and 14)."""
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    ratio = SequenceRatio(gradient="token")
    return PolicyLossSpec(surrogate=clip, penalties=kl(beta), ratio=ratio, reduction=SequenceMean(), name="gspo_token")


@published(
    "luspo",
    "Length-Unbiased Sequence Policy Optimization",
    paper="Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
    arxiv="2602.05261",
    certainty="secondary",
)
def luspo(epsilon_low: Any = 3e-4, epsilon_high: Any = 4e-4, beta: Any = 0.0) -> PolicyLossSpec:
    """GSPO with each sequence's loss times its length: the sum over tokens, mean over sequences.

    Differs from the paper: transcribed from TRL's ``loss_type="luspo"``; default bounds are GSPO's.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    reduction = SequenceMean(per="token_sum")
    return PolicyLossSpec(surrogate=clip, penalties=kl(beta), ratio=SequenceRatio(), reduction=reduction, name="luspo")
