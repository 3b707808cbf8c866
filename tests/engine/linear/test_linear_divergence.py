"""Divergences and distillation from hidden states: the numbers of the logits' ops,
their gradients, and their rows.
"""

import itertools
import math

import pytest
import torch
from test_linear import BACKENDS
from two_heads import (
    ALL,
    INPUTS,
    B,
    T,
    V,
    grads,
    make,
    options_of,
    same,
    student,
    student_logits,
    teacher,
    teacher_logits,
)

import reweight_ops as rw
from reweight_ops._core.engine.linear.gemms import Gradients
from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# --- the same numbers as from logits --------------------------------------------------
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("as_logits", [False, True])
def test_token_divergence_is_that_of_the_logits(kind, as_logits):
    """Values and gradients to p's head, by chunks, with kept logits, a
    second backward."""
    d = make()
    d["upstream"][0, :4] = 0
    want = rw.token_divergence(student_logits(d), teacher_logits(d), **options_of(d, kind))
    wanted = grads((want * d["upstream"]).sum(), d)
    for chunk_rows, compact, budget in itertools.product(
        (1, 3, None), (True, False), (None, 3 * 3 * 2 * V * 8)
    ):
        layout = dict(chunk_rows=chunk_rows, compact_rows=compact, memory_budget=budget)
        got = rw.linear_token_divergence(
            d["hidden"],
            d["weight"],
            teacher(d, as_logits),
            **student(d),
            **layout,
            **options_of(d, kind),
        )
        torch.testing.assert_close(got, want)
        total = (got * d["upstream"]).sum()
        same(grads(total, d, retain_graph=True), wanted)
        same(grads(total, d), wanted)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_the_loss_is_the_weighted_sum(kind, plan, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    exact, d = make(), make(dtype)
    exact["upstream"] = exact["upstream"].clone()
    for x in (exact, d):
        x["upstream"][1, ::2] = 0
    scale = dict(num_items_in_batch=11.0, loss_scale=3.0)
    value = rw.token_divergence(
        student_logits(exact), teacher_logits(exact), **options_of(exact, kind)
    )
    loss = 3 * (exact["upstream"] * value).sum() / 11
    out = rw.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        teacher(d),
        token_weights=d["upstream"],
        plan=plan,
        backend=backend,
        chunk_rows=4,
        **scale,
        **student(d),
        **options_of(d, kind, "teacher"),
    )
    assert (out.plan, out.backend) == (plan, backend)
    near = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), loss, **near)
    same([g.double() for g in grads(out.loss, d)], grads(loss, exact), **near)
    torch.testing.assert_close(out.per_token_divergence.double(), value.detach(), **near)
    whole = rw.distillation_loss(
        student_logits(exact), teacher_logits(exact), **options_of(exact, "jeffreys", "teacher")
    )
    for name in ("forward_kl", "reverse_kl", "entropies", "teacher_entropies"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(whole, name), **near)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_trls_function(beta, softcap, plan, backend):
    """TRL's function in fp32: values and gradients to 1e-6 of the largest term."""
    trl = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    d = make(torch.float32, v=300)
    h, th = (
        (0.3 * d["hidden"]).detach().flatten(0, 1).requires_grad_(),
        0.5 * d["t_hidden"].flatten(0, 1),
    )
    w, b, tw, tb = d["weight"], d["bias"], d["t_weight"][:300], d["t_bias"][:300]
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "generalized_jsd")
    theirs, entropies = trl.apply(h, w, b, th, tw, tb, beta, 0.8, 1.3, softcap, 0.7, 4.0)
    ours = rw.linear_distillation_loss(
        h,
        w,
        rw.HiddenLogits(th, tw, tb, 0.7),
        kind=kind,
        beta=beta if kind == "generalized_jsd" else None,
        temperature=0.8,
        softcap=softcap,
        teacher_softcap=4.0,
        logit_scale=1.3,
        lm_head_bias=b,
        plan=plan,
        backend=backend,
        chunk_rows=4,
        token_weights=d["upstream"].flatten(),
    )
    lse = (1.3 / 0.8 * (h @ w.T + b)).logsumexp(-1).abs().max().item()
    for a, e in ((ours.per_token_divergence, theirs), (ours.entropies, entropies)):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-6 * lse)
    wanted = torch.autograd.grad((theirs * d["upstream"].flatten()).mean(), (h, w, b))
    for a, e in zip(torch.autograd.grad(ours.loss, (h, w, b)), wanted, strict=True):
        assert (a - e).norm() <= 1e-6 * e.norm()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_accuracy_of_low_precision(kind, dtype, plan, backend):
    """At most 1.5 times the gradient's error of the eager heads in that dtype."""
    d = make(dtype)
    exact = {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in d.items()
    }
    beta = 0.3 if kind == "generalized_jsd" else None
    plain = dict(kind=kind, completion_mask=d["mask"], beta=beta)

    def eager(x):
        z = torch.nn.functional.linear(x["hidden"], x["weight"], x["bias"])
        y = torch.nn.functional.linear(x["t_hidden"], x["t_weight"][:V], x["t_bias"][:V])
        total = rw.token_divergence(z, y, backend="reference", **plain)
        return torch.autograd.grad(
            64.0 * total.sum() / x["mask"].sum(), [x[name] for name in INPUTS[:3]]
        )

    out = rw.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        rw.HiddenLogits(d["t_hidden"], d["t_weight"][:V], d["t_bias"][:V]),
        lm_head_bias=d["bias"],
        loss_scale=64.0,
        plan=plan,
        backend=backend,
        chunk_rows=4,
        **plain,
    )
    ours = torch.autograd.grad(out.loss, [d[name] for name in INPUTS[:3]])
    for name, t, e, o in zip(INPUTS, eager(exact), eager(d), ours, strict=False):
        assert o.dtype == dtype
        size = t.abs().max()
        # 4 chunks round the sum
        allowed = (
            ERROR_RATIO * (e - t).abs().max()
            + ERROR_FLOOR * size
            + 4 * torch.finfo(dtype).eps * size
        )
        assert (o - t).abs().max() <= allowed, name


def test_a_teacher_of_another_dtype_and_strides():
    d = make(torch.float32)
    wide = torch.full((B, T + 1, 2 * V), math.nan, dtype=torch.bfloat16)
    wide[:, :T, :V] = torch.randn(B, T, V)
    y = wide[:, :T, :V]
    assert not y.is_contiguous()
    plain = dict(kind="reverse_kl", completion_mask=d["mask"])
    want = rw.token_divergence(d["hidden"] @ d["weight"].T, y, **plain)
    for compact in (False, True):
        got = rw.linear_token_divergence(
            d["hidden"], d["weight"], y, chunk_rows=3, compact_rows=compact, **plain
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    h, w = d["t_hidden"].bfloat16(), d["t_weight"][:V].bfloat16()
    for logits_dtype in (None, torch.float32):
        z = h.double() @ w.double().T if logits_dtype else h @ w.T
        got = rw.linear_token_divergence(
            d["hidden"], d["weight"], rw.HiddenLogits(h, w, logits_dtype=logits_dtype), **plain
        )
        torch.testing.assert_close(
            got,
            rw.token_divergence(d["hidden"] @ d["weight"].T, z.float(), **plain),
            rtol=1e-5,
            atol=1e-5,
        )


def test_autocast():
    d = make(torch.float32)
    t = rw.HiddenLogits(d["t_hidden"], d["t_weight"][:V])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rw.linear_token_divergence(d["hidden"], d["weight"], t)
        z, y = (
            torch.nn.functional.linear(d["hidden"], d["weight"]),
            torch.nn.functional.linear(*t[:2]),
        )
        want = rw.token_divergence(z, y)
    torch.testing.assert_close(got, want)
    assert all(
        g.dtype == torch.float32 for g in torch.autograd.grad(got.sum(), [d["hidden"], d["weight"]])
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "generalized_jsd"])
def test_triton(kind):
    triton = pytest.importorskip("reweight_ops._core.backends.triton")
    assert triton.BACKEND.name == "triton"
    d = make(torch.float32)
    for plan in ("one_pass", "two_pass"):
        found = []
        for backend in ("triton", "reference"):
            out = rw.linear_distillation_loss(
                d["hidden"],
                d["weight"],
                teacher(d),
                plan=plan,
                backend=backend,
                chunk_rows=8,
                **student(d),
                **options_of(d, kind, "teacher"),
            )
            found.append((out.loss, *grads(out.loss, d)))
        same(*found, rtol=1e-4, atol=1e-5)


# --- autograd -------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["jeffreys", "generalized_jsd"])
def test_second_derivatives_and_transforms(kind):
    d = make()
    names = INPUTS[:3]

    def total(h, w, c):
        rest = {
            **student(d),
            "lm_head_bias": c,
            "lora": rw.Lora(d["a"].detach(), d["b"].detach(), 0.5),
        }
        found = rw.linear_token_divergence(
            h, w, teacher(d), chunk_rows=4, **rest, **options_of(d, kind)
        )
        return (found * d["upstream"]).sum()

    leaves = [d[name] for name in names]
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True) and torch.autograd.gradgradcheck(
        total, leaves, fast_mode=True
    )
    want = torch.autograd.grad(total(*leaves), leaves)
    same(torch.func.grad(total, argnums=(0, 1, 2))(*(x.detach() for x in leaves)), want)


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("as_logits", [False, True])
def test_compiles(kind, plan, as_logits):
    d = make(torch.float32)
    torch._dynamo.reset()

    def loss(h, w, c):
        rest = {**student(d), "lm_head_bias": c, "lora": None}
        t = teacher(d, as_logits)
        return rw.linear_distillation_loss(
            h, w, t, plan=plan, chunk_rows=4, **rest, **options_of(d, kind, "teacher")
        ).loss

    leaves = [d[name] for name in INPUTS[:3]]
    want, got = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    same(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_only_the_gradients_asked_for(plan, monkeypatch):
    d, asked = make(), []
    original = Gradients.__init__
    monkeypatch.setattr(
        Gradients,
        "__init__",
        lambda self, *args: original(self, *args) or asked.append(tuple(self.needs)),
    )
    out = rw.linear_distillation_loss(
        d["hidden"], d["weight"].detach(), teacher(d), plan=plan, vocab_size=V
    )
    (grad,) = torch.autograd.grad(out.loss, d["hidden"])
    assert grad.abs().max() > 0 and asked == [(True, False, False, False, False)]


def test_a_second_backward_of_one_pass_raises():
    d = make()
    out = rw.linear_distillation_loss(d["hidden"], d["weight"], teacher(d), vocab_size=V)
    assert out.plan == "one_pass"
    torch.autograd.grad(out.loss, d["hidden"], retain_graph=True)
    with pytest.raises(rw.ReweightOpsError, match="linear_distillation_loss: a second backward"):
        torch.autograd.grad(out.loss, d["hidden"])
    with torch.no_grad():
        assert (
            rw.linear_distillation_loss(d["hidden"], d["weight"], teacher(d), vocab_size=V).plan
            == "two_pass"
        )


# --- rows -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["jeffreys", "generalized_jsd"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_what_an_ignored_row_holds_reaches_nothing(kind, compact, plan):
    d = make()
    clean = rw.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        teacher(d),
        plan=plan,
        compact_rows=compact,
        chunk_rows=4,
        **student(d),
        **options_of(d, kind, "teacher"),
    )
    wanted = grads(clean.loss, d)
    with torch.no_grad():
        d["hidden"][~d["mask"]], d["t_hidden"][~d["mask"]] = math.nan, math.inf
    out = rw.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        teacher(d),
        plan=plan,
        compact_rows=compact,
        chunk_rows=4,
        **student(d),
        **options_of(d, kind, "teacher"),
    )
    assert torch.equal(out.loss, clean.loss)
    same(grads(out.loss, d), wanted, rtol=0, atol=0)


def test_a_nan_row_is_nan_and_alone(backend):
    d = make(torch.float32)
    with torch.no_grad():
        d["t_hidden"][0, 1] = math.nan
    for kind in ("forward_kl", "generalized_jsd"):
        value = rw.linear_token_divergence(
            d["hidden"], d["weight"], teacher(d), kind=kind, vocab_size=V, backend=backend
        )
        assert value[0, 1].isnan() and value.isnan().sum() == 1


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["reverse_kl", "generalized_jsd"])
def test_an_infinite_logit_is_no_distribution(kind, softcap, backend):
    """A soft cap does not make one either."""
    d = make(torch.float32)
    with torch.no_grad():
        d["bias"][2] = math.inf
    value = rw.linear_token_divergence(
        d["hidden"],
        d["weight"],
        teacher(d),
        kind=kind,
        lm_head_bias=d["bias"],
        softcap=softcap,
        vocab_size=V,
        backend=backend,
    )
    assert value.isnan().all()


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd"])
def test_columns_without_probability(kind):
    """``-inf`` logits of one or both models act as from logits, without
    NaN gradients."""
    d = make()
    y = teacher_logits(d)[..., :V].clone()
    y[..., 3] = y[..., 5] = -math.inf
    with torch.no_grad():
        d["bias"][5] = -math.inf
    value = rw.linear_token_divergence(
        d["hidden"], d["weight"], y, kind=kind, lm_head_bias=d["bias"], chunk_rows=4
    )
    want = rw.token_divergence(d["hidden"] @ d["weight"].T + d["bias"], y, kind=kind)
    torch.testing.assert_close(value, want)
    assert value.isfinite().all()
    inputs = [d["hidden"], d["weight"]]
    same(torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(want.sum(), inputs))


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd"])
def test_a_row_is_the_same_bits_wherever_it_stands(kind, backend):
    g = torch.Generator().manual_seed(0)
    n, vocab = 21, 1031
    weight, t_weight = torch.randn(vocab, 96, generator=g), torch.randn(vocab, 48, generator=g)
    rows, t_rows = torch.randn(n, 96, generator=g), torch.randn(n, 48, generator=g)
    found = set()
    for place in range(n):
        order = [*range(1, place + 1), 0, *range(place + 1, n)]
        h = rows[order].requires_grad_()
        t = rw.HiddenLogits(t_rows[order], t_weight)
        value = rw.linear_token_divergence(h, weight, t, kind=kind, chunk_rows=8, backend=backend)
        (grad,) = torch.autograd.grad(value.sum(), h)
        found.add((value[place].item(), tuple(grad[place].tolist())))
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd"])
def test_calls_without_rows(shape, kind):
    w = torch.randn(5, 3, requires_grad=True)
    h, t = (
        torch.zeros(*shape, 3, requires_grad=True),
        rw.HiddenLogits(torch.zeros(*shape, 2), torch.zeros(5, 2)),
    )
    for plan in ("one_pass", "two_pass"):
        out = rw.linear_distillation_loss(h, w, t, kind=kind, plan=plan)
        grad = torch.autograd.grad(out.loss, w)[0]
        assert out.loss == 0 and (grad == 0).all() and out.forward_kl.shape == shape
