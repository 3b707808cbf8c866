"""TRL's ``GRPOTrainer._compute_loss`` on a stand-in for the trainer, and its heads."""

from __future__ import annotations

import collections
import itertools
import types
from collections.abc import Iterator
from types import SimpleNamespace

import torch

import reweight_ops as rw

from .batch import batch, logits
from .table import Case, result

TOKENS = 41.0
EXTRAS = {
    "": {},
    "kl": dict(beta=0.04),
    "kl uncorrected": dict(beta=0.04, use_bias_correction_kl=False),
    "delta": dict(delta=1.3, epsilon_high=0.28),
    "entropy bonus": dict(entropy_coef=0.02),
    "top entropy": dict(top_entropy_quantile=0.4),
    "opsm": dict(off_policy_mask_threshold=-0.1),
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def trainer(
    loss_type: str, level: str, settings: dict, statistics: tuple[torch.Tensor, torch.Tensor]
) -> SimpleNamespace:
    """What the loss reads of a ``GRPOTrainer``."""
    from trl import GRPOTrainer

    options = (
        dict(
            beta=0.0,
            use_bias_correction_kl=True,
            delta=None,
            epsilon=0.2,
            epsilon_high=0.2,
            entropy_coef=0.0,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
        )
        | settings
    )
    alone = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction=None: x,
        pad_across_processes=lambda x, dim, pad_index: x,
        device=torch.device("cpu"),
    )
    args = SimpleNamespace(
        use_bias_correction_kl=options["use_bias_correction_kl"],
        delta=options["delta"],
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    self = SimpleNamespace(
        args=args, accelerator=alone, model=SimpleNamespace(training=True), loss_type=loss_type, importance_sampling_level=level, beta=options["beta"],
        epsilon_low=options["epsilon"], epsilon_high=options["epsilon_high"], top_entropy_quantile=options["top_entropy_quantile"],
        off_policy_mask_threshold=options["off_policy_mask_threshold"], max_completion_length=16, current_gradient_accumulation_steps=1,
        use_vllm=True, vllm_importance_sampling_correction=True, aux_loss_enabled=False, use_adaptive_entropy=False,
        entropy_coef=options["entropy_coef"], _entropy_bonus_enabled=options["entropy_coef"] != 0, _entropy_window_stats=None,
        _metrics={"train": collections.defaultdict(list)}, _get_per_token_logps_and_entropies=lambda *a, **k: (*statistics, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    self.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, self)
    return self


def losses() -> Iterator[Case]:
    """Every loss type at both levels with every extra, and the sampler's ratio."""
    from trl import GRPOTrainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    for loss_type, level, (name, extra) in itertools.product(
        LOSS_TYPES, ("token", "sequence"), EXTRAS.items()
    ):
        if (loss_type in ("cispo", "sapo", "vespo") and "delta" in extra) or (
            loss_type == "vespo" and level == "sequence"
        ):
            continue  # it reads none; and ours is an error that says so
        settings = dict(extra) | ({"epsilon_high": 1.15} if loss_type == "cispo" else {})
        b = batch(temperature=0.9)

        def theirs(b=b, loss_type=loss_type, level=level, settings=settings):
            z = logits(b) / 0.9
            stats = selective_log_softmax(z, b.ids), entropy_from_logits(z)
            ones = torch.ones_like(b.mask[:, :1])
            inputs = {
                "prompt_ids": ones.long(), "prompt_mask": ones, "completion_ids": b.ids, "completion_mask": b.mask, "advantages": b.advantages,
                "old_per_token_logps": b.old, "ref_per_token_logps": b.ref, "num_items_in_batch": torch.tensor(TOKENS),
                "importance_sampling_ratio": torch.ones_like(b.ratio) if loss_type == "vespo" else b.ratio,
            }  # fmt: skip
            return result(
                GRPOTrainer._compute_loss(trainer(loss_type, level, settings, stats), None, inputs),
                *b.leaves,
            )

        def ours(b=b, loss_type=loss_type, level=level, settings=settings):
            spec = rw.methods.trl(
                loss_type,
                importance_sampling_level=level,
                max_completion_length=16,
                unused="ignore",
                **settings,
            )
            more = {} if loss_type == "vespo" else {"importance_sampling_ratio": b.ratio}
            more |= (
                {"num_items_in_batch": TOKENS} if loss_type in ("dapo", "cispo", "vespo") else {}
            )
            out = rw.linear_policy_loss(
                b.hidden,
                b.weight,
                b.ids,
                b.advantages,
                spec=spec,
                lm_head_bias=b.bias,
                temperature=0.9,
                completion_mask=b.mask,
                old_per_token_logps=b.old,
                ref_per_token_logps=b.ref,
                unused="ignore",
                **more,
            )
            return result(out.loss, *b.leaves)

        yield Case("TRL loss", " ".join(filter(None, (loss_type, level, name))), theirs, ours)


def heads() -> Iterator[Case]:
    """Log-probs and entropies, and divergences, from hidden states."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    for softcap, temperature, scale in itertools.product((None, 5.0), (1.0, 0.7), (1.0, 0.4)):
        b = batch()
        flat, ids = b.hidden.flatten(0, 1), b.ids.flatten()

        def theirs(b=b, flat=flat, ids=ids, softcap=softcap, temperature=temperature, scale=scale):
            logps, entropies, *_ = ChunkedLogProbFunction.apply(
                flat, b.weight, b.bias, ids, temperature, 7, softcap, scale
            )
            return result((logps + 0.3 * entropies) * b.ratio.flatten(), *b.leaves)

        def ours(b=b, flat=flat, ids=ids, softcap=softcap, temperature=temperature, scale=scale):
            logps, entropies = rw.linear_token_logps(
                flat,
                b.weight,
                ids,
                lm_head_bias=b.bias,
                return_entropy=True,
                temperature=temperature,
                softcap=softcap,
                logit_scale=scale,
                chunk_rows=7,
            )
            return result((logps + 0.3 * entropies) * b.ratio.flatten(), *b.leaves)

        yield Case(
            "TRL head", f"softcap {softcap} temperature {temperature} scale {scale}", theirs, ours
        )
    for beta, softcap in itertools.product((0.0, 0.3, 1.0), (None, 5.0)):
        b, other = batch(), batch(seed=1)
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "generalized_jsd")
        teacher = (other.hidden.detach().flatten(0, 1), other.weight.detach(), other.bias.detach())

        def theirs(b=b, beta=beta, softcap=softcap, teacher=teacher):
            flat = b.hidden.flatten(0, 1)
            found, _ = ChunkedDivergenceFunction.apply(
                flat, b.weight, b.bias, *teacher, beta, 0.8, 1.3, softcap, 0.7, 4.0
            )
            return result(found * b.ratio.flatten(), *b.leaves)

        def ours(b=b, beta=beta, softcap=softcap, kind=kind, teacher=teacher):
            found = rw.linear_token_divergence(
                b.hidden.flatten(0, 1),
                b.weight,
                rw.HiddenLogits(*teacher, 0.7),
                kind=kind,
                beta=beta if kind == "generalized_jsd" else None,
                temperature=0.8,
                softcap=softcap,
                other_softcap=4.0,
                logit_scale=1.3,
                lm_head_bias=b.bias,
                chunk_rows=7,
            )
            return result(found * b.ratio.flatten(), *b.leaves)

        yield Case("TRL divergence", f"beta {beta} softcap {softcap}", theirs, ours)
