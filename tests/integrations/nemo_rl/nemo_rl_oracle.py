"""NeMo-RL 7ea279ab around a loss, and its own, transcribed.

From ``nemo_rl/algorithms/loss/`` (``interfaces.py``,
``loss_functions.py:ClippedPGLossFn``, ``utils.py:prepare_loss_input``,
``wrapper.py:SequencePackingLossWrapper``) and ``nemo_rl/algorithms/utils.py``
(``calculate_kl``, ``masked_mean``); one rank, no filtering.
"""

import enum
import math
import sys
import types
from dataclasses import dataclass

import torch


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


@dataclass
class ClippedPGLossConfig:
    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0


def masked_mean(values, mask, dim=None, global_normalization_factor=None):
    divisor = mask.sum(dim) if global_normalization_factor is None else global_normalization_factor
    return (values * mask).sum(dim) / (divisor + 1e-8)


def calculate_kl(logprobs, reference, kind, input_clamp, output_clamp, weights=None):
    logr = reference - logprobs
    if input_clamp is not None:
        clamped = logr.clamp(min=-input_clamp, max=input_clamp)
        if weights is not None:
            weights = torch.where(logr == clamped, weights, weights.detach())
        logr = clamped
    kl = {
        "k1": lambda: -logr,
        "k2": lambda: logr.square() / 2,
        "k3": lambda: logr.exp() - 1 - logr,
    }[kind]()
    if weights is not None:
        kl = weights * kl
    return kl if output_clamp is None else kl.clamp(min=-output_clamp, max=output_clamp)


class ClippedPGLossFn:
    input_type = LossInputType.LOGPROB
    use_fused_linear_logprobs = False

    def __init__(self, cfg):
        self.cfg = cfg
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL

    def reduced(self, x, token_mask, sample_mask, seqs, toks):
        if self.loss_type == LossType.TOKEN_LEVEL:
            return masked_mean(
                x, token_mask * sample_mask.unsqueeze(-1), global_normalization_factor=toks
            )
        return masked_mean(
            masked_mean(x, token_mask, dim=-1), sample_mask, global_normalization_factor=seqs
        )

    def weights(self, prev, generation, mask, token_mask):
        cfg = self.cfg
        low, high = (
            cfg.truncated_importance_sampling_ratio_min,
            cfg.truncated_importance_sampling_ratio,
        )
        drift = prev - generation
        w = (
            (drift * mask).sum(-1).exp().unsqueeze(-1)
            if cfg.sequence_level_importance_ratios
            else drift.exp()
        )
        if cfg.truncated_importance_sampling_type == "tis":
            w = w.clamp(min=low or 0.0, max=high)
        elif cfg.truncated_importance_sampling_type == "icepop":
            w = torch.where((w >= low) & (w <= high), w, torch.zeros_like(w))
        elif cfg.truncated_importance_sampling_type == "seq-mask-tis":
            mean = masked_mean(drift, token_mask, dim=-1).exp()
            w = w * ((mean >= low) & (mean <= high)).float().unsqueeze(-1)
        return w

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        cfg, curr = self.cfg, next_token_logprobs
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        advantages, generation = data["advantages"][:, 1:], data["generation_logprobs"][:, 1:]
        mask = token_mask * sample_mask.unsqueeze(-1)
        prev = curr.detach() if cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        token = lambda x: masked_mean(x, mask, global_normalization_factor=global_valid_toks).item()  # noqa: E731
        mixture = torch.log(0.5 * prev.exp() + 0.5 * generation.exp())
        js = 0.5 * ((prev - mixture).exp() - (prev - mixture) - 1) + 0.5 * (
            (generation - mixture).exp() - (generation - mixture) - 1
        )
        kind = cfg.reference_policy_kl_type
        metrics = {
            "token_mult_prob_error": token(((generation - prev).abs() * mask).exp()),
            "gen_kl_error": token(calculate_kl(generation, prev, kind, None, None)),
            "policy_kl_error": token(calculate_kl(prev, generation, kind, None, None)),
            "js_divergence_error": token(js),
            "num_valid_samples": sample_mask.sum().item(),
        }
        coef = 0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        kl = torch.tensor(0.0)
        if coef != 0:
            own = (curr - curr.detach()).exp()
            bounds = cfg.kl_input_clamp_value, cfg.kl_output_clamp_value
            kl = coef * calculate_kl(
                curr, data["reference_policy_logprobs"][:, 1:], kind, *bounds, own
            )
            kl = self.reduced(kl, token_mask, sample_mask, global_valid_seqs, global_valid_toks)
            metrics["kl_penalty"] = kl.item() / coef
        if cfg.force_on_policy_ratio:
            ratios = bounded = (curr - curr.detach()).exp()
        elif cfg.disable_ppo_ratio:
            ratios = bounded = curr
        else:
            log_ratios = curr - prev
            if cfg.sequence_level_importance_ratios:
                log_ratios = (
                    masked_mean(log_ratios, token_mask, dim=-1)
                    .unsqueeze(-1)
                    .repeat(1, advantages.shape[1])
                )
            ratios = log_ratios.exp()
            bounded = ratios.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
        loss = (
            -advantages * bounded.detach() * curr
            if cfg.use_cispo
            else torch.max(-advantages * ratios, -advantages * bounded)
        )
        if cfg.ratio_clip_c is not None:
            loss = torch.where(
                advantages < 0, torch.min(loss, -advantages * cfg.ratio_clip_c), loss
            )
        w = self.weights(prev, generation, mask, token_mask)
        if cfg.use_importance_sampling_correction:
            loss = w * loss
        loss = (
            self.reduced(loss, token_mask, sample_mask, global_valid_seqs, global_valid_toks) + kl
        )
        metrics["approx_entropy"] = -token((curr - generation).detach().exp() * curr.detach())
        if not cfg.disable_ppo_ratio:
            metrics["probs_ratio"] = token(ratios.detach())
            inside = ratios.detach()[mask.bool()].tolist()
            metrics |= {
                "probs_ratio_min": min(inside, default=math.inf),
                "probs_ratio_max": max(inside, default=-math.inf),
            }
        metrics["loss"] = loss.item()
        return loss, metrics


def prepare_loss_input(logits, data, loss_fn):
    if loss_fn.input_type == LossInputType.LOGIT:
        return {"logits": logits}
    assert loss_fn.input_type == LossInputType.LOGPROB and not loss_fn.use_fused_linear_logprobs
    logps = logits.to(torch.float32)[:, :-1].log_softmax(-1)
    return {
        "next_token_logprobs": logps.gather(-1, data["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    }


def loss_of(loss_fn, logits, data, seqs, toks):
    """``LossPostProcessor``: logits, already over the temperature, to
    loss and metrics."""
    return loss_fn(
        data=data,
        global_valid_seqs=seqs,
        global_valid_toks=toks,
        **prepare_loss_input(logits, data, loss_fn),
    )


def packed_loss_of(loss_fn, logits, data, seqs, toks, lengths, padded):
    """``SequencePackingLossWrapper``: ``[1, T, V]`` of sequences padded to ``padded``
    each, one at a time.
    """
    total, start = 0, 0
    for i, (length, room) in enumerate(zip(lengths, padded, strict=True)):
        one = {k: v[i : i + 1, :length] if v.ndim > 1 else v[i : i + 1] for k, v in data.items()}
        # from_parallel_logits_to_logprobs cuts what the padding has
        if loss_fn.input_type == LossInputType.LOGPROB:
            total = total + loss_of(loss_fn, logits.narrow(1, start, length), one, seqs, toks)[0]
        else:
            total = total + loss_of(loss_fn, logits.narrow(1, start, room), one, seqs, toks)[0]
        start += room
    return total


def install(patch):
    """The module that the adapter imports, while ``patch`` lasts."""
    names = (
        "nemo_rl",
        "nemo_rl.algorithms",
        "nemo_rl.algorithms.loss",
        "nemo_rl.algorithms.loss.interfaces",
    )
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[names[-1]]).update(
        LossType=LossType, MetricNormalizer=MetricNormalizer, LossInputType=LossInputType
    )
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
