"""Estimators that depend on the difficulty of a prompt, by the share of its correct
completions or with substitutes for missing ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import CountOrZero, NonNegative, Real
from .._core.rows.grouped import GroupKeywords, floats, grouped, is_correct, require, where_valid
from ..errors import InvalidCall
from .outcome import singletons

if TYPE_CHECKING:
    from typing_extensions import Unpack


@published(
    "GRPO-LEAD",
    arxiv="2504.09696",
    level="group",
)
def grpo_lead(
    rewards: Tensor,
    *,
    low: NonNegative[float] = 0.4,
    high: NonNegative[float] = 1.5,
    midpoint: Real[float] = 0.75,
    steepness: NonNegative[float] = 10.0,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """GRPO's advantage times a weight by difficulty. ``[B] -> [B]``.

    ``a = (r - mean_g)/(std_g + epsilon)``; ``q`` the share of positive rewards of the
    group; ``w(x) = low + (high - low)/(1 + e^(steepness (x - midpoint)))``;
    ``A = a·w(q)`` where ``a > 0``, else ``a·w(1 - q)``. The rewards are those of
    :func:`reweight_ops.rewards.grpo_lead_length`: positive for a correct completion,
    negative for a wrong one.

    Differs from the paper: a group of one has advantage 0; the authors' code keeps its
    reward.
    """
    g = grouped("grpo_lead", rewards, groups)
    a = g.centered / (g.std(g.values) + epsilon)
    share = g.mean((g.values > 0).to(a.dtype))

    def weight(x: Tensor) -> Tensor:
        return low + (high - low) * torch.sigmoid(-steepness * (x - midpoint))

    return g.result(a * torch.where(a > 0, weight(share), weight(1 - share)))


@published(
    "Mixed Advantage Policy Optimization (MAPO)",
    paper="MAPO: Mixed Advantage Policy Optimization",
    arxiv="2509.18849",
    level="group",
)
def mapo_mixed(
    rewards: Tensor,
    correct: Tensor,
    *,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (1 - λ)·(r - mean_g)/(std_g + epsilon) + λ·(r - mean_g)/(mean_g +
    epsilon)`` with ``λ = 1 - 4p(1 - p)``. ``[B], [B] -> [B]``.

    ``correct`` marks the right completions (nonzero), and ``p`` is their share of the
    group. The more certain a prompt is, the more the deviation counts in percent of the
    mean. Rewards must not be negative: a mean near 0 or below would make advantages
    very large or turn their sign (one correct of 8 with rewards of ±1 would get -0.23).

    Differs from the paper: ``correct`` is an argument; the authors' code tests
    ``r == 1``, which a format reward breaks.
    """
    g = grouped("mapo_mixed", rewards, groups)
    x = require(
        "mapo_mixed",
        g.values >= 0,
        "a reward is negative; the advantage in percent of the mean needs rewards >= 0.",
        g.centered,
    )
    p = g.mean(g.mask("correct", correct).to(x.dtype))
    certain = 1 - 4 * p * (1 - p)
    mean = g.mean(g.values)
    return g.result(
        (1 - certain) * x / (g.std(g.values) + epsilon) + certain * x / (mean + epsilon)
    )


@published(
    "Difficulty-prior advantage differentiation",
    paper="Unlocking the Potential of Difficulty Prior in RL-based Multimodal Reasoning",
    arxiv="2505.13261",
    certainty="derived",
    level="group",
)
def difficulty_prior(
    rewards: Tensor,
    correct: Tensor,
    *,
    slope: Real[float],
    normalize: bool = False,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r - mean_g)·exp(slope·(1 - p))`` with the share ``p`` of correct
    completions of the group: hard prompts count more. ``[B], [B] -> [B]``.

    Derived: the paper states no formula. Its review says that a steep exponential of
    the accuracy replaces the standard deviation and did best. ``slope`` is our choice,
    so it must be given. ``normalize`` divides the weights by their mean over the batch.
    The paper keeps only prompts with ``0.1 <= p <= 0.87``, which is a filter before
    this.
    """
    g = grouped("difficulty_prior", rewards, groups)
    weight = torch.exp(slope * (1 - g.mean(g.mask("correct", correct).to(g.values.dtype))))
    if normalize:
        weight = weight * g.scored.sum().clamp(min=1) / g.result(weight).sum()
    return g.result(g.centered * weight)


@published(
    "Negative-enhanced GRPO",
    arxiv="2509.18851",
    level="group",
)
def ngrpo(
    rewards: Tensor,
    *,
    max_reward: Real[float] = 1.0,
    num_virtual: CountOrZero[int] = 1,
    epsilon: NonNegative[float] = 1e-6,
    singleton: str = "reward",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """GRPO with ``num_virtual`` completions of ``max_reward`` added to the mean and the
    unbiased standard deviation. ``[B] -> [B]``.

    An all-wrong group therefore learns: at 0/1 rewards its advantage is
    ``-1/sqrt(G + 1)`` (-1/3 for G = 8, -0.447 for G = 4). A group whose rewards are all
    ``max_reward`` has advantage 0. ``singleton`` is the advantage of a group of one,
    ``"reward"`` (the authors' code: mean 0, standard deviation 1) or ``"zero"``. The
    loss is ``methods.ngrpo``. The authors leave out groups whose completions are all
    correct.
    """
    g = grouped("ngrpo", rewards, groups)
    count = g.size + num_virtual
    # measured from there, the virtual completions are zeros
    from_max = g.values - max_reward
    mean = g.sum(from_max) / count
    squares = g.sum((from_max - mean) ** 2) + num_virtual * mean**2
    scale = torch.where(g.size == 1, 1, (squares / (count - 1).clamp(min=1)).sqrt()) + epsilon
    return singletons(g, from_max - mean, singleton) / scale


@published(
    "Likelihood Estimation with Negative Samples",
    paper="Don't Waste Mistakes: Leveraging Negative RL-Groups via Confidence Reweighting",
    arxiv="2510.08696",
    level="group",
)
def lens(
    correct: Tensor,
    old_per_token_logps: Tensor,
    completion_mask: Tensor,
    *,
    importance: str = "length_normalized",
    negative_weight: NonNegative[float] = 0.25,
    epsilon: NonNegative[float] = 1e-4,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """Wrong answers are penalized by their confidence, so that all-wrong groups learn
    too. ``[B], [B, T], [B, T] -> [B]``.

    ``π_i = exp(mean_t logp)``; ``r~_i = 1`` if correct, else ``-(1/G)·π_i/(D - π_i)``;
    ``D = max(D_imp, 2·max_j π_j)`` with ``D_imp = G / sum_{i correct} 1/π(o_i)`` in a
    mixed group, and ``2·max_j π_j`` in an all-wrong one (so the fraction is at most 1).
    Mixed: ``A = (r~ - mean)/(std + epsilon)``. All wrong:
    ``A = negative_weight·(r~ - mean)``. All correct: ``r~`` is constant, ``A = 0``.

    ``importance`` selects the ``π(o_i)`` of ``D_imp``, which the paper leaves open.
    ``"length_normalized"`` is ``π_i``. ``"raw"`` is ``exp(sum_t logp)``, with which
    ``D_imp`` vanishes beside the other term for texts of any length.

    Differs from the paper: the paper does not state ``epsilon`` or the kind of standard
    deviation; this one is unbiased. All-correct groups are 0/0 there.
    """
    if importance not in ("length_normalized", "raw"):
        raise InvalidCall(
            f"lens: importance is {importance!r}, expected 'length_normalized' or 'raw'."
        )
    g = grouped("lens", correct, groups, name="correct")
    logps = floats("lens", "old_per_token_logps", old_per_token_logps)
    if logps.dim() != 2 or len(logps) != len(g.values):
        raise InvalidCall(
            f"lens: old_per_token_logps has shape {tuple(logps.shape)}, expected "
            f"({len(g.values)}, T)."
        )
    valid = where_valid("lens", completion_mask, logps)
    total = torch.where(valid, logps, 0).sum(-1)
    mean_logp = total / valid.sum(-1).clamp(min=1)
    right = is_correct("lens", "correct", g.values)
    likelihood = mean_logp.exp().to(g.values.dtype)
    # In logs: 1/π of a whole text overflows.
    weights = torch.where(
        right,
        -(mean_logp if importance == "length_normalized" else total).to(g.values.dtype),
        -math.inf,
    )
    largest = g.max(weights)
    base = torch.where(largest.isneginf(), 0, largest)
    # -inf without a correct completion
    log_sum = base + g.sum(torch.where(right, (weights - base).exp(), 0)).log()
    some = g.max(right.to(g.values.dtype)) > 0
    by_correct = torch.where(some, (g.size.log() - log_sum).exp(), 0)
    denominator = torch.maximum(by_correct, 2 * g.max(likelihood))
    r = torch.where(right, 1.0, -likelihood / (g.size * (denominator - likelihood)))
    r = torch.where(g.scored, r, 0).to(g.values.dtype)
    centered = r - g.mean(r)
    return g.result(torch.where(some, centered / (g.std(r) + epsilon), negative_weight * centered))
