"""A policy loss with a divergence from a teacher in the same chunks (``teacher=``).

It is the sum of the two losses, from one set of logits of each model.
"""

import math

import pytest
import torch
from peaks import peaks, reads_peaks
from test_linear import BACKENDS

import reweight_ops as rw
from reweight_ops._core.engine.distillation import KINDS
from reweight_ops._core.engine.linear.gemms import Chunk

B, T, D, E, V = 3, 5, 8, 6, 29
INPUTS = ("hidden", "weight", "bias")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64, v=V):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    d = {
        name: normal(*size).requires_grad_()
        for name, size in dict(hidden=(B, T, D), weight=(v, D), bias=(v,)).items()
    }
    row = torch.float64 if dtype == torch.float64 else torch.float32
    d |= dict(
        t_hidden=normal(B, T, E),
        t_weight=normal(v, E),
        ids=torch.randint(v, (B, T), generator=g),
        adv=normal(B).to(row),
    )
    mask = torch.rand(B, T, generator=g) < 0.7
    d["ids"][0, 0] = -100
    old = torch.log_softmax((d["hidden"] @ d["weight"].T).detach().to(row), -1).gather(
        -1, d["ids"].clamp(min=0)[..., None]
    )[..., 0]
    return d | dict(
        mask=mask, old=old + 0.2 * normal(B, T).to(row), ref=old + 0.3 * normal(B, T).to(row)
    )


def data(d):
    return dict(
        completion_mask=d["mask"],
        old_per_token_logps=d["old"],
        temperature=1.3,
        softcap=9.0,
        lm_head_bias=d["bias"],
        logit_scale=1.1,
    )


def teacher(d, kind="reverse_kl", as_logits=False, coef=0.7):
    logits = (
        0.8 * d["t_hidden"] @ d["t_weight"].T
        if as_logits
        else rw.HiddenLogits(d["t_hidden"], d["t_weight"], logit_scale=0.8)
    )
    return rw.Teacher(
        logits,
        coef,
        kind,
        0.3 if kind == "generalized_jsd" else None,
        temperature=0.9,
        softcap=20.0,
    )


def call(d, spec, **options):
    return rw.linear_policy_loss(
        d["hidden"], d["weight"], d["ids"], d["adv"], spec=spec, **data(d), **options
    )


def apart(d, spec, kind, divisor, scale=1.0, **options):
    """The two losses, computed one after the other."""
    policy = call(d, spec, loss_scale=scale, **options)
    rest = {
        name: value
        for name, value in data(d).items()
        if name not in ("completion_mask", "old_per_token_logps")
    }
    t = teacher(d, kind)
    keep = d["mask"] & (d["ids"] != -100)
    other = rw.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        t.logits,
        kind=kind,
        beta=t.beta,
        completion_mask=keep,
        teacher_temperature=t.temperature,
        teacher_softcap=t.softcap,
        num_items_in_batch=divisor,
        loss_scale=0.7 * scale,
        **rest,
    )
    return policy, other


def grads(loss, d):
    return torch.autograd.grad(loss, [d[name] for name in INPUTS])


@pytest.mark.parametrize("kind", [*KINDS, "generalized_jsd"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_is_the_sum_of_the_two_losses(kind, plan, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    d = make(dtype)
    near = {} if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    spec = rw.methods.trl(loss_type="dapo")
    policy, other = apart(
        d, spec, kind, 11.0, 3.0, num_items_in_batch=11.0, plan=plan, backend=backend
    )
    for as_logits, chunk_rows in ((False, 4), (True, 100)):
        options = dict(
            num_items_in_batch=11.0,
            loss_scale=3.0,
            plan=plan,
            backend=backend,
            chunk_rows=chunk_rows,
        )
        out = call(d, spec, teacher=teacher(d, kind, as_logits), **options)
        assert (out.plan, out.backend) == (plan, backend)
        torch.testing.assert_close(out.loss, policy.loss + other.loss, **near)
        for a, b, c in zip(
            grads(out.loss, d),
            *(
                torch.autograd.grad(x.loss, [d[n] for n in INPUTS], retain_graph=plan == "two_pass")
                for x in apart(
                    d, spec, kind, 11.0, 3.0, num_items_in_batch=11.0, plan=plan, backend=backend
                )
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b + c, **near)
        for name in ("per_token_logps", "entropies", "per_token_loss", "coef", "ratio"):
            torch.testing.assert_close(getattr(out, name), getattr(policy, name), **near)
        for name in (
            "per_token_divergence",
            "forward_kl",
            "reverse_kl",
            "entropies",
            "teacher_entropies",
        ):
            torch.testing.assert_close(getattr(out.teacher, name), getattr(other, name), **near)
        assert policy.teacher is None and out.metrics["tokens"] == policy.metrics["tokens"]


@pytest.mark.parametrize(
    "spec",
    ["gspo", "dr_grpo", rw.methods.trl(loss_type="grpo", top_entropy_quantile=0.5)],
    ids=["gspo", "dr_grpo", "entropy"],
)
def test_row_weights_are_the_reductions(spec):
    """A mean over sequences weighs the teacher's tokens like the policy's."""
    d = make()
    named = rw.method(spec) if isinstance(spec, str) else spec
    out = call(d, spec, teacher=teacher(d), chunk_rows=4)
    keep = d["mask"] & (d["ids"] != -100)
    z = 1.1 * (d["hidden"] @ d["weight"].T + d["bias"])
    t = teacher(d, as_logits=True)
    value = rw.token_divergence(
        z,
        t.logits,
        kind="reverse_kl",
        completion_mask=keep,
        temperature=1.3,
        softcap=9.0,
        other_temperature=0.9,
        other_softcap=20.0,
    )
    lengths = keep.sum(-1).clamp(min=1)
    per_sequence = {
        "gspo": 1 / lengths / B,
        "dr_grpo": torch.full((B,), 1 / (B * T)),
        "grpo": 1 / lengths / B,
    }
    weights = per_sequence["grpo" if not isinstance(spec, str) else spec].to(value.dtype)
    want = call(d, named).loss + 0.7 * (value * weights[:, None]).sum()
    torch.testing.assert_close(out.loss, want)
    for a, b in zip(grads(out.loss, d), grads(want, d), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_and_differentiable_outputs():
    d = make()

    def loss(h, w, c):
        out = call(
            d | dict(hidden=h, weight=w, bias=c),
            "grpo",
            teacher=teacher(d),
            plan="two_pass",
            chunk_rows=4,
            differentiable_outputs=True,
        )
        return out.loss + out.per_token_logps.pow(2).sum()

    leaves = [d[name] for name in INPUTS]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True) and torch.autograd.gradgradcheck(
        loss, leaves, fast_mode=True
    )
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in leaves))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_compiles(plan):
    d = make(torch.float32)
    torch._dynamo.reset()

    def loss(h, w):
        return call(
            d | dict(hidden=h, weight=w, bias=None),
            "grpo",
            teacher=teacher(d),
            plan=plan,
            chunk_rows=4,
        ).loss

    leaves = [d[name] for name in INPUTS[:2]]
    want, got = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_rows(plan):
    """An ignored row may hold anything; a row with a zero policy gradient still has the
    teacher's.

    Without a gradient there are only values.
    """
    d = make()
    d["adv"][1] = 0.0
    want = call(d, "grpo", teacher=teacher(d), plan=plan, chunk_rows=4)
    wanted = grads(want.loss, d)
    inside = d["mask"] & (d["ids"] != -100)
    assert (wanted[0][1][inside[1]] != 0).any(-1).all()
    with torch.no_grad():
        d["hidden"][~inside], d["t_hidden"][~inside] = math.nan, math.inf
        assert torch.equal(
            call(d, "grpo", teacher=teacher(d), chunk_rows=4).loss,
            call(d, "grpo", teacher=teacher(d), chunk_rows=4).loss,
        )
    got = call(d, "grpo", teacher=teacher(d), plan=plan, chunk_rows=4)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
    for a, b in zip(grads(got.loss, d), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_logits_are_computed_twice(monkeypatch):
    seen, logits, d = [], Chunk.logits, make()
    monkeypatch.setattr(
        Chunk,
        "logits",
        lambda self, hidden: seen.append(tuple(hidden.shape)) or logits(self, hidden),
    )
    once = [(4, D), (4, E)] * 3 + [(3, D), (3, E)]
    call(
        d, "grpo", teacher=teacher(d), plan="one_pass", chunk_rows=4, compact_rows=False
    ).loss.backward()
    assert seen == once


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_calls_without_rows(plan, shape):
    h, w = torch.zeros(*shape, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    t, ids = (
        rw.Teacher(rw.HiddenLogits(torch.zeros(*shape, 2), torch.ones(5, 2)), 0.5),
        torch.zeros(shape, dtype=torch.int64),
    )
    out = rw.linear_policy_loss(
        h, w, ids, torch.ones(shape), spec="reinforce", teacher=t, plan=plan
    )
    out.loss.backward()
    assert out.loss == 0 and (w.grad == 0).all()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_blocks_change_no_bit(plan, backend, monkeypatch):
    """The number of rows by which a gradient is added at a time changes no bit."""
    d = make(torch.float32)
    found = []
    for block in (1, 1 << 30):
        monkeypatch.setattr(
            "reweight_ops._core.engine.linear.measures._BLOCK", {"cpu": block, "cuda": block}
        )
        out = call(d, "grpo", teacher=teacher(d), plan=plan, chunk_rows=4, backend=backend)
        found.append((out.loss, *grads(out.loss, d)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


SCRIPT = """
import json, torch
import reweight_ops as rw
from bench.measure import Memory
N, D, E, V, R = 768, 32, 16, 32768, 256
found = {}
for dtype in (torch.float32, torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=g).to(dtype).requires_grad_(), torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    y, u = torch.randn(N, E, generator=g).to(dtype), torch.randn(V, E, generator=g).to(dtype)
    ids, memory = torch.randint(V, (N,), generator=g), Memory("cpu")
    for plan in ("one_pass", "two_pass"):
        def run(n):
            t = rw.HiddenLogits(y[:n], u)
            rw.linear_policy_loss(h[:n], w, ids[:n], 1.0, spec="reinforce", teacher=rw.Teacher(t, 0.5), plan=plan, chunk_rows=R).loss.backward()
        run(R)  # what later calls keep
        h.grad = w.grad = None
        growth = memory.growth(lambda: run(N)) - (h.numel() + w.numel()) * dtype.itemsize
        h.grad = w.grad = None
        found[f"{plan} {dtype}"] = growth / (R * V * dtype.itemsize)
print(json.dumps(found))
"""


@reads_peaks
def test_memory_is_one_chunk_of_both_models():
    """Memory beyond the gradients is one of three chunks of logits of both models, and
    two blocks of 4 MiB (a quarter of bf16's).
    """
    for name, chunks in peaks(SCRIPT).items():
        assert 2 < chunks < 3, (name, chunks)


WRONG = {
    "type": (rw.HiddenLogits(torch.zeros(3), torch.zeros(3)), "teacher is a HiddenLogits, expected a Teacher"),
    "kind": (rw.Teacher(torch.zeros(2, 3, 7), 1.0, "kl"), "kind is 'kl', expected one of forward_kl"),
    "beta": (rw.Teacher(torch.zeros(2, 3, 7), 1.0, beta=0.5), "beta belongs to kind='generalized_jsd'"),
    "coef": (rw.Teacher(torch.zeros(2, 3, 7), -1.0), r"teacher.coef is -1.0, expected a number in \[0, inf\)"),
    "logits": (rw.Teacher(None, 1.0), "teacher is a NoneType, expected a HiddenLogits"),
    "columns": (rw.Teacher(torch.zeros(2, 3, 9), 1.0), "pass vocab_size"),
    "top": (rw.Teacher(rw.TopKLogps(torch.zeros(2, 3, 1).long(), torch.zeros(2, 3, 1)), 1.0), "a TopKLogps: add linear_distillation_loss"),
    "grad": (rw.Teacher(torch.zeros(2, 3, 7, requires_grad=True), 1.0), "require grad"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    given, message = WRONG[case]
    with pytest.raises(rw.InvalidCall, match=message):
        rw.linear_policy_loss(
            torch.zeros(2, 3, 5),
            torch.zeros(7, 5),
            torch.zeros(2, 3).long(),
            1.0,
            spec="reinforce",
            teacher=given,
        )


@pytest.mark.parametrize(
    "spec",
    [rw.method("reinforce").replace(reduction=rw.NoReduction()), "drpo"],
    ids=["none", "coupled"],
)
def test_a_loss_that_is_no_sum_over_rows_has_no_weights_for_a_teacher(spec):
    groups = {} if not isinstance(spec, str) else dict(group_ids=torch.tensor([0, 0]), num_groups=1)
    h, w, ids, t = (
        torch.zeros(2, 3, 5),
        torch.zeros(7, 5),
        torch.zeros(2, 3).long(),
        rw.Teacher(torch.zeros(2, 3, 7), 1.0),
    )
    with pytest.raises(rw.InvalidCall, match="has no row weights by"):
        rw.linear_policy_loss(h, w, ids, torch.tensor([1.0, -1.0]), spec=spec, teacher=t, **groups)


def test_explain():
    h, w = torch.empty(2, 3, 5, device="meta", requires_grad=True), torch.empty(7, 5, device="meta")
    t = rw.Teacher(
        rw.HiddenLogits(torch.empty(2, 3, 4, device="meta"), torch.empty(7, 4, device="meta")), 0.1
    )
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    found = rw.explain(
        rw.linear_policy_loss,
        h,
        w,
        ids,
        1.0,
        spec="grpo",
        teacher=t,
        device="cpu",
        backend="reference",
    )
    assert (found.plan, found.backend) == ("one_pass", "reference")
    assert (
        rw.explain(
            rw.linear_policy_loss,
            h,
            w,
            ids,
            1.0,
            spec="gspo",
            teacher=t,
            device="cpu",
            backend="reference",
        ).plan
        == "two_pass"
    )


def test_a_sampling_mask_is_refused():
    h, w, ids = torch.zeros(2, 3, 5), torch.ones(7, 5), torch.zeros(2, 3).long()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    with pytest.raises(
        rw.UnsupportedRequest, match="sampling_mask: a divergence compares two distributions"
    ):
        rw.linear_policy_loss(
            h,
            w,
            ids,
            1.0,
            spec="grpo",
            sampling_mask=mask,
            teacher=rw.Teacher(torch.zeros(2, 3, 7), 1.0),
        )
