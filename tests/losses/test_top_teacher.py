"""Distillation from a teacher's stored log-probs of K ids (``TopKLogps``): from logits
and from hidden states.
"""

import math

import pytest
import torch
from oracles import top_k

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.engine.distillation import KINDS

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
ALL, TAILS = (*KINDS, "generalized_jsd"), ("bucket", "renormalize", "ignore")
B, T, D, V, K = 2, 4, 6, 23, 5


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64):
    """A teacher whose lists have several lengths: padding by id and by log-prob. One
    row is ignored and holds nonsense.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, T, D), (V, D))
    )
    values, ids = torch.log_softmax(
        torch.randn(B, T, V, generator=g, dtype=torch.float64) * 2, -1
    ).topk(K)
    ids[0, 1, 3:], values[1, 2, 4] = -100, -math.inf
    values[0, 1, 3:] = 0.5
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 0], ids[1, 0] = False, V + 7
    row = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(B, T, generator=g, dtype=torch.float64).to(row)
    return dict(
        hidden=hidden, weight=weight, ids=ids, logps=values.to(row), mask=mask, weights=weights
    )


def teacher(d, tail):
    return rw.TopKLogps(d["ids"], d["logps"], tail)


def options(d, kind):
    return dict(kind=kind, completion_mask=d["mask"]) | (
        dict(beta=0.3) if kind == "generalized_jsd" else {}
    )


def wanted(d, kind, tail, logits):
    values = []
    for b in range(B):
        for t in range(T):
            listed = [
                (i, v)
                for i, v in zip(d["ids"][b, t].tolist(), d["logps"][b, t].tolist(), strict=True)
                if i >= 0 and v > -math.inf
            ]
            ids, probs = [i for i, _ in listed], [math.exp(v) for _, v in listed]
            values.append(
                top_k.row(logits[b, t], ids, probs, tail, 0.3)[kind]
                if d["mask"][b, t]
                else logits.new_zeros(())
            )
    return torch.stack(values).view(B, T)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("tail", TAILS)
def test_values_and_gradients(kind, tail, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    d = make(dtype)
    near = {} if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    hidden, weight = (d[name].double().requires_grad_() for name in ("hidden", "weight"))
    want = wanted(d, kind, tail, hidden @ weight.T / 1.5)
    truth = torch.autograd.grad((want * d["weights"]).sum(), (hidden, weight))
    h, w = (d[name].clone().requires_grad_() for name in ("hidden", "weight"))
    for got in (
        rw.token_divergence(
            h @ w.T, teacher(d, tail), temperature=1.5, backend=backend, **options(d, kind)
        ),
        rw.linear_token_divergence(
            h,
            w,
            teacher(d, tail),
            temperature=1.5,
            chunk_rows=3,
            backend=backend,
            **options(d, kind),
        ),
    ):
        torch.testing.assert_close(got.double(), want.detach(), **near)
        for a, b in zip(
            torch.autograd.grad((got * d["weights"]).sum(), (h, w)), truth, strict=True
        ):
            torch.testing.assert_close(a.double(), b, **near)


@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "symmetric_cross_entropy", "generalized_jsd"]
)
@pytest.mark.parametrize("linear", [False, True])
def test_the_loss_is_the_weighted_sum(kind, linear):
    d = make()
    h = d["hidden"].clone().requires_grad_()
    scale = dict(token_weights=d["weights"], num_items_in_batch=5.0, loss_scale=2.0)
    op = (
        (rw.linear_distillation_loss, h, d["weight"])
        if linear
        else (rw.distillation_loss, h @ d["weight"].T)
    )
    out = op[0](*op[1:], teacher(d, "bucket"), **scale, **options(d, kind))
    value = rw.token_divergence(h @ d["weight"].T, teacher(d, "bucket"), **options(d, kind))
    want = 2 * (d["weights"] * value).sum() / 5
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(torch.autograd.grad(out.loss, h), torch.autograd.grad(want, h))
    torch.testing.assert_close(out.per_token_divergence, value.detach())
    assert out.plan == "two_pass" and (out.per_token_divergence[1, 0] == 0).all()
    torch.testing.assert_close(
        out.reverse_kl,
        rw.token_divergence(
            h @ d["weight"].T, teacher(d, "bucket"), **options(d, "reverse_kl")
        ).detach(),
    )
    with pytest.raises(
        rw.UnsupportedRequest,
        match="one_pass' is impossible: there is no fused loss against stored log-probs",
    ):
        op[0](*op[1:], teacher(d, "bucket"), plan="one_pass", **options(d, kind))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_is_trls(kind, tail):
    """The functions of TRL's wheel, on rows without padding."""
    theirs = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    d = make()
    d["ids"], d["logps"] = d["ids"].clamp(min=0, max=V - 1), d["logps"].clamp(min=-9, max=-2)
    others = sorted(set(range(V)) - set(d["ids"][0, 1, :3].tolist()))
    d["ids"][0, 1, 3:], d["ids"][1, 0] = torch.tensor(others[: K - 3]), torch.arange(K)
    z = (d["hidden"] @ d["weight"].T).requires_grad_()
    p, q, there = (
        torch.log_softmax(z, -1).gather(-1, d["ids"]),
        d["logps"],
        torch.ones(B, T, K, dtype=torch.bool),
    )
    if tail == "bucket":
        (p, there), (q, _) = theirs._add_tail_bucket(p, there), theirs._add_tail_bucket(q, there)
    else:
        p, q = (x - x.logsumexp(-1, keepdim=True) for x in (p, q))
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, 0.3)
    want = torch.where(d["mask"], theirs._jsd_divergence(p, q, beta, support_mask=there).sum(-1), 0)
    got = rw.token_divergence(z, teacher(d, tail), **options(d, kind))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), z)[0] for x in (got, want)), rtol=1e-6, atol=1e-6
    )


def test_the_whole_vocabulary_is_the_divergence_of_the_logits():
    """With every id listed, nothing is left for the bucket."""
    d = make()
    z, other = (
        d["hidden"] @ d["weight"].T,
        torch.randn(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    for kind in ALL:
        whole = rw.TopKLogps(torch.arange(V).expand(B, T, V), torch.log_softmax(other, -1))
        for tail in TAILS:
            got = rw.token_divergence(z, whole._replace(tail=tail), **options(d, kind))
            torch.testing.assert_close(got, rw.token_divergence(z, other, **options(d, kind)))


@pytest.mark.parametrize("tail", TAILS)
def test_second_derivatives_and_transforms(tail):
    d = make()

    def loss(h, w):
        found = [
            rw.linear_token_divergence(h, w, teacher(d, tail), chunk_rows=3, **options(d, kind))
            for kind in ("jeffreys", "generalized_jsd")
        ]
        return (sum(found) * d["weights"]).sum()

    leaves = [d[name].requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True) and torch.autograd.gradgradcheck(
        loss, leaves, fast_mode=True
    )
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(
        torch.func.grad(loss, argnums=(0, 1))(*(x.detach() for x in leaves)), want
    )


@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_list_and_a_sure_student(tail):
    """A list of only padding adds nothing; a student that is sure of a listed id has no
    mass left for the bucket.
    """
    ids, logps = torch.tensor([[-100, -100], [1, 2]]), torch.tensor([[0.0, 0.0], [-0.1, -3.0]])
    z = torch.zeros(2, 5)
    z[1, 1] = 200.0
    z.requires_grad_()
    value = rw.token_divergence(z, rw.TopKLogps(ids, logps, tail), kind="jeffreys")
    assert value[0] == 0 and value[1].isfinite() and value[1] > 0
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad.isfinite().all() and (grad[0] == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd"])
def test_compiles(kind):
    d = make(torch.float32)
    torch._dynamo.reset()

    def loss(h):
        return rw.linear_distillation_loss(
            h, d["weight"], teacher(d, "bucket"), chunk_rows=3, **options(d, kind)
        ).loss

    d["ids"][1, 0] = 0
    h = d["hidden"].clone().requires_grad_()
    want, got = loss(h), torch.compile(loss, fullgraph=True, backend="aot_eager")(h)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, h), torch.autograd.grad(want, h))


WRONG = {
    "temperature": (dict(other_temperature=2.0), "other_temperature would have no effect: stored log-probs"),
    "softcap": (dict(other_softcap=2.0), "other_softcap would have no effect"),
    "tail": (dict(tail="drop"), "other.tail is 'drop', expected one of bucket, renormalize, ignore"),
    "id": (dict(token_ids=torch.full((2, 3, 2), 7)), r"other.token_ids has 7 in row 0 \(flat\), expected 0 to 6"),
    "repeat": (dict(token_ids=torch.full((2, 3, 2), 4)), r"other.token_ids has 4 twice in row 0 \(flat\): list each id once"),
    "shape": (dict(logps=torch.zeros(2, 3, 1)), r"other.logps has shape \(2, 3, 1\) on cpu, expected \(2, 3, 2\)"),
    "dtype": (dict(logps=torch.zeros(2, 3, 2).bfloat16()), "other.logps is torch.bfloat16, expected fp32 or fp64"),
    "probabilities": (dict(logps=torch.full((2, 3, 2), 0.4)), "other.logps has numbers above 0, so they are not log-probs"),
    "grad": (dict(logps=torch.full((2, 3, 2), -1.0, requires_grad=True)), "other.logps requires grad"),
}  # fmt: skip


def test_repeats_that_are_padding_or_of_ignored_rows():
    """Neither is in a sum."""
    ids, logps = torch.tensor([[[-100, -100, 3], [3, 3, 3]]]), torch.full((1, 2, 3), -2.0)
    logps[0, 1, :2] = -torch.inf
    z, mask = torch.randn(1, 2, 7), torch.tensor([[1, 1]])
    want = rw.token_divergence(z, rw.TopKLogps(ids[..., 2:], logps[..., 2:]), completion_mask=mask)
    torch.testing.assert_close(
        rw.token_divergence(z, rw.TopKLogps(ids, logps), completion_mask=mask), want
    )
    logps[0, 1] = -2.0
    with pytest.raises(rw.InvalidCall, match=r"has 3 twice in row 1"):
        rw.token_divergence(z, rw.TopKLogps(ids, logps), completion_mask=mask)
    rw.token_divergence(z, rw.TopKLogps(ids, logps), completion_mask=torch.tensor([[1, 0]]))


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("linear", [False, True])
def test_wrong_calls(case, linear):
    wrong, message = WRONG[case]
    own = {name: wrong[name] for name in wrong if name in rw.TopKLogps._fields}
    right = rw.TopKLogps(torch.arange(2).expand(2, 3, 2), torch.full((2, 3, 2), -1.0))
    op = (
        (rw.linear_token_divergence, torch.zeros(2, 3, 5), torch.zeros(7, 5))
        if linear
        else (rw.token_divergence, torch.zeros(2, 3, 7))
    )
    with pytest.raises(rw.InvalidCall, match=message):
        op[0](
            *op[1:],
            right._replace(**own),
            **{name: value for name, value in wrong.items() if name not in own},
        )


def test_explain():
    z = torch.empty(2, 3, 7, device="meta", requires_grad=True)
    t = rw.TopKLogps(
        torch.empty(2, 3, 2, dtype=torch.int64, device="meta"), torch.empty(2, 3, 2, device="meta")
    )
    found = rw.explain(rw.distillation_loss, z, t, device="cpu", backend="reference")
    assert (
        found.plan == "two_pass"
        and "no fused loss against stored log-probs" in found.one_pass_unsupported_reason
    )
