"""What prime-rl 559b4477 has around a custom loss and in its fused head, transcribed.

From ``src/prime_rl/trainer/rl/loss.py`` (``LossInputs``, ``LossOutputs``,
``compute_loss``, ``default_loss_fn``), ``docs/algorithms.md`` (``ppo_clip_loss``),
``trainer/models/layers/lm_head.py``, ``lm_head_gemma.py`` and ``utils/utils.py``
(``import_object``).
"""

import importlib
import sys
import types
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Any
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Any = field(default=None)


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict


def import_object(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def ppo_clip_loss(inputs, clip_eps=0.2):
    ratio = torch.exp(inputs.trainer_logprobs - inputs.inference_logprobs)
    clipped = torch.clamp(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = -torch.min(ratio * inputs.advantages, clipped * inputs.advantages)
    if inputs.loss_weights is not None:
        loss = loss * inputs.loss_weights
    return LossOutputs(loss=loss[inputs.loss_mask].sum(), metrics={})


def default_loss(inputs, low=0.2, high=0.2, kl_tau=1e-3):
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    moved = inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()
    dropped = torch.where(inputs.advantages > 0, moved > high, moved < -low)
    loss = (
        -(inputs.loss_mask & ~dropped).float() * inputs.advantages * log_ratio.exp()
        + kl_tau * inputs.loss_mask * log_ratio**2
    )
    if inputs.loss_weights is not None:
        loss = loss * inputs.loss_weights
    return LossOutputs(
        loss=loss.sum(), metrics={"is_masked": dropped[inputs.loss_mask].float().mean()}
    )


def compute_loss(fn, logprobs, inference, ref, advantages, masks, weights, scale):
    """The rl component: per sample, summed, over the count of the global batch; metrics
    stacked.
    """
    total, metrics = logprobs[0].sum() * 0.0, {}
    for i, lp in enumerate(logprobs):
        mask = masks[i] if weights is None else masks[i] & (weights[i] != 0)
        if weights is not None and not bool(mask.any()):
            continue
        out = fn(
            LossInputs(
                lp,
                inference[i],
                None if ref is None else ref[i],
                advantages[i],
                mask,
                None if weights is None else weights[i],
            )
        )
        total = total + out.loss
        for name, value in out.metrics.items():
            metrics.setdefault(name, []).append(value)
    return total / scale, {name: torch.stack(values) for name, values in metrics.items()}


class PrimeLmOutput(TypedDict, total=False):
    logits: Any
    logprobs: Any
    entropy: Any
    loss: Any


class FusedOutputLinear(nn.Linear):
    softcap = None

    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None):
        assert labels is not None, (
            "FusedOutputLinear requires labels for chunked logprob computation"
        )
        assert temperature is not None, "FusedOutputLinear requires per-token temperatures"
        logits = (hidden_states @ self.weight.t()).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logp = (logits * (1.0 / temperature)[..., None]).log_softmax(-1)
        chosen = logp.gather(-1, labels[..., None])[..., 0]
        return PrimeLmOutput(logprobs=chosen, entropy=-(logp.exp() * logp).sum(-1).detach())


class GemmaFusedOutputLinear(FusedOutputLinear):
    def __init__(self, in_features, out_features, chunk_size, softcap):
        super().__init__(in_features, out_features, chunk_size)
        self.softcap = softcap

    def forward(self, hidden_states, labels=None, temperature=None):
        return FusedOutputLinear.forward(self, hidden_states, labels, temperature)


def install(patch):
    """The modules that the adapter imports, while ``patch`` lasts."""
    names = (
        "prime_rl",
        "prime_rl.trainer",
        "prime_rl.trainer.models",
        "prime_rl.trainer.models.layers",
        "prime_rl.trainer.rl",
    )
    modules = {name: types.ModuleType(name) for name in names}
    contents = {
        "prime_rl.trainer.rl.loss": {"LossInputs": LossInputs, "LossOutputs": LossOutputs},
        "prime_rl.trainer.models.layers.lm_head": {
            "FusedOutputLinear": FusedOutputLinear,
            "PrimeLmOutput": PrimeLmOutput,
        },
        "prime_rl.trainer.models.layers.lm_head_gemma": {
            "GemmaFusedOutputLinear": GemmaFusedOutputLinear
        },
    }
    for name, members in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, modules[name])
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
