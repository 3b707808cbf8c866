"""Methods for data of an older policy: they bound or regularize the update without PPO's clip, or weigh two older policies."""

from __future__ import annotations

import math
from typing import Any

from .._core.catalogue.registry import published
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import TokenRatio
from ..rules.off_policy import DppoKL, Dro


@published(
    "dppo_kl",
    "Divergence PPO, binary KL",
    paper="Rethinking the Trust Region in LLM Reinforcement Learning",
    arxiv="2602.04879",
    certainty="secondary",
)
def dppo_kl(divergence_low: Any = 0.2, divergence_high: Any = 0.2, ratio_max: Any = 20.0) -> PolicyLossSpec:
    """``dppo_tv`` with the binary KL, ``q·log(q/p) + (1-q)·log((1-q)/(1-p))`` of ``q = p_old``, as the distance that a token may move; token mean.

    Differs from the paper: after verl's implementation (``dppo_kl``), whose ``clip_ratio`` of 0.2 the default bounds are.
    """
    rule = DppoKL(divergence_low=divergence_low, divergence_high=divergence_high, ratio_max=ratio_max)
    return PolicyLossSpec(surrogate=rule, name="dppo_kl")


@published(
    "dro",
    "Direct Reward Optimisation, quadratic",
    paper="Offline Regularised Reinforcement Learning for Large Language Models Alignment",
    arxiv="2405.19107",
    certainty="secondary",
    example={"beta": 0.1},
)
def dro(beta: Any) -> PolicyLossSpec:
    """``-A·logp + β/2·(logp - old_logp)²``, token mean. ``beta``: verl and Tinker state no default.

    Differs from the paper: after verl's ``dro``, which is per token. The paper has the square ``½·(r - V - β·log(π/π_ref))²`` of whole responses with a
    learned V: the same gradient over β, for A = r - V and the old policy as the reference.
    """
    return PolicyLossSpec(surrogate=Dro(beta=beta), ratio=TokenRatio(clamp=math.inf), name="dro")
