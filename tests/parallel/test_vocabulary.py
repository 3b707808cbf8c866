"""A vocabulary in shards over gloo ranks is one process's: losses, log-probs,
statistics and gradients, by the package's criterion or to fp64.
"""

import math

import pytest
import torch
from split_calls import Split, differences, errors_of

import reweight_ops as rw
from reweight_ops._core.calls.specs import METHODS


def policy(ranks, cases):
    wrong = []
    for name, split, options in cases:
        spec = METHODS[name].build() if isinstance(name, str) else name
        wrong += [
            f"{name} {split} {options}: {e}"
            for e in errors_of(spec, Split(**split).place(ranks), **options)
        ]
    return wrong


def check(four, cases):
    four.check(policy, cases)


def test_every_backend_and_dtype(four):
    """Uneven shards, and a padded vocabulary of which the last rank has
    padding only."""
    splits = [dict(vocab=4), dict(vocab=4, padding=90), dict(data=2, vocab=2)]
    cases = [
        ("dapo", split, dict(backend=backend, dtype=dtype, divisors=("num_items_in_batch",)))
        for split in splits
        for backend, dtype in [
            ("cpu", torch.float32),
            ("cpu", torch.bfloat16),
            ("reference", torch.float32),
            ("reference", torch.float64),
            ("triton", torch.float16),
        ]
    ]
    check(four, cases)


def test_losses_of_every_kind(four):
    specs = [
        "gspo",
        "cispo",
        rw.methods.grpo(beta=0.1),
        rw.methods.trl(entropy_coef=0.01),
        rw.methods.disco(group_size=2),
    ]
    check(four, [(spec, dict(vocab=4), dict(temperature=0.7, softcap=20.0)) for spec in specs])


@pytest.mark.slow
def test_every_method(four):
    check(four, [(name, dict(vocab=4), {}) for name in METHODS])


def normal(g, *shape, scale=1.0):
    return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()


def rows(g, vocab=37):
    """Logits of every kind of row: plain, sure, with shards of nothing but -inf, one of
    nothing else, one with NaN, one that is ignored.
    """
    z = normal(g, 12, vocab, scale=2.0).detach()
    ids = torch.randint(vocab, (12,), generator=g)
    z[0, ids[0]] += 60  # sure
    z[1, : vocab // 2] = -math.inf
    z[1, vocab - 3] = 5.0
    z[2] = -math.inf
    z[2, 5] = 1.0
    z[3] = -math.inf
    z[4, 11] = math.nan
    z[5] += 1e5
    ids[6] = -100
    z[6] = math.nan
    return z.requires_grad_(), ids


def statistics(t, **options):
    names = (
        "logps",
        "entropies",
        "lse",
        "log_sum_p_sq",
        "max_logp",
        "is_top1",
        "log1m_p",
        "mean_logits",
    )
    found = rw.token_stats(
        t["logits"],
        t["ids"],
        stats=names,
        temperature=t.get("temperature", 1.0),
        softcap=t.get("softcap"),
        **options,
    )
    return [getattr(found, name) for name in names]


def linear(op, *names):
    def call(t, **options):
        lora = rw.Lora(t["a"], t["b"], 0.5) if "a" in t else None
        head = dict(
            lm_head_bias=t.get("bias"),
            lora=lora,
            **{name: t[name] for name in ("chunk_rows", "memory_budget") if name in t},
        )
        given = {name: t[name] for name in names if name in t}
        out = op(
            t["hidden"],
            t["weight"],
            t["ids"],
            **given,
            **head,
            temperature=t.get("temperature", 1.0),
            **options,
        )
        if isinstance(out, rw.PolicyLossOutput):
            return [out.loss, out.per_token_logps, out.entropies]
        return (
            list(out)
            if isinstance(out, tuple)
            else [out.logps, out.entropies, out.lse]
            if isinstance(out, rw.TokenStats)
            else [out.loss]
        )

    return call


def stored(t, **options):
    kept = {name: t[name] for name in ("old_per_token_logps", "ref_per_token_logps")}
    out = rw.policy_loss(
        t["logits"],
        t["ids"],
        t["advantages"],
        spec=rw.methods.grpo(beta=0.1),
        **kept,
        differentiable_inputs=True,
        **options,
    )
    return [out.loss]


def two(op, **fixed):
    def call(t, **options):
        out = op(t["logits"], t["other"].detach(), completion_mask=t["mask"], **fixed, **options)
        return (
            [out]
            if isinstance(out, torch.Tensor)
            else [out.loss, out.forward_kl, out.reverse_kl, out.entropies, out.teacher_entropies]
        )

    return call


def two_heads(op, of_logits=False, **fixed):
    def call(t, **options):
        teacher = (
            t["other"].detach()
            if of_logits
            else rw.HiddenLogits(t["hidden2"].detach(), t["weight2"].detach())
        )
        out = op(
            t["hidden"],
            t["weight"],
            teacher,
            completion_mask=t["mask"],
            chunk_rows=t.get("chunk_rows"),
            **fixed,
            **options,
        )
        return (
            [out]
            if isinstance(out, torch.Tensor)
            else [out.loss, out.forward_kl, out.reverse_kl, out.entropies]
        )

    return call


def preference(t, **options):
    pairs = dict(
        ref_per_token_logps=-torch.ones(4, 3, dtype=torch.float64),
        reward_mask=torch.ones(4, 3),
        kl_mask=torch.ones(4, 3),
    )
    ref = t["other"].detach().view(4, 3, -1)
    return [
        rw.preference_loss(
            t["logits"].view(4, 3, -1),
            t["ids"].view(4, 3),
            spec="sparse_po",
            ref_logits=ref,
            **pairs,
            **options,
        ).loss
    ]


def calls():
    """``(name, function, tensors, which are sharded)``: every op that takes a group, in
    fp64.
    """
    g = torch.Generator().manual_seed(3)
    n, d, v, r = 12, 5, 37, 2
    z, ids = rows(g)
    yield "statistics", statistics, dict(logits=z, ids=ids), {"logits": -1}
    yield "statistics, softcap", statistics, dict(logits=z, ids=ids, softcap=3.0), {"logits": -1}
    sound = normal(g, n, v, scale=2.0)
    learnt = (0.5 + torch.rand(n, generator=g, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(v, (n,), generator=g)
    yield (
        "statistics, learnt temperature",
        statistics,
        dict(logits=sound, ids=ids, temperature=learnt),
        {"logits": -1},
    )
    of_others = {
        name: (-3 + normal(g, n, scale=0.3).detach()).requires_grad_()
        for name in ("old_per_token_logps", "ref_per_token_logps")
    }
    adv = torch.randn(n, generator=g, dtype=torch.float64)
    yield (
        "stored log-probs",
        stored,
        dict(logits=sound.view(n, 1, v), ids=ids[:, None], advantages=adv, **of_others),
        {"logits": -1},
    )
    head = dict(
        hidden=normal(g, n, d),
        weight=normal(g, v, d),
        bias=normal(g, v),
        a=normal(g, r, d),
        b=normal(g, v, r),
        ids=torch.where(torch.arange(n) % 5 == 4, -100, ids),
    )
    of_head = {"weight": 0, "bias": 0, "b": 0}
    adv, spec = torch.randn(n, generator=g, dtype=torch.float64), rw.methods.trl(entropy_coef=0.1)
    adv[2:5] = 0
    for name, more in (
        ("one chunk", {}),
        ("chunks", {"chunk_rows": 4}),
        ("kept chunks", {"chunk_rows": 4, "memory_budget": 2 * 4 * v * 8}),
    ):
        t = {**head, **more}
        yield (
            f"linear logps, {name}",
            linear(rw.linear_token_logps, "return_entropy"),
            {**t, "return_entropy": True},
            of_head,
        )
        yield (
            f"linear stats, {name}",
            linear(rw.linear_token_stats, "stats"),
            {**t, "stats": ("logps", "entropies", "lse")},
            of_head,
        )
        policy_head = {**t, "advantages": adv, "spec": rw.methods.reinforce()}
        yield (
            f"linear policy, {name}",
            linear(rw.linear_policy_loss, "advantages", "spec"),
            policy_head,
            of_head,
        )
    policy_head = {**head, "advantages": adv, "spec": spec, "temperature": learnt}
    yield (
        "linear policy, learnt",
        linear(rw.linear_policy_loss, "advantages", "spec"),
        policy_head,
        of_head,
    )
    other = normal(g, n, v, scale=2.0).detach()
    mask = torch.arange(n) != 7
    kinds = ("forward_kl", "reverse_kl", "jeffreys", "symmetric_cross_entropy")
    for kind in kinds:
        yield (
            kind,
            two(rw.token_divergence, kind=kind),
            dict(logits=sound, other=other, mask=mask),
            {"logits": -1, "other": -1},
        )
        yield (
            f"{kind} loss",
            two(rw.distillation_loss, kind=kind),
            dict(logits=sound, other=other, mask=mask),
            {"logits": -1, "other": -1},
        )
    holes, other_holes = sound.detach().clone(), other.clone()
    holes[0, :12] = -math.inf  # no mass in the first shard: KL(q||p) is infinite
    other_holes[1, :12] = -math.inf  # the teacher has none: KL(p||q) is
    for x in (holes, other_holes):
        x[2, 12:] = -math.inf
        x[3, 20:] = -math.inf
    other_holes[4] = -math.inf
    holes[5, 3] = math.nan
    holes[8, :12] -= (
        # a shard without probability in fp64: where the other has none of a column of
        # it, the divergence is infinite all the same
        2000
    )
    other_holes[9, :12] -= 2000
    other_holes[8, 3] = holes[9, 3] = -math.inf
    t = dict(logits=holes.clone().requires_grad_(), other=other_holes.clone(), mask=mask)
    yield (
        "divergences with holes, reversed",
        two(rw.token_divergence, kind="reverse_kl"),
        t,
        {"logits": -1, "other": -1},
    )
    yield (
        "divergences with holes",
        two(rw.token_divergence, kind="forward_kl"),
        dict(logits=holes.requires_grad_(), other=other_holes, mask=mask),
        {"logits": -1, "other": -1},
    )
    heads = dict(
        hidden=head["hidden"],
        weight=head["weight"],
        hidden2=normal(g, n, 3).detach(),
        weight2=normal(g, v, 3).detach(),
        mask=mask,
        other=other,
    )
    for chunk_rows in (None, 4):
        t, sharded = {**heads, "chunk_rows": chunk_rows}, {"weight": 0, "weight2": 0, "other": -1}
        yield (
            f"two heads, {chunk_rows}",
            two_heads(rw.linear_token_divergence, kind="reverse_kl"),
            t,
            sharded,
        )
        yield (
            f"head and logits, {chunk_rows}",
            two_heads(rw.linear_distillation_loss, of_logits=True, kind="jeffreys"),
            t,
            sharded,
        )
    yield (
        "preference",
        preference,
        dict(logits=sound, other=other, ids=ids),
        {"logits": -1, "other": -1},
    )


def every_op(ranks, world, padding, dtype, options, only=""):
    at, (group, _) = ranks.axes(world, 4 // world)
    split, wrong = (group, at[0], world, padding), []
    for name, function, tensors, vocab in (call for call in calls() if only in call[0]):
        wrong += [
            f"{name}: {e}" for e in differences(function, tensors, vocab, split, dtype, **options)
        ]
    return wrong


@pytest.mark.parametrize(("world", "padding"), [(4, 0), (2, 9), (4, 30)])
def test_every_op_is_one_process_in_fp64(four, world, padding):
    four.check(every_op, world, padding, torch.float64, {})


@pytest.mark.parametrize(
    ("backend", "only"),
    [
        ("cpu", ""),
        ("reference", ""),
        *(
            pytest.param("triton", only, marks=pytest.mark.slow)
            for only in ("statistics", "with holes")
        ),
    ],
)
def test_every_op_is_as_exact_in_fp32(four, backend, only):
    four.check(every_op, 4, 0, torch.float32, {"backend": backend}, only)
