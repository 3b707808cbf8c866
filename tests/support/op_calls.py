"""Calls of every public op as functions of fp32 or fp64 logits, for torch.export and
transforms.
"""

import torch

import reweight_ops as rw
from reweight_ops.testing import make_batch
from reweight_ops.testing.pairs import make_pairs

SPEC = rw.methods.grpo(beta=0.1, entropy_coef=0.01)
VOCAB = 23
BATCH = make_batch(SPEC, (4, 8), VOCAB)
LOGITS, IDS = BATCH.pop("logits").detach(), BATCH["completion_ids"]
STORED = {name: value for name, value in BATCH.items() if name != "completion_ids"}
PAIRS = make_pairs(rw.preference.dpo(), 2, 8, VOCAB)
PAIRS.pop("logits")
REFERENCE = {
    "ref_per_token_logps": PAIRS["ref_per_token_logps"],
    "completion_mask": PAIRS["completion_mask"],
}
OTHER = LOGITS.roll(1, -1)
WEIGHT = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(0))
STATS = (
    "logps",
    "entropies",
    "lse",
    "log_sum_p_sq",
    "max_logp",
    "is_top1",
    "log1m_p",
    "mean_logits",
)


def logps(z):
    return z[..., 0] - 5


def seen(out):
    """The outputs of a policy loss that every way of running it can return."""
    return (
        out.loss,
        out.per_token_logps,
        out.ratio,
        out.per_token_loss,
        out.is_clipped,
        out.metrics["entropy"],
        out.metrics["kl"],
    )


def linear_stats(z):
    found = rw.linear_token_stats(z[..., :6], WEIGHT.to(z.dtype), IDS, stats=STATS, chunk_rows=8)
    return tuple(getattr(found, name) for name in STATS)


def teacher(z):
    return rw.HiddenLogits(OTHER[..., :5].to(z.dtype), WEIGHT[:, :5].to(z.dtype))


#: Public op to its calls on logits.
CALLS = {
    "token_logps": [
        lambda z: rw.token_logps(z, IDS, return_entropy=True),
        lambda z: rw.token_logps(
            z, IDS.clamp(max=19), temperature=torch.linspace(0.5, 2, 4), softcap=5.0, vocab_size=20
        ),
    ],
    "token_stats": [
        lambda z: tuple(getattr(rw.token_stats(z, IDS, stats=STATS), name) for name in STATS)
    ],
    "policy_loss": [
        lambda z: seen(rw.policy_loss(z, **BATCH, spec=SPEC)),
        lambda z: seen(rw.policy_loss(z, **BATCH, spec=SPEC, plan="two_pass")),
        lambda z: rw.policy_loss(z, **BATCH, spec="gspo", unused="ignore").loss,
        lambda z: (
            rw.policy_loss(z, **BATCH, spec=rw.methods.dapo(epsilon_high=0.3), unused="ignore").loss
        ),
    ],
    "policy_loss_from_logps": [
        lambda z: rw.policy_loss_from_logps(logps(z), **STORED, spec=rw.methods.grpo(beta=0.1)).loss
    ],
    "linear_token_logps": [
        lambda z: rw.linear_token_logps(z[..., :6], WEIGHT.to(z.dtype), IDS, chunk_rows=8)
    ],
    "linear_token_stats": [linear_stats],
    "linear_token_divergence": [
        lambda z: rw.linear_token_divergence(
            z[..., :6], WEIGHT.to(z.dtype), teacher(z), kind="jeffreys", chunk_rows=8
        ),
        lambda z: rw.linear_token_divergence(
            z[..., :6], WEIGHT.to(z.dtype), OTHER.to(z.dtype), kind="generalized_jsd", chunk_rows=8
        ),
    ],
    "linear_distillation_loss": [
        lambda z: (
            rw.linear_distillation_loss(
                z[..., :6], WEIGHT.to(z.dtype), teacher(z), kind="reverse_kl", chunk_rows=8
            ).loss
        ),
        lambda z: (
            rw.linear_distillation_loss(
                z[..., :6], WEIGHT.to(z.dtype), teacher(z), kind="generalized_jsd", plan="two_pass"
            ).loss
        ),
    ],
    "linear_policy_loss": [
        lambda z: rw.linear_policy_loss(z[..., :6], WEIGHT.to(z.dtype), **BATCH, spec=SPEC).loss,
        lambda z: (
            rw.linear_policy_loss(
                z[..., :6], WEIGHT.to(z.dtype), **BATCH, spec=SPEC, plan="two_pass", chunk_rows=8
            ).loss
        ),
    ],
    "token_divergence": [
        lambda z: rw.token_divergence(z, OTHER.to(z.dtype), kind="jeffreys"),
        lambda z: rw.token_divergence(z, OTHER.to(z.dtype), kind="generalized_jsd", beta=0.3),
    ],
    "distillation_loss": [
        lambda z: rw.distillation_loss(z, OTHER.to(z.dtype), kind="reverse_kl").loss
    ],
    "preference_loss": [lambda z: rw.preference_loss(z, **PAIRS, spec="dpo").loss],
    "preference_loss_from_logps": [
        lambda z: rw.preference_loss_from_logps(logps(z), **REFERENCE, spec="dpo").loss
    ],
    "linear_preference_loss": [
        lambda z: (
            rw.linear_preference_loss(z[..., :6], WEIGHT.to(z.dtype), **PAIRS, spec="dpo").loss
        )
    ],
}
