"""TRL 1.16's GRPO loss. Source: ``trl/trainer/grpo_trainer.py``, ``_compute_loss``,
``get_high_entropy_mask``, ``get_off_policy_mask`` and
``get_gamma_weights``, and the correction for vLLM of
``_generate_and_score_completions``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def logps_and_entropies(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy of each row, ``[B,T,V], [B,T] -> [B,T], [B,T]``:
    softcap, then temperature.
    """
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1), -torch.xlogy(log_p.exp(), log_p.exp()).sum(
        -1
    )


def high_entropy_mask(entropies: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The valid tokens whose entropy is at least the ``quantile`` of the valid
    entropies (one process).
    """
    if not mask.any():
        return torch.zeros_like(mask, dtype=torch.bool)
    threshold = torch.quantile(entropies.detach()[mask.bool()], quantile)
    return (entropies * mask >= threshold) & mask.bool()


def sampling_ratio(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    mode: str,
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """``importance_sampling_ratio``: ``[B,T]`` of a token mode, ``[B,1]`` of a sequence
    mode.
    """
    diff = torch.nan_to_num((old_logps - sampling_logps) * mask, nan=0.0)
    ratio = torch.exp(diff.sum(-1, keepdim=True) if mode.startswith("sequence") else diff)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=clip_min, max=clip_max)
    low, high = (
        (-math.inf if clip_min is None else clip_min),
        (math.inf if clip_max is None else clip_max),
    )
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def grpo_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropies: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: Any = None,
    num_processes: int = 1,
    accumulation_steps: int = 1,
    steps_per_generation: int = 1,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of one micro-batch in training mode, by TRL's names.

    ``logps, entropies, mask, old_logps, ref_logps``: ``[B,T]``; ``advantages``: ``[B]``
    or ``[B,T]``; ``importance_sampling_ratio``: ``[B,T]`` or ``[B,1]``.
    ``num_items_in_batch`` is TRL's (tokens of the whole generation batch, over all
    processes), for dapo and cispo.
    """
    mask = mask.to(logps.dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    old_logps = logps.detach() if old_logps is None else old_logps
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    entropy_mask = None
    if top_entropy_quantile < 1.0:
        entropy_mask = high_entropy_mask(entropies, mask, 1 - top_entropy_quantile)

    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    coef_1 = torch.exp(log_ratio)

    per_token_kl = None
    if beta != 0.0:
        per_token_kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
        if use_bias_correction_kl:
            per_token_kl = per_token_kl * coef_1

    if loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=epsilon_high).detach() * advantages * logps
    elif loss_type == "sapo":
        temperatures = torch.full_like(advantages, sapo_temperature_neg).masked_fill(
            advantages > 0, sapo_temperature_pos
        )
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    elif loss_type == "vespo":
        total = (torch.clamp(logps - old_logps, -20.0, 20.0) * mask).sum(-1, keepdim=True).detach()
        if importance_sampling_ratio is not None:
            total = total + torch.clamp(
                torch.log(importance_sampling_ratio), math.log(1e-8), 20.0
            ).sum(-1, keepdim=True)
        log_w = torch.clamp(total, math.log(1e-8), 20.0)
        k = torch.where(advantages >= 0, vespo_k_pos, vespo_k_neg).to(logps)
        rate = (
            torch.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg)
            .to(logps)
            .clamp(min=1e-4)
        )
        per_token_loss = -torch.exp(rate + k * log_w - rate * torch.exp(log_w)) * advantages * logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon_high)
        if delta is not None:
            coef_1 = torch.clamp(coef_1, max=delta)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)

    if off_policy_mask_threshold is not None:
        drift = ((old_logps - logps.detach()) * mask).sum(1, keepdim=True) / mask.sum(
            1, keepdim=True
        ).clamp(min=1.0)
        per_token_loss = per_token_loss * (
            (advantages >= 0) | (drift <= off_policy_mask_threshold)
        ).to(mask.dtype)
    if entropy_mask is not None:
        per_token_loss = per_token_loss * entropy_mask
    if importance_sampling_ratio is not None and loss_type != "vespo":
        per_token_loss = per_token_loss * importance_sampling_ratio
    if per_token_kl is not None:
        per_token_loss = per_token_loss + beta * per_token_kl

    masked = per_token_loss * mask
    if loss_type in ("grpo", "sapo"):
        loss = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / accumulation_steps
    elif loss_type == "bnpo":
        loss = masked.sum() / mask.sum().clamp(min=1.0) / accumulation_steps
    elif loss_type == "dr_grpo":
        loss = masked.sum() / (masked.size(0) * max_completion_length) / accumulation_steps
    elif loss_type in ("dapo", "cispo", "vespo"):
        tokens = torch.as_tensor(num_items_in_batch, dtype=logps.dtype).clamp(min=1.0)
        loss = masked.sum() / (tokens / num_processes * accumulation_steps / steps_per_generation)
    elif loss_type == "luspo":
        loss = masked.sum(-1).mean() / accumulation_steps
    else:
        raise ValueError(f"Unknown loss type: {loss_type}")

    if entropy_coef:
        effective_mask = mask if entropy_mask is None else mask * entropy_mask
        entropy = (entropies * effective_mask).sum() / effective_mask.sum().clamp(min=1.0)
        loss = loss - entropy_coef * entropy / accumulation_steps

    return loss, _metrics(
        loss_type, coef_1, advantages, mask, epsilon, epsilon_high, per_token_kl, entropies
    )


def _metrics(
    loss_type, coef_1, advantages, mask, epsilon, epsilon_high, per_token_kl, entropies
) -> dict[str, float]:
    """The logged numbers of one process. A ``[B,1]`` quantity is averaged over
    sequences, any other over valid tokens.
    """

    def mean(x: Tensor) -> float:
        if x.shape[1] == 1:
            return x.mean().item()
        return ((x * mask).sum() / mask.sum().clamp(min=1.0)).item()

    def sequence_means(x: Tensor) -> Tensor:
        per_sequence = x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)
        return per_sequence[~per_sequence.isnan()]

    metrics = {}
    if per_token_kl is not None:
        metrics["kl"] = mean(per_token_kl)
    if entropies is not None:
        metrics["entropy"] = mean(entropies)
    if loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(
            ((coef_1 > epsilon_high) & (advantages > 0)).to(mask.dtype)
        )
    elif loss_type not in ("sapo", "vespo"):
        low = ((coef_1 < 1 - epsilon) & (advantages < 0)).to(mask.dtype)
        high = ((coef_1 > 1 + epsilon_high) & (advantages > 0)).to(mask.dtype)
        metrics |= {
            "clip_ratio/low_mean": mean(low),
            "clip_ratio/high_mean": mean(high),
            "clip_ratio/region_mean": mean(low + high),
        }
        metrics |= {
            "clip_ratio/low_min": sequence_means(low).min().item(),
            "clip_ratio/high_max": sequence_means(high).max().item(),
        }
    return metrics
