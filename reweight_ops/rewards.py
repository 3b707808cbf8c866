"""Reward transforms: several rewards into one, and rewards that depend on lengths or on
the group.

All are pure functions from rewards to rewards. ``[B]`` is one value per completion, and
``[B, K]`` one for each of K reward models (TRL's ``rewards_per_func``). Groups are as
in :mod:`reweight_ops._core.rows.grouped`. Tensors are fp32 or fp64 and detached. A NaN
in ``[B, K]`` is a reward that does not apply to its completion, and it is left out. A
completion without any reward, and a NaN in ``[B]``, stays NaN. The advantages of this
package read it as a completion without a score.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._core.catalogue.registry import published
from ._core.catalogue.search import published_names
from ._core.ranges import NonNegative, Positive, Real, Unit
from ._core.rows.grouped import GroupKeywords, floats, grouped, is_correct, require
from .errors import InvalidCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "grpo_lambda_length",
    "grpo_lead_length",
    "harmonic_mean",
    "lsc",
    "soft_multi_choice",
    "traac",
    "trust_grpo",
    "uwo",
    "wco",
    "weighted_mean",
    "weighted_sum",
]


def _members(op: str, rewards: Tensor) -> Tensor:
    x = floats(op, "rewards", rewards)
    if x.dim() != 2 or not x.shape[1]:
        raise InvalidCall(
            f"{op}: rewards has shape {tuple(x.shape)}, expected (B, K): K rewards per completion."
        )
    return x


def _weights(op: str, weights: Tensor | None, x: Tensor) -> Tensor:
    """Return ``[B, K]`` weights, 0 where the reward is NaN. Each row sums to 1."""
    w = (
        x.new_ones(x.shape[1])
        if weights is None
        else floats(op, "weights", weights, (x.shape[1],)).to(x.dtype)
    )
    w = require(op, w >= 0, "a weight is negative.", w)
    present = torch.where(x.isnan(), 0, w)
    total = present.sum(1, keepdim=True)
    return torch.where(total > 0, present / torch.where(total > 0, total, 1), torch.nan)


@published("Worst-Case Optimization", arxiv="2310.02743", level="sequence")
def wco(rewards: Tensor) -> Tensor:
    """``r = min_k r_k``: the lowest of an ensemble's rewards. ``[B, K] -> [B]``."""
    x = _members("wco", rewards)
    least = torch.where(x.isnan(), math.inf, x).amin(1)
    return torch.where(x.isnan().all(1), torch.nan, least)


@published("Uncertainty-Weighted Optimization", arxiv="2310.02743", level="sequence")
def uwo(rewards: Tensor, *, coef: NonNegative[float] = 0.1) -> Tensor:
    """``r = mean_k r_k - coef·var_k r_k`` with the unbiased variance over an ensemble
    (0 for one member). ``[B, K] -> [B]``.

    ``coef`` is λ: 0.1 in the authors' PPO configuration, 0.5 in the one of best-of-n.
    """
    x = _members("uwo", rewards)
    mean = x.nanmean(1, keepdim=True)
    squares = ((x - mean) ** 2).nansum(1)
    return mean.squeeze(1) - coef * squares / ((~x.isnan()).sum(1) - 1).clamp(min=1)


@published(
    "Log-sigmoid-centered transform",
    paper="Transforming and Combining Rewards for Aligning Large Language Models",
    arxiv="2402.00742",
    certainty="secondary",
    level="sequence",
)
def lsc(rewards: Tensor, reference: Real[Tensor | float]) -> Tensor:
    """``u = log sigmoid(r - r_ref)``; several rewards are summed, so that ``exp(u)`` is
    the probability that all are good. ``[B]`` or ``[B, K] -> [B]``.

    ``reference`` is the reward of a completion that is just good enough for its prompt:
    a number, or a tensor of the shape of ``rewards``. It was not found which statistic
    the paper takes, so it must be given (a quantile of the initial policy's rewards on
    the prompt is a common reading).
    """
    x = floats("lsc", "rewards", rewards)
    if x.dim() not in (1, 2):
        raise InvalidCall(f"lsc: rewards has shape {tuple(x.shape)}, expected (B,) or (B, K).")
    if isinstance(reference, Tensor) and reference.dim():
        reference = floats("lsc", "reference", reference, x).to(x.dtype)
    u = torch.nn.functional.logsigmoid(x - reference)
    return u if x.dim() == 1 else torch.where(x.isnan().all(1), torch.nan, u.nansum(1))


def weighted_sum(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """``r = sum_k w_k r_k`` over the rewards that apply. ``[B, K], [K] -> [B]``.

    This is TRL's sum of reward functions with ``reward_weights``. Weights are 1 by
    default.
    """
    x = _members("weighted_sum", rewards)
    w = (
        x.new_ones(x.shape[1])
        if weights is None
        else floats("weighted_sum", "weights", weights, (x.shape[1],)).to(x.dtype)
    )
    return torch.where(x.isnan().all(1), torch.nan, (w * x).nansum(1))


@published("Weighted mean of rewards", arxiv="2406.03363", level="sequence")
def weighted_mean(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """``r = sum_k w_k r_k / sum_k w_k`` over the rewards that apply.
    ``[B, K], [K] -> [B]``; weights are equal by default and not negative.
    """
    x = _members("weighted_mean", rewards)
    return (_weights("weighted_mean", weights, x) * x.nan_to_num(0, math.inf, -math.inf)).sum(1)


@published("Weighted harmonic mean of rewards", arxiv="2406.03363", level="sequence")
def harmonic_mean(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """``r = sum_k w_k / sum_k (w_k / r_k)``: near the least of the rewards, so none can
    be traded away. ``[B, K], [K] -> [B]``.

    ``weights`` has one per reward, equal by default. Rewards must not be negative. A
    reward of 0 makes the result 0. The released script contains this form but runs the
    weighted sum.
    """
    x = _members("harmonic_mean", rewards)
    x = require(
        "harmonic_mean",
        (x >= 0) | x.isnan(),
        "a reward is negative; a harmonic mean needs rewards >= 0.",
        x,
    )
    w = _weights("harmonic_mean", weights, x)
    return 1 / torch.where(w == 0, 0, w / torch.where(x.isnan(), 1, x)).sum(1)


@published(
    "Trust-GRPO: thinking reward by trust",
    paper="SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward",
    arxiv="2505.17018",
    level="group",
)
def trust_grpo(
    outcome_rewards: Tensor,
    thinking_rewards: Tensor,
    *,
    step: NonNegative[int | Tensor],
    total_steps: Positive[int | Tensor],
    coef: NonNegative[float] = 0.3,
    threshold: Real[float] = 0.5,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``r = r_outcome + γ·coef·e^(-step/total_steps)·r_thinking`` (eq. 1 to 5).
    ``[B], [B] -> [B]``.

    The group's trust γ compares the mean thinking rewards ``μ_c`` of the answers with
    ``r_outcome >= threshold`` and ``μ_w`` of the others. It is 1 if ``μ_c >= μ_w``,
    else ``e^(μ_c - μ_w)``. It is also 1 if one of the two sets is empty.
    ``total_steps`` are those of the training (1500 in the paper). Steps may be 0-d
    tensors.

    Differs from the paper: the released code asks for the thinking reward only where
    ``r_outcome >= 0.2``, drops it in groups that are all above 0.9 or all below 0.1,
    and anneals over 500 steps. Here the caller makes these choices.
    """
    g = grouped("trust_grpo", outcome_rewards, groups, name="outcome_rewards")
    thinking = g.like("thinking_rewards", thinking_rewards)
    good = (g.values >= threshold).to(thinking.dtype)
    both = (g.sum(good) > 0) & (g.sum(1 - good) > 0)
    trust = torch.where(
        both, (g.mean(thinking, good) - g.mean(thinking, 1 - good)).clamp(max=0).exp(), 1
    )
    now, end = (x.to(thinking.dtype) if isinstance(x, Tensor) else x for x in (step, total_steps))
    elapsed = now / end
    anneal = torch.exp(-elapsed) if isinstance(elapsed, Tensor) else math.exp(-elapsed)
    return torch.where(g.scored, g.values + trust * coef * anneal * thinking, torch.nan)


@published(
    "GRPO-LEAD: length reward",
    arxiv="2504.09696",
    level="group",
)
def grpo_lead_length(
    correct: Tensor,
    lengths: Tensor,
    *,
    alpha: NonNegative[float] = 0.05,
    wrong_reward: Real[float] = -1.0,
    min_length: NonNegative[float] = 4000.0,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """Correct: ``e^(-alpha·z)``, ``z = (L - mean)/(std + epsilon)`` over the group's
    correct completions; wrong: ``wrong_reward``. ``[B], [B] -> [B]``.

    ``std`` is unbiased, and 1 for a single correct completion. ``min_length``: a group
    is short enough if its three shortest completions, right or wrong, have a mean
    length of at most this. Its correct completions then get 1. 0 disables it.

    Differs from the paper: ``min_length`` comes from the authors' code.
    """
    g = grouped("grpo_lead_length", correct, groups, name="correct")
    length = g.like("lengths", lengths)
    right = is_correct("grpo_lead_length", "correct", g.values) & g.scored
    w = right.to(length.dtype)
    n = g.sum(w)
    std = torch.where(n > 1, g.std(length, weights=w), 1)
    z = (length - g.mean(length, w)) / (std + epsilon)
    shortest = (g.rank(length) < 3).to(length.dtype)
    short = (g.size >= 3) & (g.mean(length, shortest) <= min_length)
    reward = torch.where(right, torch.where(short, 1, torch.exp(-alpha * z)), wrong_reward)
    return torch.where(g.scored, reward, torch.nan)


@published(
    "GRPO-λ: length penalty for well-answered groups",
    paper="Stable Reinforcement Learning for Efficient Reasoning",
    arxiv="2505.18086",
    certainty="secondary",
    level="group",
)
def grpo_lambda_length(
    correct: Tensor,
    lengths: Tensor,
    *,
    alpha: NonNegative[float],
    fraction: Unit[float] = 0.2,
    epsilon: NonNegative[float] = 1e-4,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """Only the batch's best-answered prompts are trained for brevity. The others first
    learn to be right. ``[B], [B] -> [B]``.

    The ``ceil(fraction·num_groups)`` groups (at least one) with the highest share of
    correct completions are selected. There a correct completion gets
    ``1 - alpha·sigmoid((L - mean)/(std + epsilon))`` over the group's correct lengths
    (unbiased; 0 for one), and a wrong one gets 0. All other groups get 1 or 0. Of equal
    shares the group with the lower number comes first. ``alpha`` is not stated in what
    was read of the paper, so it must be given. λ = ``fraction`` is its example. The
    share is relative to the batch, as in summaries of the paper. If every prompt is
    answered badly, the best of them are still trained for brevity. The λ-GRPO of
    arXiv:2510.06870 and the GRPO-λ of arXiv:2510.00194 are other methods.

    Differs from the paper: ``epsilon``.
    """
    g = grouped("grpo_lambda_length", correct, groups, name="correct")
    length = g.like("lengths", lengths)
    right = is_correct("grpo_lambda_length", "correct", g.values) & g.scored
    w = right.to(length.dtype)
    count = g.groups.count
    scored = g.groups.sum(g.scored.to(w.dtype))
    share = torch.where(scored > 0, g.groups.sum(w) / scored.clamp(min=1), -1)
    order = share.sort(descending=True, stable=True).indices
    best = torch.zeros_like(share).scatter(
        0, order[: max(1, math.ceil(round(fraction * count, 9)))], 1
    )
    penalty = alpha * torch.sigmoid(
        (length - g.mean(length, w)) / (g.std(length, weights=w) + epsilon)
    )
    return torch.where(
        g.scored, torch.where(right, 1 - g.groups.spread(best) * penalty, 0), torch.nan
    )


@published(
    "TRAAC: correctness, format and length reward",
    paper="Think Right: Learning to Mitigate Under-Over Thinking via Adaptive, Attentive "
    "Compression",
    arxiv="2510.01581",
    certainty="derived",
    level="sequence",
)
def traac(
    correct: Tensor,
    format_rewards: Tensor,
    lengths: Tensor,
    median_lengths: Tensor,
    *,
    scale: Positive[float],
) -> Tensor:
    """``r = 4·correct + format + correct·sigmoid((median - L)/scale)``. All
    ``[B] -> [B]``.

    Derived: the paper's summary has the weights, and a sigmoid-smoothed penalty of
    correct answers that are longer than the median of recent rollouts of the same
    difficulty (a window of 10 steps). The curve was not found, so its ``scale`` must be
    given. ``median_lengths`` has that median for each row. Lengths are those after
    compression. The eviction of reasoning steps (60, 40, 20 % for easy, medium, hard
    prompts) edits text and is not included.
    """
    right = floats("traac", "correct", correct)
    shape = tuple(right.shape)
    form, length, median = (
        floats("traac", name, x, shape).to(right.dtype)
        for name, x in (
            ("format_rewards", format_rewards),
            ("lengths", lengths),
            ("median_lengths", median_lengths),
        )
    )
    is_right = torch.where(
        right.isnan(), torch.nan, is_correct("traac", "correct", right).to(right.dtype)
    )
    return 4 * is_right + form + is_right * torch.sigmoid((median - length) / scale)


@published(
    "TW-GRPO's soft reward of multiple-choice answers",
    arxiv="2505.24718",
    level="sequence",
)
def soft_multi_choice(answers: Tensor, correct: Tensor) -> Tensor:
    """``|P|/|G|`` if all chosen options P are among the correct ones G, else 0.
    ``[B, K], [B, K] -> [B]``.

    Nothing chosen is 0. A nonzero value marks an option. A question without a correct
    option is NaN. The paper's question-answer inversion changes the data before this.
    """
    chosen = floats("soft_multi_choice", "answers", answers)
    if chosen.dim() != 2:
        raise InvalidCall(
            f"soft_multi_choice: answers has shape {tuple(chosen.shape)}, expected (B, K): one "
            "mark per option."
        )
    right = is_correct(
        "soft_multi_choice",
        "correct",
        floats("soft_multi_choice", "correct", correct, chosen),
    )
    taken, total = (chosen != 0).to(chosen.dtype).sum(1), right.to(chosen.dtype).sum(1)
    return torch.where(((chosen != 0) & ~right).any(1), 0, taken) / torch.where(
        total == 0, torch.nan, total
    )


if not TYPE_CHECKING:  # which would take any name for one
    __getattr__ = published_names("reward")
