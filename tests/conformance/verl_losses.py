"""verl's registered policy losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import reweight_ops as rw

from .batch import batch
from .table import Case, Result

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
MODES = (
    "vanilla",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "cispo",
    "dppo_tv",
    "dppo_kl",
    "dro",
)
#: So that something happens, and no choice is left to a random generator.
OWN = {
    "clip_cov": {"clip_cov_ratio": 0.4, "clip_cov_lb": 0.4},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3},
    "dro": {"dro_beta": 0.5},
    "dppo_tv": {},
    "dppo_kl": {},
}


def losses() -> Iterator[Case]:
    from trainers import on_path, stand_ins

    on_path()
    with stand_ins("ray"):
        from verl.trainer.ppo import core_algos
        from verl.workers.config import ActorConfig
        from verl.workers.config.actor import PolicyLossConfig

    for mode, aggregation in itertools.product(MODES, AGGREGATIONS):
        b = batch()
        own, mask = OWN.get(mode, {}), b.mask.bool()
        logps = (b.old + 0.4 * (b.token_advantages.roll(1, 0))).clamp(max=-1e-3).requires_grad_()
        # Of sequences where the mode is: verl takes a token's, and a mean over them.
        per_sequence = mode == "geo_mean"
        advantages = b.advantages[:, None].expand_as(logps) if per_sequence else b.token_advantages
        bounds = dict(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=2.0)

        def theirs(
            mode=mode,
            aggregation=aggregation,
            own=own,
            logps=logps,
            advantages=advantages,
            b=b,
            mask=mask,
            bounds=bounds,
        ):
            config = ActorConfig(
                strategy="fsdp",
                ppo_micro_batch_size_per_gpu=1,
                rollout_n=1,
                **bounds,
                policy_loss=PolicyLossConfig(**own),
            )
            loss, _ = core_algos.get_policy_loss_fn(mode)(
                old_log_prob=b.old,
                log_prob=logps,
                advantages=advantages,
                response_mask=mask,
                loss_agg_mode=aggregation,
                config=config,
            )
            return Result(loss.detach(), torch.autograd.grad(loss, logps))

        def ours(
            mode=mode,
            aggregation=aggregation,
            own=own,
            logps=logps,
            per_sequence=per_sequence,
            b=b,
            mask=mask,
            bounds=bounds,
        ):
            spec = rw.methods.verl(
                mode, loss_agg_mode=aggregation, unused="ignore", **bounds, **own
            )
            given = b.advantages if per_sequence else b.token_advantages
            out = rw.policy_loss_from_logps(
                logps,
                given,
                spec=spec,
                completion_mask=mask,
                old_per_token_logps=b.old,
                unused="ignore",
            )
            return Result(out.loss.detach(), torch.autograd.grad(out.loss, logps))

        yield Case("verl", f"{mode} {aggregation}", theirs, ours)
