"""Estimators for the best of several attempts, for the likelihood of a correct one, and
for separate treatment of right and wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import Count, NonNegative
from .._core.rows.grouped import GroupKeywords, floats, grouped, is_correct
from .outcome import singletons

if TYPE_CHECKING:
    from typing_extensions import Unpack


@published(
    "Pass@k by the best response alone (verl's grpo_passk)",
    paper="Optimizing Language Models for Inference Time Objectives using Reinforcement Learning",
    arxiv="2503.19595",
    certainty="secondary",
    level="group",
)
def grpo_passk(
    rewards: Tensor,
    *,
    scale_rewards: bool = True,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r_1st - r_2nd) [/ (std_g + epsilon)]`` for the best response of a group
    (the first of equal ones), 0 for the others. ``[B] -> [B]``.

    ``std_g`` is unbiased. A group of one has advantage 0 (verl: an error).
    """
    g = grouped("grpo_passk", rewards, groups)
    # from the largest; of equal ones the first row comes first
    place = g.rank(-g.values)
    first, second = (g.sum(torch.where(place == k, g.values, 0)) for k in range(2))
    gap = torch.where((place == 0) & (g.size > 1), first - second, 0)
    return g.result(gap / (g.std(g.values) + epsilon) if scale_rewards else gap)


@published(
    "Pass@k Training: analytical advantage",
    paper="Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large "
    "Reasoning Models",
    arxiv="2508.10751",
    level="group",
)
def passk_training(
    correct: Tensor,
    *,
    k: Count[int],
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """The share of each response in the reward "one of k is right", over all choices of
    k of the group's n. ``[B] -> [B]``.

    ``ρ = 1 - C(n-c, k)/C(n, k)`` with ``c`` correct responses of n,
    ``σ = sqrt(ρ(1-ρ))``; ``A = (1-ρ)/(σ + epsilon)`` of a correct one and
    ``(1 - ρ - C(n-c-1, k-1)/C(n-1, k-1))/(σ + epsilon)`` of a wrong one. ``k = 1`` is
    GRPO's advantage for 0/1 rewards, by the population deviation. A group of fewer than
    k responses has advantage 0.
    """
    g = grouped("passk_training", correct, groups, name="correct")
    right = is_correct("passk_training", "correct", g.values)
    n = g.size
    wrong = n - g.sum(right.to(n.dtype))
    fail, fail_with = torch.ones_like(n), torch.ones_like(n)
    # C(w, k)/C(n, k) = Π (w - j)/(n - j); of the k - 1 beside a wrong one, of w - 1 and
    # n - 1
    for j in range(k):
        fail = fail * (wrong - j).clamp(min=0) / (n - j).clamp(min=1)
        if j > 0:
            fail_with = fail_with * (wrong - j).clamp(min=0) / (n - j).clamp(min=1)
    deviation = (fail * (1 - fail)).clamp(min=0).sqrt() + epsilon
    advantages = torch.where(right, fail, fail - fail_with) / deviation
    return g.result(torch.where(n >= k, advantages, 0))


@published(
    "Maximum likelihood RL (MaxRL)",
    paper="Maximum Likelihood Reinforcement Learning",
    arxiv="2602.02710",
    level="group",
)
def maxrl(
    rewards: Tensor,
    *,
    epsilon: NonNegative[float] = 1e-6,
    singleton: str = "zero",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r - mean_g) / (mean_g + epsilon)``. ``[B] -> [B]``.

    ``singleton``: what a group of one gets, ``"zero"`` or ``"reward"`` (SkyRL). Differs
    from the paper: the authors' code gives it its reward over ``epsilon``.
    """
    g = grouped("maxrl", rewards, groups)
    mean = g.mean(g.values)
    return singletons(g, g.centered / (mean + epsilon), singleton)


@published(
    "Positive and negative sample reinforcement (PSR, NSR, W-REINFORCE)",
    paper="The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning",
    arxiv="2506.01347",
    level="sequence",
)
def psr_nsr(
    correct: Tensor,
    *,
    positive_weight: NonNegative[float] = 0.1,
    negative_weight: NonNegative[float] = 1.0,
) -> Tensor:
    """``positive_weight`` for a correct response, ``-negative_weight`` for a wrong one;
    no baseline. ``[B] -> [B]``.

    The default is W-REINFORCE. NSR is ``positive_weight=0``, and PSR is
    ``positive_weight=1, negative_weight=0``. NaN marks a response without a score,
    which gets 0. The authors' loss is PPO's.
    """
    x = floats("psr_nsr", "correct", correct)
    right = is_correct("psr_nsr", "correct", x).to(x.dtype)
    return torch.where(x.isnan(), 0, positive_weight * right - negative_weight * (1 - right))
