"""Divergences and distillation from hidden states, in the memory of one chunk."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from test_linear import BACKENDS

import reweight_ops as rw
from reweight_ops._core.engine import ops as library
from reweight_ops._core.engine.distillation import KINDS
from reweight_ops._core.engine.linear import gemms as linear_gemms
from reweight_ops._core.engine.linear.gemms import Chunk, Gradients
from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO

B, T, D, E, V = 2, 7, 8, 5, 37
ALL = (*KINDS, "generalized_jsd")
INPUTS = ("hidden", "weight", "bias", "a", "b")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64, seed=0, v=V):
    """Student and teacher; the teacher's head is narrower and padded."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    sizes = dict(hidden=(B, T, D), weight=(v, D), bias=(v,), a=(2, D), b=(v, 2))
    d = {name: normal(*size).requires_grad_() for name, size in sizes.items()}
    d |= dict(
        t_hidden=normal(B, T, E),
        t_weight=normal(v + 3, E),
        t_bias=normal(v + 3),
        mask=torch.rand(B, T, generator=g) < 0.7,
    )
    row = torch.float64 if dtype == torch.float64 else torch.float32
    return d | dict(upstream=normal(B, T).to(row), heat=(normal(B, T).abs() + 0.5).to(row))


def student(d):
    return dict(lm_head_bias=d["bias"], lora=rw.Lora(d["a"], d["b"], 0.5), logit_scale=1.3)


def teacher(d, as_logits=False):
    if as_logits:
        return teacher_logits(d)
    return rw.HiddenLogits(d["t_hidden"], d["t_weight"], d["t_bias"], 0.7)


def student_logits(d):
    return 1.3 * (
        d["hidden"] @ d["weight"].T + d["bias"] + 0.5 * (d["hidden"] @ d["a"].T) @ d["b"].T
    )


def teacher_logits(d):
    return 0.7 * (d["t_hidden"] @ d["t_weight"].T + d["t_bias"])


def options_of(d, kind, of="other"):
    found = dict(
        kind=kind,
        completion_mask=d["mask"],
        temperature=d["heat"],
        softcap=6.0,
        vocab_size=d["weight"].size(0) - 1,
    )
    return (
        found
        | {f"{of}_temperature": 1.1, f"{of}_softcap": 9.0}
        | ({"beta": 0.3} if kind == "generalized_jsd" else {})
    )


def grads(total, d, **more):
    return torch.autograd.grad(total, [d[name] for name in INPUTS], **more)


def same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


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


# --- work and memory ------------------------------------------------------------------
@pytest.fixture
def gemms(monkeypatch):
    """Rows and width of every GEMM that computes logits."""
    seen = []
    logits = Chunk.logits
    monkeypatch.setattr(
        Chunk,
        "logits",
        lambda self, hidden: seen.append(tuple(hidden.shape)) or logits(self, hidden),
    )
    return seen


def test_the_gemms_of_each_plan(gemms):
    d = make()
    call = dict(chunk_rows=4, compact_rows=False, vocab_size=V)
    once = [(4, D), (4, E)] * 3 + [(2, D), (2, E)]
    rw.linear_distillation_loss(
        d["hidden"], d["weight"], teacher(d), plan="one_pass", **call
    ).loss.backward()
    assert gemms == once
    for budget, recomputed in ((None, once), (3 * 4 * (2 * V + 3) * 8, once[4:]), (1 << 30, [])):
        gemms.clear()
        rw.linear_token_divergence(
            d["hidden"], d["weight"], teacher(d), memory_budget=budget, **call
        ).sum().backward()
        assert gemms == once + recomputed


def test_rows_that_do_not_count_reach_no_gemm(gemms):
    d = make()
    d["upstream"][0] = 0
    out = rw.linear_token_divergence(
        d["hidden"], d["weight"], teacher(d), completion_mask=d["mask"], chunk_rows=3, vocab_size=V
    )
    inside = int(d["mask"].sum())
    assert (
        sum(n for n, width in gemms if width == D)
        == sum(n for n, width in gemms if width == E)
        == inside
    )
    gemms.clear()
    (out * d["upstream"]).sum().backward()
    assert sum(n for n, width in gemms if width == D) == int(d["mask"][1].sum()) < inside


def test_row_index_known_to_the_host():
    d = make()
    index = d["mask"].flatten().nonzero()[:, 0].flip(0)
    want = rw.token_divergence(student_logits(d), teacher_logits(d), **options_of(d, "jeffreys"))
    for as_logits in (False, True):
        got = rw.linear_token_divergence(
            d["hidden"],
            d["weight"],
            teacher(d, as_logits),
            row_index=index,
            chunk_rows=4,
            **student(d),
            **options_of(d, "jeffreys"),
        )
        torch.testing.assert_close(got, want)
        same(
            grads((got * d["upstream"]).sum(), d),
            grads((want * d["upstream"]).sum(), d, retain_graph=True),
        )


SCRIPT = """
import json, torch
import reweight_ops as rw
from bench.measure import Memory
N, D, E, V = 768, 32, 16, 32768
found = {}
for dtype in (torch.float32, torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=g).to(dtype).requires_grad_(), torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    t = rw.HiddenLogits(torch.randn(N, E, generator=g).to(dtype), torch.randn(V, E, generator=g).to(dtype))
    memory, rows = Memory("cpu"), 256
    for kind in ("reverse_kl", "generalized_jsd"):
        for plan in ("one_pass", "two_pass"):
            def run():
                rw.linear_distillation_loss(h, w, t, kind=kind, plan=plan, chunk_rows=rows).loss.backward()
            run(); h.grad = w.grad = None
            growth = memory.growth(run) - (h.numel() + w.numel()) * dtype.itemsize
            h.grad = w.grad = None
            found[f"{kind} {plan} {dtype}"] = growth / (2 * rows * V * dtype.itemsize)
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of resident memory is read from Linux's /proc",
)
def test_memory_is_one_chunk_of_both_models():
    """Memory beyond the gradients is one of three chunks of both models' logits."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, chunks in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0.7 < chunks < 1.6, (name, chunks)


def test_the_default_chunk_holds_both_models_logits(monkeypatch):
    made = []
    original = Chunk.__init__
    monkeypatch.setattr(
        Chunk,
        "__init__",
        lambda self, size, *rest: original(self, size, *rest) or made.append(self.data.nbytes),
    )
    monkeypatch.setattr(
        linear_gemms,
        "empty",
        lambda shape, dtype, device: torch.empty(1, 1, dtype=dtype).expand(shape),
    )
    monkeypatch.setattr(Chunk, "logits", lambda self, hidden: self.data[: hidden.size(0)])
    monkeypatch.setattr(library, "divergence_stats", lambda z, *rest: torch.zeros(8, z.size(0)))
    with torch.no_grad():
        h, w = torch.zeros(4000, 2), torch.zeros(20000, 2)
        rw.linear_token_divergence(h, w, rw.HiddenLogits(h, torch.zeros(20000, 2)))
    assert len(made) == 2 and 0.9 * (96 << 20) < sum(made) <= 96 << 20


# --- refused calls --------------------------------------------------------------------
WRONG = {
    "kind": (dict(kind="kl"), "kind is 'kl', expected one of forward_kl, .*generalized_jsd"),
    "beta": (dict(beta=0.5), "beta belongs to kind='generalized_jsd'"),
    "beta range": (dict(kind="generalized_jsd", beta=0.0), r"beta is 0.0, expected a number in \(0, 1\)"),
    "no teacher": (dict(other=None), "other is a NoneType, expected a HiddenLogits, a TopKLogps, or logits"),
    "columns": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(9, 4))), "logits have 7 columns, other_logits 9: pass vocab_size"),
    "logits columns": (dict(other=torch.zeros(2, 3, 9)), "logits have 7 columns, other_logits 9: pass vocab_size"),
    "vocab_size": (dict(other=torch.zeros(2, 3, 5), vocab_size=6), "vocab_size is 6, other_logits have 5 columns"),
    "rows": (dict(other=torch.zeros(2, 4, 7)), r"other_logits has shape \(2, 4, 7\), expected \(2, 3\)"),
    "hidden rows": (dict(other=rw.HiddenLogits(torch.zeros(2, 4, 4), torch.zeros(7, 4))), r"linear_token_divergence, other: hidden has shape \(2, 4, 4\)"),
    "width": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 5))), r"other: lm_head_weight has shape \(7, 5\), expected \(V, 4\)"),
    "grad": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 4, requires_grad=True))), "other.lm_head_weight requires grad"),
    "logits grad": (dict(other=torch.zeros(2, 3, 7, requires_grad=True)), "other_logits require grad"),
    "fp64 beside fp32": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4).double(), torch.zeros(7, 4).double())), "fp64 for both or for none"),
    "softcap": (dict(other_softcap=-1.0), "softcap is -1.0"),
    "temperature": (dict(other_temperature=0.0), r"other_temperature is 0.0, expected a number in \(0, inf\)"),
    "consume": (dict(consume_logits=True), "consume_logits is for an op that takes logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    options, message = WRONG[case]
    other = rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 4))
    with pytest.raises(rw.InvalidCall, match=message):
        rw.linear_token_divergence(
            torch.zeros(2, 3, 5), torch.zeros(7, 5), **{"other": other, **options}
        )


def test_unknown_keywords_and_no_hidden_states():
    t = rw.HiddenLogits(h := torch.zeros(2, 3, 5), w := torch.zeros(7, 5))
    with pytest.raises(TypeError, match="Did you mean teacher_softcap"):
        rw.linear_distillation_loss(h, w, t, teacher_softcaps=1.0)
    with pytest.raises(rw.InvalidCall, match=r"hidden must be a tensor R \+ \(D,\)"):
        rw.linear_token_divergence(None, w, t)
    with pytest.raises(rw.InvalidCall, match="token_weights require grad"):
        rw.linear_distillation_loss(h, w, t, token_weights=torch.ones(2, 3, requires_grad=True))


def test_explain():
    h, w = torch.empty(2, 3, 5, device="meta", requires_grad=True), torch.empty(7, 5, device="meta")
    t = rw.HiddenLogits(torch.empty(2, 3, 4, device="meta"), torch.empty(7, 4, device="meta"))
    found = rw.explain(rw.linear_distillation_loss, h, w, t, device="cpu", backend="reference")
    assert (found.plan, found.backend) == ("one_pass", "reference")
    found = rw.explain(
        rw.linear_token_divergence,
        h,
        w,
        t,
        kind="generalized_jsd",
        device="cpu",
        backend="reference",
    )
    assert (found.plan, found.one_pass_unsupported_reason) == (
        "two_pass",
        "there is no loss to fuse: these are statistics",
    )
