"""AReaL 4aef98d8 (1.0.4): its log-probs, its PPO loss and what calls it, transcribed.

From ``areal/utils/functional/vocab_parallel.py`` (one rank), ``functional.py``
(``apply_rejection_sampling`` by ratios, ``ppo_actor_loss_fn``) and
``areal/trainer/ppo/actor.py`` (``grpo_loss_fn``, without logging). ``fsdp_engine`` and
``actor`` are modules, as the adapter patches them.
"""

import sys
import types
from dataclasses import dataclass
from typing import Any

import torch


def _gather_logprobs_entropy(logits, labels, temperature):
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


def gather_logprobs(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
    return _gather_logprobs_entropy(logits, labels, temperature)[0]


def gather_logprobs_entropy(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
    return _gather_logprobs_entropy(logits, labels, temperature)


@dataclass
class RejectionSamplingConfig:
    level: str = "token"
    action: str = "mask"
    metric: str = "ratio"
    agg: str = "mean"
    upper: float = 5.0
    lower: float | None = None


@dataclass
class RejectionSamplingResult:
    loss_mask: Any
    behave_imp_weight: Any
    filtered_fraction: float


def per_sequence(x, mask, cu_seqlens):
    """Each token's sequence mean."""
    if x.dim() == 2:
        return (
            (torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(x)
        )
    owner = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    total = x.new_zeros(len(cu_seqlens) - 1).scatter_add(0, owner, torch.where(mask, x, 0.0))
    count = x.new_zeros(len(cu_seqlens) - 1).scatter_add(0, owner, mask.to(x.dtype)).clamp(min=1)
    return (total / count)[owner]


def apply_rejection_sampling(proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, config):
    drift = proximal_logprobs.detach() - old_logprobs.detach()
    drift = torch.where(drift.isfinite(), drift, 0.0)
    if config.level == "sequence":
        drift = per_sequence(drift, loss_mask, cu_seqlens)
    weight = drift.exp()
    kept = loss_mask
    if config.action == "mask":
        inside = weight <= config.upper
        kept = loss_mask & (inside if config.lower is None else inside & (weight >= config.lower))
    else:
        weight = weight.clamp(min=config.lower or 0.0, max=config.upper)
    return RejectionSamplingResult(kept, torch.where(kept, weight, 0.0), 0.0)


def ppo_actor_loss_fn(
    logprobs,
    proximal_logprobs,
    old_logprobs,
    advantages,
    eps_clip,
    loss_mask,
    eps_clip_higher=None,
    c_clip=None,
    rejection_sampling=None,
    importance_sampling_level="token",
    cu_seqlens=None,
):
    count, weight = loss_mask.count_nonzero() or 1, None
    if rejection_sampling is not None:
        result = apply_rejection_sampling(
            proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, rejection_sampling
        )
        loss_mask, weight = result.loss_mask, result.behave_imp_weight
    ratio = torch.where(loss_mask, torch.exp(logprobs - proximal_logprobs), 0)
    if importance_sampling_level == "sequence":
        ratio = torch.where(
            loss_mask, per_sequence(logprobs - proximal_logprobs, loss_mask, cu_seqlens).exp(), 0.0
        )
        advantages = torch.where(loss_mask, per_sequence(advantages, loss_mask, cu_seqlens), 0.0)
    clipped = ratio.clamp(
        1 - eps_clip, 1 + (eps_clip if eps_clip_higher is None else eps_clip_higher)
    )
    one, two = -advantages * ratio, -advantages * clipped
    loss = torch.max(one, two)
    if c_clip is not None:
        loss = torch.min(loss, torch.sign(advantages) * c_clip * advantages)
    if weight is not None:
        loss = loss * weight
    stat = {
        "loss": loss.detach(),
        "importance_weight": ratio.detach(),
        "approx_kl": (logprobs - proximal_logprobs).detach(),
    }
    stat |= {
        "clip_mask": (one.detach() < two.detach()) & loss_mask,
        "dual_clip_mask": torch.zeros_like(loss_mask),
    }
    if weight is not None:
        stat |= {
            "behave_imp_weight": weight,
            "behave_mask": (weight > 0) & loss_mask,
            "behave_approx_kl": None,
            "filtered_fraction": 0.0,
        }
    return torch.where(loss_mask, loss, 0).sum() / count, stat


def sapo_loss_fn(
    logprobs,
    old_logprobs,
    advantages,
    tau_pos,
    tau_neg,
    loss_mask,
    importance_sampling_level="token",
    cu_seqlens=None,
):
    raise NotImplementedError


fsdp_engine, actor = (
    types.ModuleType("areal.engine.fsdp_engine"),
    types.ModuleType("areal.trainer.ppo.actor"),
)
vars(fsdp_engine).update(
    gather_logprobs=gather_logprobs, gather_logprobs_entropy=gather_logprobs_entropy
)
vars(actor).update(ppo_actor_loss_fn=ppo_actor_loss_fn, sapo_loss_fn=sapo_loss_fn)


def compute_logprobs_and_entropy(logits, input_ids, temperature):
    """The engine's: packed logits ``[T, V]`` and ids ``[1, T]``, rolled."""
    return fsdp_engine.gather_logprobs_entropy(
        logits,
        torch.roll(input_ids, shifts=-1, dims=-1).squeeze(0),
        temperature=temperature,
        tp_group=None,
    )


def grpo_loss_fn(
    logprobs,
    input_data,
    eps_clip=0.2,
    eps_clip_higher=None,
    c_clip=None,
    rejection_sampling=None,
    level="token",
    use_sapo_loss=False,
):
    """``actor.grpo_loss_fn``: what it hands to the loss, and what its statistics ask of
    the result.
    """
    data, mask = input_data, input_data["loss_mask"].bool()
    if use_sapo_loss:
        return actor.sapo_loss_fn(
            logprobs=logprobs,
            old_logprobs=data["logprobs"],
            advantages=data["advantages"],
            tau_pos=1.0,
            tau_neg=1.05,
            loss_mask=mask,
            importance_sampling_level=level,
            cu_seqlens=data.get("cu_seqlens"),
        )[0]
    loss, stat = actor.ppo_actor_loss_fn(
        logprobs=logprobs,
        old_logprobs=data["logprobs"],
        advantages=data["advantages"],
        eps_clip=eps_clip,
        eps_clip_higher=eps_clip_higher,
        loss_mask=mask,
        c_clip=c_clip,
        proximal_logprobs=data["prox_logp"],
        rejection_sampling=rejection_sampling,
        importance_sampling_level=level,
        cu_seqlens=data.get("cu_seqlens"),
    )
    for name in ("loss", "importance_weight", "approx_kl", "clip_mask", "dual_clip_mask"):
        assert stat[name].shape == logprobs.shape and not stat[name].requires_grad, name
    assert stat["clip_mask"].dtype is stat["dual_clip_mask"].dtype is torch.bool
    return loss, stat


def install(patch):
    """The modules that the adapter imports, while ``patch`` lasts."""
    names = ("areal", "areal.utils", "areal.utils.functional", "areal.utils.functional.functional")
    names += ("areal.engine", "areal.trainer", "areal.trainer.ppo")
    modules = {name: types.ModuleType(name) for name in names} | {
        m.__name__: m for m in (fsdp_engine, actor)
    }
    modules["areal.utils.functional.functional"].apply_rejection_sampling = apply_rejection_sampling
    modules["areal.engine"].fsdp_engine, modules["areal.trainer.ppo"].actor = fsdp_engine, actor
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
