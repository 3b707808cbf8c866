"""TRL 1.16's advantages. Source: ``GRPOTrainer._generate_and_score_completions`` and
``RLOOTrainer``'s, ``trl/trainer/utils.py::nanstd``.

``rewards_per_func``: ``[B, K]``, NaN where a reward function returned None; a row of
NaN alone is unscorable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nanstd(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    mean = torch.nanmean(x, dim=dim, keepdim=True)
    variance = torch.nanmean((x - mean) ** 2, dim=dim, keepdim=True)
    count = (~torch.isnan(x)).sum(dim=dim, keepdim=True).to(x.dtype)
    std = torch.sqrt(variance * torch.where(count > 1, count / (count - 1), torch.nan))
    if keepdim:
        return std
    return std.squeeze() if dim is None else std.squeeze(dim)


def _total(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    rewards = (rewards_per_func * weights[None]).nansum(dim=1)
    rewards[torch.isnan(rewards_per_func).all(dim=1)] = torch.nan
    return rewards


def grpo(
    rewards_per_func: Tensor, weights: Tensor, num_generations: int, scale_rewards: str = "group"
) -> Tensor:
    """``multi_objective_aggregation="sum_then_normalize"``."""
    rewards = _total(rewards_per_func, weights)
    mean = torch.nanmean(rewards.view(-1, num_generations), dim=1).repeat_interleave(
        num_generations, dim=0
    )
    if scale_rewards in ("group", "none"):
        std = torch.zeros_like(rewards)
        if num_generations > 1:
            std = nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(
                num_generations, dim=0
            )
    else:
        std = nanstd(rewards).expand_as(rewards)
    advantages = rewards - mean
    if scale_rewards != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def gdpo(rewards_per_func: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """``multi_objective_aggregation="normalize_then_sum"``."""
    grouped = rewards_per_func.view(-1, num_generations, rewards_per_func.shape[1])
    mean_k = torch.nanmean(grouped, dim=1, keepdim=True)
    std_k = (
        nanstd(grouped, dim=1, keepdim=True) if num_generations > 1 else torch.zeros_like(mean_k)
    )
    reward_k = ((grouped - mean_k) / (std_k + 1e-4)).view(-1, rewards_per_func.shape[1])
    rewards = (reward_k * weights[None]).nansum(dim=1)
    rewards[torch.isnan(rewards_per_func).all(dim=1)] = torch.nan
    return torch.nan_to_num((rewards - torch.nanmean(rewards)) / (nanstd(rewards) + 1e-4), nan=0.0)


def rloo(rewards: Tensor, num_generations: int, normalize_advantages: bool = False) -> Tensor:
    grouped = rewards.view(-1, num_generations)
    count = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    if num_generations > 1:
        baselines = (torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (count - 1)
        advantages = rewards - baselines.view(-1)
    else:
        advantages = torch.zeros_like(rewards)
    if normalize_advantages:
        advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)
