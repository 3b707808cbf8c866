"""From hidden states: the numbers of logits, exactly the requested gradients, work only
on rows that matter, one chunk of memory.
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.engine import ops as library
from reweight_ops._core.engine.linear import gemms as linear_gemms
from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(
        b, Request("token_loss_grad", torch.device("cpu"), torch.float32, rw.methods.grpo().program)
    )
    is None
]
B, T, D, V = 3, 9, 8, 37


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64, seed=0, v=V):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    row = torch.float64 if dtype == torch.float64 else torch.float32
    data = dict(
        hidden=normal(B, T, D).requires_grad_(),
        weight=normal(v, D).requires_grad_(),
        bias=normal(v).requires_grad_(),
    )
    data |= dict(
        ids=torch.randint(v, (B, T), generator=g),
        adv=normal(B, T).to(row),
        mask=torch.rand(B, T, generator=g) < 0.7,
    )
    logits = (
        data["hidden"].detach().double() @ data["weight"].detach().double().T
        + data["bias"].detach().double()
    )
    logp = torch.log_softmax(logits, -1).gather(-1, data["ids"][..., None])[..., 0]
    data["old"] = (logp + 0.3 * normal(B, T).double()).to(row)
    return data


def from_hidden(d, spec="grpo", **options):
    return rw.linear_policy_loss(
        d["hidden"],
        d["weight"],
        d["ids"],
        d["adv"],
        spec=spec,
        lm_head_bias=d["bias"],
        old_per_token_logps=d["old"],
        **options,
    )


def from_logits(d, spec="grpo", scale=1.0, **options):
    logits = scale * (d["hidden"] @ d["weight"].T + d["bias"])
    return rw.policy_loss(
        logits, d["ids"], d["adv"], spec=spec, old_per_token_logps=d["old"], **options
    )


def same(a, b, inputs, **tolerance):
    torch.testing.assert_close(a.loss, b.loss, **tolerance)
    for x, y in zip(
        torch.autograd.grad(a.loss, inputs), torch.autograd.grad(b.loss, inputs), strict=True
    ):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("plan", "spec"),
    [
        ("one_pass", "grpo"),
        ("two_pass", "grpo"),
        ("two_pass", "gspo"),
        ("two_pass", "top_entropy"),
        ("one_pass", rw.methods.dapo(entropy_coef=0.1)),
    ],
    ids=str,
)
# docs/semantics.md: S30
def test_equals_the_logits_op(plan, spec, compact, chunk_rows):
    d = make()
    options = dict(
        completion_mask=d["mask"],
        temperature=0.8,
        softcap=6.0,
        vocab_size=V - 4,
        plan=plan,
        backend="reference",
    )
    d["ids"] %= V - 4
    ours = from_hidden(
        d, spec, logit_scale=1.3, chunk_rows=chunk_rows, compact_rows=compact, **options
    )
    want = from_logits(d, spec, 1.3, **options)
    assert ours.plan == plan
    for name in ("per_token_logps", "entropies", "per_token_loss", "coef", "ratio", "is_clipped"):
        torch.testing.assert_close(getattr(ours, name), getattr(want, name))
    metrics = ours.metrics.as_floats()
    dropped = metrics.pop("rows_dropped_forward"), metrics.pop("rows_dropped_backward")
    assert metrics == pytest.approx(want.metrics.as_floats())
    assert (
        dropped[0] == ((~d["mask"]).sum() if compact else 0)
        and dropped[1] <= metrics["rows_skipped"] * compact
    )
    same(ours, want, [d["hidden"], d["weight"], d["bias"]])


def test_per_row_temperature_and_upstream():
    d = make()
    t = torch.rand(B, T, dtype=torch.float64) + 0.5
    logps, entropies = rw.linear_token_logps(
        d["hidden"],
        d["weight"],
        d["ids"],
        completion_mask=d["mask"],
        temperature=t,
        chunk_rows=4,
        return_entropy=True,
    )
    want = rw.token_logps(
        d["hidden"] @ d["weight"].T,
        d["ids"],
        completion_mask=d["mask"],
        temperature=t,
        return_entropy=True,
    )
    upstream = [torch.randn(B, T, dtype=torch.float64), torch.randn(B, T, dtype=torch.float64)]
    upstream[0][0] = upstream[1][0] = 0
    for x, y in zip(
        torch.autograd.grad((logps, entropies), (d["hidden"], d["weight"]), upstream),
        torch.autograd.grad(want, (d["hidden"], d["weight"]), upstream),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias", "weight bias"])
def test_only_the_gradients_asked_for(frozen, plan, monkeypatch):
    d = make()
    for name in frozen.split():
        d[name] = d[name].detach()
    asked = []
    original = linear_gemms.Gradients.__init__

    def spy(self, *args):
        original(self, *args)
        asked.append(tuple(self.needs))

    monkeypatch.setattr(linear_gemms.Gradients, "__init__", spy)
    rest = [d[n] for n in ("hidden", "weight", "bias") if n not in frozen.split()]
    same(from_hidden(d, plan=plan), from_logits(d, plan=plan), rest)
    assert asked[0] == (
        *(n not in frozen.split() for n in ("hidden", "weight", "bias")),
        False,
        False,
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_lora_is_the_merged_head(plan):
    d = make()
    lora = rw.Lora(
        torch.randn(2, D, dtype=torch.float64, requires_grad=True),
        torch.randn(V, 2, dtype=torch.float64, requires_grad=True),
        0.5,
    )
    d["weight"] = d["weight"].detach()
    merged = {**d, "weight": d["weight"] + lora.scale * lora.b @ lora.a}
    same(
        from_hidden(d, plan=plan, lora=lora, chunk_rows=5),
        from_logits(merged, plan=plan),
        [d["hidden"], lora.a, lora.b, d["bias"]],
    )


def test_tied_weights_accumulate_in_one_tensor():
    d = make()
    emb = torch.nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    hidden = torch.tanh(emb[d["ids"]])
    rw.linear_policy_loss(hidden, emb, d["ids"], d["adv"], spec="dapo").loss.backward()
    got, emb.grad = emb.grad.clone(), None
    rw.policy_loss(
        torch.tanh(emb[d["ids"]]) @ emb.T, d["ids"], d["adv"], spec="dapo"
    ).loss.backward()
    torch.testing.assert_close(got, emb.grad)


def count_rows(monkeypatch, name):
    rows = []
    op = getattr(library, name)
    monkeypatch.setattr(library, name, lambda z, *rest: rows.append(z.size(0)) or op(z, *rest))
    return rows


def test_masked_rows_never_reach_a_gemm(monkeypatch):
    d = make()
    with torch.no_grad():
        d["hidden"][~d["mask"]] = float("nan")
    for plan, op in (("one_pass", "token_loss_grad_"), ("two_pass", "token_stats")):
        rows = count_rows(monkeypatch, op)
        out = from_hidden(d, completion_mask=d["mask"], plan=plan, chunk_rows=4)
        (grad,) = torch.autograd.grad(out.loss, d["hidden"])
        assert (
            sum(rows) == d["mask"].sum()
            and out.loss.isfinite()
            and (grad[~d["mask"]] == 0).all()
            and grad.isfinite().all()
        )


def test_rows_without_a_coefficient_are_not_recomputed(monkeypatch):
    d = make()
    d["adv"][:, ::2] = 0
    rows = count_rows(monkeypatch, "token_grad_")
    same(
        from_hidden(d, plan="two_pass", chunk_rows=5),
        from_logits(d, plan="two_pass"),
        [d["hidden"], d["weight"]],
    )
    assert 0 < sum(rows) <= (d["adv"] != 0).sum()


def test_row_index_known_to_the_host():
    d = make()
    index = d["mask"].flatten().nonzero()[:, 0]
    ours = from_hidden(d, completion_mask=d["mask"], row_index=index, compact_rows=False)
    same(ours, from_logits(d, completion_mask=d["mask"]), [d["hidden"], d["weight"], d["bias"]])


def test_every_row_out():
    d = make()
    for plan in ("one_pass", "two_pass"):
        out = from_hidden(d, completion_mask=torch.zeros(B, T), plan=plan)
        grads = torch.autograd.grad(out.loss, (d["hidden"], d["weight"]))
        assert out.loss == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_of_low_precision(backend, dtype, plan):
    """Against the fp64 loss of the same operands: at most 1.5 times the error of the
    eager head in that dtype (F.linear, then our op).
    """
    d = make(dtype)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for k, v in d.items()
    }
    inputs = ("hidden", "weight", "bias")
    truth = torch.autograd.grad(
        from_logits(exact, loss_scale=64.0).loss, [exact[n] for n in inputs]
    )
    eager = torch.autograd.grad(
        from_logits(d, loss_scale=64.0, plan="two_pass", backend="reference").loss,
        [d[n] for n in inputs],
    )
    ours = torch.autograd.grad(
        from_hidden(d, loss_scale=64.0, plan=plan, backend=backend, chunk_rows=8).loss,
        [d[n] for n in inputs],
    )
    for name, t, e, o in zip(inputs, truth, eager, ours, strict=True):
        assert o.dtype == d[name].dtype
        # 4 chunks round the sum
        allowed = (
            ERROR_RATIO * (e - t).abs().max()
            + ERROR_FLOOR * t.abs().max()
            + 4 * torch.finfo(dtype).eps * t.abs().max()
        )
        assert (o - t).abs().max() <= allowed, name


def test_fp32_logits_are_more_accurate():
    d = make(torch.bfloat16)
    logits = d["hidden"].detach().double() @ d["weight"].detach().double().T
    truth = torch.log_softmax(logits, -1).gather(-1, d["ids"][..., None])[..., 0]
    error = {
        t: (
            rw.linear_token_logps(d["hidden"], d["weight"], d["ids"], logits_dtype=t).double()
            - truth
        )
        .abs()
        .max()
        for t in (torch.bfloat16, torch.float32)
    }
    assert error[torch.float32] < 1e-5 < 1e-3 < error[torch.bfloat16]


def test_autocast_casts_as_f_linear():
    d = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = rw.linear_token_logps(d["hidden"], d["weight"], d["ids"], lm_head_bias=d["bias"])
        want = rw.token_logps(
            torch.nn.functional.linear(d["hidden"], d["weight"], d["bias"]), d["ids"]
        )
    torch.testing.assert_close(ours, want)
    grads = torch.autograd.grad(ours.sum(), [d["hidden"], d["weight"], d["bias"]])
    assert all(g.dtype == torch.float32 for g in grads)


def test_many_chunks_sum_the_weight_gradient_in_fp32():
    """64 chunks in bf16 would round the sum 64 times."""
    g = torch.Generator().manual_seed(1)
    h = torch.randn(256, D, generator=g).bfloat16().requires_grad_()
    w = torch.randn(V, D, generator=g).bfloat16().requires_grad_()
    ids = torch.randint(V, (256,), generator=g)

    def gradient(h, w, **options):
        return torch.autograd.grad(rw.linear_token_logps(h, w, ids, **options).sum(), w)[0].double()

    truth = gradient(h.detach().double(), w.detach().double().requires_grad_())
    one, many = ((gradient(h, w, chunk_rows=n) - truth).norm() / truth.norm() for n in (256, 4))
    assert many < 1.5 * one


def test_chunking_is_deterministic(backend):
    d = make(torch.float32)
    first, again = (
        torch.autograd.grad(
            from_hidden(d, backend=backend, chunk_rows=5).loss, [d["hidden"], d["weight"]]
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_backward_and_retain():
    d = make()
    out = from_hidden(d, plan="one_pass")
    torch.autograd.grad(out.loss, d["hidden"], retain_graph=True)
    with pytest.raises(rw.ReweightOpsError, match="two_pass"):
        torch.autograd.grad(out.loss, d["hidden"])
    out = from_hidden(d, plan="two_pass")
    assert torch.equal(
        *(torch.autograd.grad(out.loss, d["hidden"], retain_graph=True)[0] for _ in range(2))
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_scaled_loss(plan):
    d = make()
    (a,), (b,) = (
        torch.autograd.grad(f(d, plan=plan).loss * -2.5, d["weight"])
        for f in (from_hidden, from_logits)
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_fullgraph(plan):
    torch._dynamo.reset()
    d = make()

    def step(h, w):
        return from_hidden(
            {**d, "hidden": h, "weight": w}, chunk_rows=16, plan=plan, completion_mask=d["mask"]
        ).loss

    # this runs first: it uploads the constants
    eager = torch.autograd.grad(step(d["hidden"], d["weight"]), [d["hidden"], d["weight"]])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(d["hidden"], d["weight"]), [d["hidden"], d["weight"]]),
        eager,
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    d = make()
    largest = []
    original = torch.empty

    def spy(*size, **kw):
        out = original(*size, **kw)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", spy)
    for plan in ("one_pass", "two_pass"):
        from_hidden(d, plan=plan, chunk_rows=4, backend="reference").loss.backward()
    gradients = {V * D, B * T * D}
    assert not gradients & {4 * V, B * T * V}
    assert set(largest) - gradients == {4 * V}


WRONG = {
    "hidden": (dict(hidden=torch.ones(B, T + 1, D)), "hidden has shape"),
    "weight": (
        dict(weight=torch.ones(V, D + 1)),
        r"lm_head_weight has shape \(37, 9\), expected \(V, 8\)",
    ),
    "dtype": (dict(weight=torch.ones(V, D)), "cast one, or use autocast"),
    "bias": (dict(bias=torch.ones(3)), "lm_head_bias has shape"),
    "lora": (dict(lora=rw.Lora(torch.ones(2, D), torch.ones(V, 3))), "lora: a"),
    "chunk": (dict(chunk_rows=0), "chunk_rows is 0"),
    "scale": (dict(logit_scale=0.0), "logit_scale is 0.0"),
    "logits_dtype": (dict(logits_dtype=torch.bfloat16), "logits_dtype is torch.bfloat16"),
    "consume": (dict(consume_logits=True), "consume_logits is for an op that takes logits"),
    "drop_last": (dict(drop_last=True), "drop_last is for an op that takes logits"),
    "row_index": (dict(row_index=[1, 2]), "row_index must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    changes, message = WRONG[name]
    d = make()
    tensors = {k: v for k, v in changes.items() if k in d}
    with pytest.raises(rw.InvalidCall, match=message):
        from_hidden({**d, **tensors}, **{k: v for k, v in changes.items() if k not in d})
    with pytest.raises(TypeError, match="Did you mean chunk_rows"):
        from_hidden(d, chunk_row=3)
