"""One small call of every public op, by name. It is for tests of settings that no op
may depend on (default dtype, default device, anomaly mode).

Inputs have named dtypes and are on the CPU, whatever the process's defaults are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import reweight_ops as rw
from reweight_ops import Lora
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.engine.distillation import KINDS
from reweight_ops.testing import make_batch
from reweight_ops.testing.golden import result_of
from reweight_ops.testing.golden_rows import GOLDEN
from reweight_ops.testing.pairs import make_divergence, make_pairs

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
SHAPE, VOCAB, WIDTH = (2, 4), 19, 6
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

Call = Callable[[], list[Tensor]]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def with_gradients(total: Tensor, leaves: list[Tensor], *shown: Tensor) -> list[Tensor]:
    """Values and gradients of one call."""
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [total.detach(), *(x.detach() for x in shown), *(g for g in grads if g is not None)]


def _policy(spec, batch, plan, backend) -> list[Tensor]:
    z = leaf(batch["logits"])
    out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, plan=plan, backend=backend)
    return with_gradients(
        out.loss.sum(),
        [z],
        out.per_token_logps,
        out.per_token_loss,
        out.ratio,
        out.coef,
        out.metrics.sums,
    )


def _from_logps(spec, batch) -> list[Tensor]:
    rest = {k: v for k, v in batch.items() if k not in ("logits", "completion_ids")}
    log_p = torch.log_softmax(batch["logits"].detach(), -1)
    leaves = {"per_token_logps": log_p.gather(-1, batch["completion_ids"][..., None])[..., 0]}
    leaves["entropies"] = -(log_p.exp() * log_p).sum(-1)
    if "log_sum_p_sq" in spec.requires:
        leaves["log_sum_p_sq"] = (2 * log_p).logsumexp(-1)
    leaves = {k: leaf(v) for k, v in leaves.items()}
    out = rw.policy_loss_from_logps(**leaves, **rest, spec=spec)
    return with_gradients(out.loss.sum(), list(leaves.values()), out.metrics.sums)


def _stats(batch, backend, **options) -> list[Tensor]:
    z = leaf(batch["logits"])
    found = rw.token_stats(
        z,
        batch["completion_ids"],
        completion_mask=batch["completion_mask"],
        stats=STATS,
        backend=backend,
        **options,
    )
    return with_gradients(
        found.logps.sum() + found.entropies.sum() + found.lse.sum(),
        [z],
        *(getattr(found, name) for name in STATS),
    )


def _logps(batch, backend) -> list[Tensor]:
    z = leaf(batch["logits"])
    logps, entropies = rw.token_logps(
        z, batch["completion_ids"], return_entropy=True, backend=backend
    )
    return with_gradients(logps.sum() + entropies.sum(), [z], logps)


def _preference(spec, batch, backend) -> list[Tensor]:
    z, rest = leaf(batch["logits"]), dict(batch)
    out = rw.preference_loss(**{**rest, "logits": z}, spec=spec, backend=backend)
    return with_gradients(out.loss, [z], out.per_pair_loss, out.chosen_rewards, out.metrics.sums)


def _divergence(batch, kind, backend) -> list[Tensor]:
    z = leaf(batch["logits"])
    value = rw.token_divergence(
        z,
        batch["other_logits"],
        kind=kind,
        completion_mask=batch["completion_mask"],
        backend=backend,
    )
    return with_gradients(value.sum(), [z], value)


def _distillation(batch, kind, plan, backend) -> list[Tensor]:
    z = leaf(batch["logits"])
    out = rw.distillation_loss(
        z,
        batch["other_logits"],
        kind=kind,
        completion_mask=batch["completion_mask"],
        plan=plan,
        backend=backend,
    )
    return with_gradients(
        out.loss, [z], out.per_token_divergence, out.entropies, out.teacher_entropies
    )


def _composite(name, batch) -> list[Tensor]:
    z, teacher, ids = leaf(batch["logits"]), batch["other_logits"], batch["completion_ids"]
    d, mask = rw.divergences, {"completion_mask": batch["completion_mask"]}
    value = {
        "symmetric_cross_entropy": lambda: d.symmetric_cross_entropy(z, teacher, **mask),
        "confidence_masked_kl": lambda: d.confidence_masked_kl(
            z, teacher, threshold=0.2, sharpening_temperature=0.5, **mask
        ),
        "pld": lambda: d.pld(z, teacher, ids, **mask),
        "dhkd": lambda: d.dhkd(z, teacher, **mask),
        "ldr": lambda: d.ldr(z, ids, **mask),
        "stablemax": lambda: d.stablemax(z, ids, **mask),
    }[name]()
    return with_gradients(value.sum(), [z], value)


def head(dtype: torch.dtype, lora: bool) -> dict:
    """Leaves of a small LM head, and of its hidden states."""
    g = torch.Generator().manual_seed(3)
    sizes = {
        "hidden": (*SHAPE, WIDTH),
        "weight": (VOCAB, WIDTH),
        "bias": (VOCAB,),
        "a": (2, WIDTH),
        "b": (VOCAB, 2),
    }
    made = {
        name: torch.randn(size, generator=g, dtype=torch.float64, device="cpu").to(dtype)
        for name, size in sizes.items()
    }
    return made if lora else {name: x for name, x in made.items() if name not in ("a", "b")}


def _linear_distillation(op, made, two, options) -> list[Tensor]:
    """Divergence of the hidden states to the logits ``two`` of another model, and to a
    head on them as its hidden states.
    """
    leaves = {name: leaf(x) for name, x in made.items()}
    other = two["other_logits"].to(leaves["hidden"].dtype)
    found: list[Tensor] = []
    for teacher in (
        other,
        rw.HiddenLogits(other, torch.eye(VOCAB, dtype=other.dtype, device=other.device)),
    ):
        out = op(
            leaves["hidden"],
            leaves["weight"],
            teacher,
            lm_head_bias=leaves["bias"],
            chunk_rows=3,
            **options,
        )
        total, shown = (
            (out.sum(), [out])
            if isinstance(out, Tensor)
            else (out.loss, [out.per_token_divergence, out.entropies])
        )
        found += with_gradients(total, list(leaves.values()), *shown)
    return found


def linear(op, made, ids, options) -> list[Tensor]:
    leaves = {name: leaf(x) for name, x in made.items()}
    more = {"lora": Lora(leaves["a"], leaves["b"], 0.5)} if "a" in leaves else {}
    found = op(
        leaves["hidden"],
        leaves["weight"],
        ids,
        lm_head_bias=leaves["bias"],
        chunk_rows=3,
        **more,
        **options,
    )
    if isinstance(found, rw.TokenStats):
        total, shown = (
            found.logps.sum() + found.entropies.sum() + found.lse.sum(),
            [getattr(found, name) for name in STATS],
        )
    else:
        total, shown = (
            (found.sum(), [found])
            if isinstance(found, Tensor)
            else (found.loss.sum(), [found.metrics.sums])
        )
    return with_gradients(total, list(leaves.values()), *shown)


def calls(backends: list[str] = BACKENDS) -> dict[str, Call]:
    """Calls by name. Each returns the same tensors at every run."""
    made: dict[str, Call] = {}
    for name in sorted(METHODS):
        spec = METHODS[name].build()
        batch = make_batch(spec, SHAPE, VOCAB)
        batch["logits"] = batch["logits"].detach()
        made[f"policy_loss_from_logps {name}"] = partial(_from_logps, spec, batch)
        for plan in ("two_pass",) if spec.one_pass_unsupported_reason else ("one_pass", "two_pass"):
            made |= {
                f"policy_loss {name} {plan} {b}": partial(_policy, spec, batch, plan, b)
                for b in backends
            }
    batch = make_batch(rw.methods.grpo(), SHAPE, VOCAB)
    ids, mask, adv = batch["completion_ids"], batch["completion_mask"], batch["advantages"]
    heat = torch.linspace(0.5, 2.0, SHAPE[0] * SHAPE[1], dtype=torch.float32, device="cpu").view(
        SHAPE
    )
    bounds = (-1.5, torch.tensor(0.3, dtype=torch.float32, device="cpu"))
    clamped = rw.methods.grpo().replace(ratio=rw.TokenRatio(clamp=bounds))
    for b in backends:
        made[f"token_stats {b}"] = partial(_stats, batch, b)
        made[f"token_stats softcap temperature {b}"] = partial(
            _stats, batch, b, softcap=5.0, temperature=heat
        )
        made[f"token_logps {b}"] = partial(_logps, batch, b)
        made[f"policy_loss clamp {b}"] = partial(_policy, clamped, batch, "two_pass", b)
        for dtype in (torch.float32, torch.bfloat16):
            parts = head(dtype, lora=True)
            options = {"completion_mask": mask, "backend": b}
            made[f"linear_token_logps {dtype} {b}"] = partial(
                linear, rw.linear_token_logps, parts, ids, options
            )
            made[f"linear_token_stats {dtype} {b}"] = partial(
                linear, rw.linear_token_stats, parts, ids, {**options, "stats": STATS}
            )
            for plan in ("one_pass", "two_pass"):
                loss = {**options, "advantages": adv, "spec": "grpo", "plan": plan}
                made[f"linear_policy_loss {plan} {dtype} {b}"] = partial(
                    linear, rw.linear_policy_loss, parts, ids, loss
                )
            pairs = {**options, "spec": "simpo"}
            made[f"linear_preference_loss {dtype} {b}"] = partial(
                linear, rw.linear_preference_loss, parts, ids, pairs
            )
    pair_specs = {name: entry.build() for name, entry in sorted(CATALOGUE["pair_loss"].items())}
    for name, spec in {**pair_specs, "dpo ld_alpha": rw.preference.dpo(ld_alpha=0.3)}.items():
        pairs = make_pairs(spec, 2, 4, VOCAB)
        made |= {
            f"preference_loss {name} {b}": partial(_preference, spec, pairs, b) for b in backends
        }
    two = make_divergence(SHAPE, VOCAB, torch.float32)
    for b in backends:
        made |= {
            f"token_divergence {kind} {b}": partial(_divergence, two, kind, b)
            for kind in (*KINDS, "generalized_jsd")
        }
        for kind in (*KINDS, "generalized_jsd"):
            options = {"kind": kind, "completion_mask": two["completion_mask"], "backend": b}
            parts = head(torch.float32, lora=False)
            made[f"linear_token_divergence {kind} {b}"] = partial(
                _linear_distillation, rw.linear_token_divergence, parts, two, options
            )
            for plan in ("one_pass", "two_pass"):
                planned = {**options, "plan": plan}
                made[f"linear_distillation_loss {kind} {plan} {b}"] = partial(
                    _linear_distillation, rw.linear_distillation_loss, parts, two, planned
                )
        for plan in ("one_pass", "two_pass"):
            made |= {
                f"distillation_loss {kind} {plan} {b}": partial(_distillation, two, kind, plan, b)
                for kind in KINDS
            }
    for name in (
        "symmetric_cross_entropy",
        "confidence_masked_kl",
        "pld",
        "dhkd",
        "ldr",
        "stablemax",
    ):
        made[f"divergences.{name}"] = partial(_composite, name, two)
    return made


def golden_calls() -> dict[str, Call]:
    """Golden rows, in fp32, of the functions before the loss."""

    def run(row) -> list[Tensor]:
        return [
            torch.tensor(result_of(row, torch.float32, "cpu"), dtype=torch.float64, device="cpu")
        ]

    return {f"golden {row.kind} {row.name} {i}": partial(run, row) for i, row in enumerate(GOLDEN)}
