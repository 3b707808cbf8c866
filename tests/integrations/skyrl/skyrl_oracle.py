"""SkyRL a9564572 around a policy loss, and six of its own, transcribed.

From ``skyrl/backends/skyrl_train/utils/``: ``ppo_utils.py`` (the registry,
``ppo_policy_loss``, ``gspo_policy_loss``, ``compute_policy_loss_cispo``,
``sapo_policy_loss``, ``dppo_policy_loss``,
``apply_loss_reduction_to_advantages_minibatch``), ``off_policy_correction_utils.py``
and ``torch_utils.py``.
"""

import sys
import types

import torch


def config(**changes):
    correction = {
        "tis_ratio_type": None,
        "token_tis_ratio_clip_high": 1.1,
        "sequence_tis_ratio_clip_high": 1.2,
        "sequence_mask_metric": None,
        "geo_mask_high": 1.02,
        "geo_mask_low": 0.95,
    }
    fields = {
        "policy_loss_type": "regular",
        "loss_reduction": "token_mean",
        "max_seq_len": None,
        "eps_clip_low": 0.2,
        "eps_clip_high": 0.2,
        "clip_ratio_c": 3.0,
    }
    own = {
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "cispo_eps_clip_low": 0.8,
        "cispo_eps_clip_high": 0.5,
        "dppo_type": "binary_tv",
        "delta_low": 0.1,
        "delta_high": 0.1,
    }
    correction |= {k: changes.pop(k) for k in list(changes) if k in correction}
    return types.SimpleNamespace(
        off_policy_correction=types.SimpleNamespace(**correction), **(fields | own | changes)
    )


def masked_mean(x, mask, dim=None):
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1.0)


def safe_exp(delta):
    return delta.clamp(-20.0, 20.0).exp()


def apply_off_policy_correction(loss, old_log_probs, rollout_logprobs, loss_mask, cfg):
    if rollout_logprobs is None or (
        cfg.tis_ratio_type is None and cfg.sequence_mask_metric is None
    ):
        return loss, loss_mask, {}
    drift = old_log_probs - rollout_logprobs
    metrics = {"is_ratio_mean": masked_mean(safe_exp(drift), loss_mask).item()}
    if cfg.tis_ratio_type == "token":
        loss = loss * safe_exp(drift).clamp(max=cfg.token_tis_ratio_clip_high).detach()
    elif cfg.tis_ratio_type == "sequence":
        loss = loss * safe_exp((drift * loss_mask).sum(-1, keepdim=True)).clamp(
            max=cfg.sequence_tis_ratio_clip_high
        )
    if cfg.sequence_mask_metric == "geometric":
        mean = safe_exp(masked_mean(drift, loss_mask, -1).unsqueeze(-1))
        loss_mask = loss_mask * ((mean <= cfg.geo_mask_high) & (mean >= cfg.geo_mask_low)).float()
    return loss, loss_mask, metrics


def token_losses(kind, cfg, lp, old, adv, mask, rollout):
    if kind in ("regular", "dual_clip"):
        ratio = safe_exp(lp - old)
        loss = -torch.min(
            ratio * adv, ratio.clamp(1 - cfg.eps_clip_low, 1 + cfg.eps_clip_high) * adv
        )
        return (
            torch.where(adv < 0, torch.min(-adv * cfg.clip_ratio_c, loss), loss)
            if kind == "dual_clip"
            else loss
        )
    if kind == "gspo":
        mean = masked_mean(lp - old, mask, -1).unsqueeze(-1)
        ratio = (lp - lp.detach() + mean.detach()).clamp(max=10).exp()
        return -torch.min(
            ratio * adv, ratio.clamp(1 - cfg.eps_clip_low, 1 + cfg.eps_clip_high) * adv
        )
    if kind == "cispo":
        return (
            -adv
            * safe_exp(lp - old)
            .clamp(1 - cfg.cispo_eps_clip_low, 1 + cfg.cispo_eps_clip_high)
            .detach()
            * lp
        )
    if kind == "sapo":
        ratio, tau = safe_exp(lp - old), torch.where(adv > 0, cfg.tau_pos, cfg.tau_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * adv
    assert kind == "dppo"
    behaviour = old if rollout is None else rollout
    moved = (lp.exp() - behaviour.exp()).detach()
    dropped = ((adv > 0) & (moved > cfg.delta_high)) | ((adv < 0) & (-moved > cfg.delta_low))
    return -(safe_exp(lp - behaviour) * adv * (~dropped).float())


def policy_loss(kind):
    def fn(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
        loss = token_losses(
            kind, config, log_probs, old_log_probs, advantages, loss_mask, rollout_logprobs
        )
        loss, mask, metrics = apply_off_policy_correction(
            loss, old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
        )
        return (loss * mask).sum(), metrics

    return fn


def reduced(advantages, mask, cfg):
    """``apply_loss_reduction_to_advantages_minibatch`` of one mini-batch, two prompts
    of equally many sequences.
    """
    size = advantages.shape[0]
    if cfg.loss_reduction == "token_mean":
        return advantages / mask.sum().clamp(min=1)
    if cfg.loss_reduction == "sequence_mean":
        return advantages / (size * mask.sum(-1, keepdim=True).clamp(min=1))
    if cfg.loss_reduction == "seq_mean_token_sum_norm":
        return advantages / (size * cfg.max_seq_len)
    assert cfg.loss_reduction == "prompt_mean"
    halves = [(advantages[s], mask[s]) for s in (slice(0, size // 2), slice(size // 2, size))]
    return torch.cat([a / (2 * m.sum().clamp(min=1)) for a, m in halves])


class PolicyLossRegistry:
    _functions: dict = {}  # noqa: RUF012

    @classmethod
    def register(cls, name, func):
        if name in cls._functions:
            raise ValueError(f"policy loss '{name}' already registered")
        cls._functions[name] = func

    @classmethod
    def get(cls, name):
        return cls._functions[name]


def install(patch):
    """The modules that the adapter imports, while ``patch`` lasts."""
    root = "skyrl.backends.skyrl_train.utils"
    names = [
        "skyrl",
        "skyrl.backends",
        "skyrl.backends.skyrl_train",
        root,
        f"{root}.off_policy_correction_utils",
        f"{root}.ppo_utils",
    ]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-2]].apply_off_policy_correction = apply_off_policy_correction
    modules[names[-1]].PolicyLossRegistry = PolicyLossRegistry
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
