"""Methods for data of an older policy. They bound or regularize the update without
PPO's clip, or weigh two older policies.
"""

from __future__ import annotations

import math

from .._core.catalogue.registry import published
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Positive, PositiveOrInf
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import SequenceRatio, TokenRatio
from .._core.spec.reduction import SequenceMean
from ..errors import InvalidCall
from ..rules.off_policy import DriftK2, Topr
from ..rules.surrogates import Clip, Reinforce
from ..weights.importance import MaskedImportance, TruncatedImportance
from .dro import Dro


@published(
    "Tapered Off-Policy REINFORCE",
    paper="Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs",
    arxiv="2503.14286",
    certainty="secondary",
)
def topr(level: str = "sequence", ratio_max: Positive[Number] = 1.0) -> PolicyLossSpec:
    """``-sg(w)·A·log π(y)``, summed over tokens, mean over sequences.

    ``w`` is 1 where ``A >= 0``, else the response's ratio, at most ``ratio_max`` (eq.
    8).

    A response with ``A < 0`` loses its weight as it becomes unlikely. One with
    ``A >= 0`` is imitated. ``level="token"`` is ROLL's form: every token's own ratio,
    token mean. The paper's rewards are 1 and -1 minus a baseline.
    """
    rule = Topr(ratio_max=ratio_max)
    if level == "token":
        return PolicyLossSpec(surrogate=rule)
    if level != "sequence":
        raise InvalidCall(
            f"topr: level is {level!r}, expected 'sequence' (the paper) or 'token' (ROLL)."
        )
    ratio, reduction = SequenceRatio(normalize=False), SequenceMean(per="token_sum")
    return PolicyLossSpec(surrogate=rule, ratio=ratio, reduction=reduction)


@published(
    "Online Policy Mirror Descent (Kimi k1.5)",
    paper="Kimi k1.5: Scaling Reinforcement Learning with LLMs",
    arxiv="2501.12599",
    certainty="secondary",
)
def kimi_opmd(tau: NonNegative[Number] = 0.1, level: str = "sequence") -> PolicyLossSpec:
    """``-A·log π(y) + τ/2·(log π(y) - log π_old(y))²`` of whole responses, mean over
    sequences (eq. 3); A is the reward less the group's mean.

    ``level="token"`` is ROLL's form, per token with a token mean, which is
    ``dro(beta=tau)``. τ is ROLL's default; the paper states none.
    """
    if level == "token":
        return PolicyLossSpec(surrogate=Dro(beta=tau), ratio=TokenRatio(clamp=math.inf))
    if level != "sequence":
        raise InvalidCall(
            f"kimi_opmd: level is {level!r}, expected 'sequence' (the paper) or 'token' (ROLL)."
        )
    return PolicyLossSpec(
        surrogate=Reinforce(),
        # the mean of a number that is repeated over the sequence's tokens
        penalties=(Penalty(DriftK2(), tau, SequenceMean()),),
        ratio=SequenceRatio(clamp=math.inf, normalize=False),
        reduction=SequenceMean(per="token_sum"),
    )


@published(
    "Decoupled PPO (AReaL)",
    paper="AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning",
    arxiv="2505.24298",
    certainty="secondary",
)
def decoupled_ppo(
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    ratio_max: PositiveOrInf[Number] = math.inf,
    mode: str = "truncate",
) -> PolicyLossSpec:
    """``-w·min(u·A, clip(u, 1-ε_low, 1+ε_high)·A)``, ``u = π/π_prox``,
    ``w = π_prox/π_behave``, token mean: PPO around a recent policy, data of an older
    one.

    ``old_per_token_logps`` are those of the proximal policy, and
    ``sampling_per_token_logps`` those of the policy that wrote the tokens. A ``w``
    above ``ratio_max`` is cut to it (``mode="truncate"``), or the token is dropped
    (``"mask"``, AReaL's ``behav_imp_weight_cap``). The paper's objective has no bound.
    """
    modes = {"truncate": TruncatedImportance, "mask": MaskedImportance}
    if mode not in modes:
        raise InvalidCall(f"decoupled_ppo: mode is {mode!r}, expected 'truncate' or 'mask'.")
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return PolicyLossSpec(surrogate=clip, weights=(modes[mode](ratio_max=ratio_max),))
