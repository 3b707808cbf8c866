"""verl 0.9.1's policy losses. Source: ``verl/trainer/ppo/core_algos.py``; put together
as in ``verl/workers/utils/losses.py::ppo_loss``.

verl adds 1e-8 to token counts. Counts are fp32 there, so it changes nothing for a
non-empty sequence and keeps an empty one from 0/0; here that is ``clamp(min=1)``, which
is the same and stays exact in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
KL_TYPES = ("k1", "abs", "k2", "k3", "low_var_kl", "k1+", "abs+", "k3+", "low_var_kl+")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def agg_loss(
    loss: Tensor,
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """``agg_loss``: ``[B,T] -> scalar``. Sequences without a valid token are in no
    sequence mean.
    """
    tokens = mask.sum(-1)
    if mode == "token-mean":
        return (
            (loss * mask).sum()
            / (mask.sum() if batch_num_tokens is None else batch_num_tokens)
            * dp_size
        )
    if mode == "token-sum":
        return (loss * mask).sum() * dp_size
    sequences = (tokens > 0).sum() if global_batch_size is None else global_batch_size
    per_sequence = (loss * mask).sum(-1)
    if mode == "seq-mean-token-sum":
        return per_sequence.sum() / sequences * dp_size
    if mode == "seq-mean-token-sum-norm":
        return (
            per_sequence.sum()
            / sequences
            * dp_size
            / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
        )
    if mode == "seq-mean-token-mean":
        return (per_sequence / tokens.clamp(min=1)).sum() / sequences * dp_size
    raise ValueError(f"Invalid loss_agg_mode: {mode}")


def kl_penalty(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """``kl_penalty``: with a ``+`` the value of the estimator and the
    gradient of k2."""
    base = kind.removesuffix("+")
    k2 = 0.5 * (logps - ref_logps) ** 2
    if base == "k1":
        value = logps - ref_logps
    elif base == "abs":
        value = (logps - ref_logps).abs()
    elif base == "k2":
        return k2
    elif base in ("k3", "low_var_kl"):
        kl = torch.clamp(ref_logps - logps, min=-20, max=20)
        value = torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)
    else:
        raise ValueError(f"Unknown KL penalty: {kind}")
    return k2 - k2.detach() + value.detach() if kind.endswith("+") else value


def _log_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    return torch.clamp(logps - old_logps, min=-20.0, max=20.0)


def vanilla(logps, old, adv, mask, low, high, clip_ratio_c=3.0, **_):
    """``compute_policy_loss_vanilla``: PPO clip, dual clip for negative advantages."""
    log_ratio = _log_ratio(logps, old)
    ratio = torch.exp(log_ratio)
    unclipped, clipped = -adv * ratio, -adv * torch.clamp(ratio, 1 - low, 1 + high)
    worst = torch.maximum(unclipped, clipped)
    bound = -adv * clip_ratio_c
    loss = torch.where(adv < 0, torch.minimum(bound, worst), worst)
    metrics = {
        "actor/pg_clipfrac": clipped > unclipped,
        "actor/pg_clipfrac_lower": (worst > bound) & (adv < 0),
        "actor/ppo_kl": -log_ratio,
    }
    return loss, metrics


def gspo(logps, old, adv, mask, low, high, **_):
    """``compute_policy_loss_gspo``: the sequence's ratio, each token's gradient
    (GSPO-token).
    """
    log_ratio = logps - old
    sequence = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = torch.exp(torch.clamp(logps - logps.detach() + sequence.detach()[:, None], max=10.0))
    unclipped, clipped = -adv * ratio, -adv * torch.clamp(ratio, 1 - low, 1 + high)
    metrics = {
        "actor/pg_clipfrac": clipped > unclipped,
        "actor/pg_clipfrac_lower": torch.zeros_like(adv),
        "actor/ppo_kl": -log_ratio,
    }
    return torch.maximum(unclipped, clipped), metrics


def sapo(logps, old, adv, mask, low, high, tau_pos=1.0, tau_neg=1.05, **_):
    """``compute_policy_loss_sapo``; verl aggregates it with seq-mean-token-mean
    whatever ``loss_agg_mode`` says.
    """
    log_ratio = _log_ratio(logps, old)
    tau = torch.full_like(adv, tau_neg).masked_fill(adv > 0, tau_pos)
    zero = torch.zeros_like(adv)
    metrics = {
        "actor/pg_clipfrac": zero,
        "actor/pg_clipfrac_lower": zero,
        "actor/ppo_kl": -log_ratio,
    }
    return -torch.sigmoid(tau * (torch.exp(log_ratio) - 1.0)) * (4.0 / tau) * adv, metrics


def gpg(logps, old, adv, mask, low, high, **_):
    """``compute_policy_loss_gpg``."""
    return -logps * adv, {}


def cispo(logps, old, adv, mask, low, high, **_):
    """``compute_policy_loss_cispo``."""
    log_ratio = _log_ratio(logps, old)
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    metrics = {
        "actor/pg_clipfrac": ratio != clipped,
        "actor/pg_clipfrac_lower": torch.zeros_like(adv),
        "actor/ppo_kl": -log_ratio,
    }
    return -clipped.detach() * adv * logps, metrics


def dppo_tv(logps, old, adv, mask, low, high, clip_ratio_c=3.0, **_):
    """``compute_policy_loss_dppo_tv``; ``clip_ratio_c`` is verl's ActorConfig default,
    not the 20 of the function.
    """
    log_ratio = _log_ratio(logps, old)
    ratio = torch.exp(log_ratio)
    drift = torch.exp(logps) - torch.exp(old)
    valid = torch.where(adv > 0, drift <= high, drift >= -low)
    metrics = {
        "actor/pg_clipfrac": ~valid,
        "actor/pg_clipfrac_lower": (ratio > clip_ratio_c) & valid,
        "actor/ppo_kl": -log_ratio,
    }
    return -adv * torch.clamp(ratio, max=clip_ratio_c).detach() * logps * valid, metrics


def dppo_kl(logps, old, adv, mask, low, high, clip_ratio_c=3.0, **_):
    """``compute_policy_loss_dppo_kl``."""
    log_ratio = _log_ratio(logps, old)
    ratio = torch.exp(log_ratio)
    p, q = torch.exp(logps), torch.exp(old)
    kl = q * (old - logps) + (1 - q) * torch.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    valid = torch.where(adv > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q))
    metrics = {
        "actor/pg_clipfrac": ~valid,
        "actor/pg_clipfrac_lower": (ratio > clip_ratio_c) & valid,
        "actor/ppo_kl": -log_ratio,
    }
    return -adv * torch.clamp(ratio, max=clip_ratio_c).detach() * logps * valid, metrics


def dro(logps, old, adv, mask, low, high, dro_beta=None, **_):
    """``compute_policy_loss_dro``."""
    log_ratio = logps - old
    return -(logps * adv - 0.5 * dro_beta * log_ratio.square()), {"actor/ppo_kl": -log_ratio}


def _covariance(logps, adv, mask):
    return (adv - masked_mean(adv, mask)) * (logps - masked_mean(logps.detach(), mask))


def clip_cov(
    logps, old, adv, mask, low, high, clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0, **_
):
    """``compute_policy_loss_clip_cov`` where there are no more candidates than it
    draws, so that nothing is left to chance.
    """
    ratio = torch.exp(logps - old)
    unclipped, clipped = -adv * ratio, -adv * torch.clamp(ratio, 1 - low, 1 + high)
    covariance = _covariance(logps, adv, mask)
    candidate = (
        (covariance < clip_cov_ub)
        & (covariance > clip_cov_lb)
        & (mask > 0)
        & ~(clipped > unclipped)
    )
    assert candidate.sum() <= max(int(clip_cov_ratio * mask.sum().item()), 1), (
        "the draw would be random"
    )
    return torch.maximum(unclipped, clipped) * ~candidate, {
        "actor/pg_clipfrac": candidate,
        "actor/ppo_kl": old - logps,
    }


def kl_cov(logps, old, adv, mask, low, high, kl_cov_ratio=2e-4, ppo_kl_coef=1.0, **_):
    """``compute_policy_loss_kl_cov``."""
    log_ratio = logps - old
    loss = -adv * torch.exp(log_ratio)
    covariance = torch.where(mask > 0, _covariance(logps, adv, mask).detach(), -torch.inf).flatten()
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    chosen[covariance.topk(max(1, int(int(mask.sum()) * kl_cov_ratio))).indices] = True
    return torch.where(chosen.view_as(loss), loss + ppo_kl_coef * log_ratio.abs(), loss), {
        "actor/ppo_kl": log_ratio.abs()
    }


def geo_mean(logps, old, adv, mask, low, high, **_):
    """``compute_policy_loss_geo_mean``, a token's share of its sequence's loss; see
    ``policy_loss`` for the mean that it takes.
    """
    log_ratio, sign = logps - old, torch.sign(adv)
    clamped = torch.clamp(log_ratio, -low, high)
    drift = sign * torch.min(sign * log_ratio, sign * clamped)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = torch.exp((drift * mask).sum(-1, keepdim=True) / lengths)
    moved = log_ratio != clamped
    metrics = {
        "actor/pg_clipfrac": moved & (adv > 0),
        "actor/pg_clipfrac_lower": moved & (adv < 0),
        "actor/ppo_kl": -log_ratio,
    }
    return -adv * ratio, metrics


def bypass_mode(
    logps,
    old,
    adv,
    mask,
    low,
    high,
    clip_ratio_c=3.0,
    rollout_loss_type="ppo_clip",
    rollout_is=None,
    rollout_is_threshold=2.0,
    **_,
):
    """``compute_policy_loss_bypass_mode`` without rejection, which is a mask: ``old``
    are the sampler's log-probs.
    """
    if rollout_loss_type == "ppo_clip":
        return vanilla(logps, old, adv, mask, low, high, clip_ratio_c)
    log_ratio = (logps - old).detach()
    if rollout_is is None:
        return -adv * logps, {"actor/ppo_kl": -log_ratio}
    if rollout_is == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True).expand_as(log_ratio)
    weight = torch.exp(log_ratio.clamp(-20, 20))
    if isinstance(rollout_is_threshold, tuple):
        lower, upper = rollout_is_threshold
        weight = torch.where((weight >= lower) & (weight <= upper), weight, 0)
    else:
        weight = weight.clamp(max=rollout_is_threshold)
    return -adv * logps * weight, {"actor/ppo_kl": (old - logps).detach()}


LOSSES = {
    "vanilla": vanilla, "gspo": gspo, "sapo": sapo, "gpg": gpg, "cispo": cispo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl, "clip_cov": clip_cov,
    "kl_cov": kl_cov, "geo_mean": geo_mean, "dro": dro, "bypass_mode": bypass_mode,
}  # fmt: skip


def policy_loss(
    loss_mode: str,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    loss_agg_mode: str = "token-mean",
    entropy_coeff: float = 0.0,
    kl_loss_coef: float = 0.0,
    kl_loss_type: str = "low_var_kl",
    global_batch_info: dict[str, Any] | None = None,
    **settings: float,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of one micro-batch; all tensors ``[B,T]``. ``settings``: what
    the modes above take by name.
    """
    mask = mask.to(logps.dtype)
    info = global_batch_info or {}
    old_logps = logps.detach() if old_logps is None else old_logps
    matrix, rows = LOSSES[loss_mode](
        logps, old_logps, advantages, mask, clip_ratio_low, clip_ratio_high, **settings
    )
    if rollout_is_weights is not None and loss_mode == "geo_mean":
        logs = torch.log(rollout_is_weights + 1e-10) * mask
        rollout_is_weights = torch.exp(
            logs.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        )
    if rollout_is_weights is not None and loss_mode != "bypass_mode":
        matrix = matrix * rollout_is_weights
    # a mean over all sequences of this call, the empty ones too
    if loss_mode == "geo_mean":
        loss = ((matrix * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    else:
        loss = agg_loss(
            matrix, mask, "seq-mean-token-mean" if loss_mode == "sapo" else loss_agg_mode, **info
        )
    if entropy_coeff:
        loss = loss - entropy_coeff * agg_loss(entropies, mask, loss_agg_mode, **info)
    if kl_loss_coef:
        loss = loss + kl_loss_coef * agg_loss(
            kl_penalty(logps, ref_logps, kl_loss_type), mask, loss_agg_mode, **info
        )
    return loss, {name: masked_mean(row.to(logps.dtype), mask).item() for name, row in rows.items()}
