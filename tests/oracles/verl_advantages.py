"""verl 0.9.1's advantage estimators, row by row as it computes them. Source:
``verl/trainer/ppo/core_algos.py``, ``verl/utils/torch_functional.py``.

``token_rewards, values, mask``: ``[B, T]`` fp64; ``index``: a list of group names. Each
returns ``[B, T]``. Its ``+ 1e-8`` on counts is left out: it changes nothing in fp32.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    mean = (values * mask).sum() / mask.sum()
    var = ((values - mean) ** 2 * mask).sum() / mask.sum()
    var = var * mask.sum() / (mask.sum() - 1)
    return (values - mean) * torch.rsqrt(var + 1e-8)


def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """``compute_gae_advantage_return``."""
    nextvalues, lastgaelam, reversed_ = 0.0, 0.0, []
    for t in reversed(range(token_rewards.shape[-1])):
        delta = token_rewards[:, t] + gamma * nextvalues - values[:, t]
        new = delta + gamma * lam * lastgaelam
        nextvalues = values[:, t] * mask[:, t] + (1 - mask[:, t]) * nextvalues
        lastgaelam = new * mask[:, t] + (1 - mask[:, t]) * lastgaelam
        reversed_.append(lastgaelam)
    advantages = torch.stack(reversed_[::-1], dim=1)
    returns = advantages + values
    return (masked_whiten(advantages, mask) if whiten else advantages), returns


def _groups(scores: Tensor, index: list) -> dict:
    members = defaultdict(list)
    for i, name in enumerate(index):
        members[name].append(scores[i])
    return members


def grpo(
    token_rewards: Tensor,
    mask: Tensor,
    index: list,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
) -> Tensor:
    """``compute_grpo_outcome_advantage``: a group of one has mean 0 and std 1."""
    scores = token_rewards.sum(-1)
    members = _groups(scores, index)
    out = []
    for i, name in enumerate(index):
        group = torch.stack(members[name])
        mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
        out.append(
            (scores[i] - mean) / (std + epsilon) if norm_adv_by_std_in_grpo else scores[i] - mean
        )
    return torch.stack(out)[:, None] * mask


def rloo(token_rewards: Tensor, mask: Tensor, index: list) -> Tensor:
    """``compute_rloo_outcome_advantage``."""
    scores = token_rewards.sum(-1)
    members = _groups(scores, index)
    out = []
    for i, name in enumerate(index):
        n = len(members[name])
        mean = torch.stack(members[name]).mean()
        out.append(scores[i] * n / (n - 1) - mean * n / (n - 1) if n > 1 else scores[i])
    return torch.stack(out)[:, None] * mask


def opo(token_rewards: Tensor, mask: Tensor, index: list) -> Tensor:
    """``compute_opo_outcome_advantage``."""
    scores, lengths = token_rewards.sum(-1), mask.sum(-1)
    of_score, of_length = _groups(scores, index), _groups(lengths, index)
    out = []
    for i, name in enumerate(index):
        s, n = torch.stack(of_score[name]), torch.stack(of_length[name])
        out.append(scores[i] - ((n * s).sum() / n.sum() if len(s) > 1 else 0.0))
    return torch.stack(out)[:, None] * mask


def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``compute_reinforce_plus_plus_outcome_advantage``."""
    returns, running = torch.zeros_like(token_rewards), 0.0
    for t in reversed(range(token_rewards.shape[1])):
        new = token_rewards[:, t] + gamma * running
        returns[:, t] = new * mask[:, t]
        running = new * mask[:, t] + running * (1 - mask[:, t])
    return masked_whiten(returns, mask) * mask


def reinforce_plus_plus_baseline(token_rewards: Tensor, mask: Tensor, index: list) -> Tensor:
    """``compute_reinforce_plus_plus_baseline_outcome_advantage``."""
    scores = token_rewards.sum(-1)
    members = _groups(scores, index)
    centered = [
        s - (torch.stack(members[n]).mean() if len(members[n]) > 1 else 0.0)
        for s, n in zip(scores, index, strict=True)
    ]
    x = torch.stack(centered)[:, None].tile([1, mask.shape[1]]) * mask
    return masked_whiten(x, mask) * mask


def remax(token_rewards: Tensor, baselines: Tensor, mask: Tensor) -> Tensor:
    """``compute_remax_outcome_advantage``."""
    returns = (token_rewards * mask).flip(-1).cumsum(-1).flip(-1)
    return returns - baselines[:, None] * mask
