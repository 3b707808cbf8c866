"""The loss that a user would write in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_policy_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    temperature: float = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """The policy loss that a user would write in PyTorch: clip, token mean, k3 and
    entropy bonus. It is the baseline of benchmarks.

    It is not ``backend="reference"``. That backend is truth and may be slow.
    """
    logp_all = torch.log_softmax(logits.float() / temperature, dim=-1)
    logps = logp_all.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    old = logps.detach() if old_per_token_logps is None else old_per_token_logps
    ratio = torch.exp(logps - old)
    adv = advantages if advantages.shape == logps.shape else advantages.unsqueeze(-1)
    loss = -torch.min(ratio * adv, torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high) * adv)
    if beta:
        assert ref_per_token_logps is not None
        d = ref_per_token_logps - logps
        loss = loss + beta * (torch.exp(d) - d - 1)
    if entropy_coef:
        loss = loss + entropy_coef * (logp_all.exp() * logp_all).sum(-1)
    mask = torch.ones_like(loss) if completion_mask is None else completion_mask.to(loss.dtype)
    return (loss * mask).sum() / mask.sum().clamp(min=1)
