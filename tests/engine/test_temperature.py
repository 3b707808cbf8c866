"""The gradient by the temperature is that of eager PyTorch, from logits and from hidden
states.

It is an error wherever it would be dropped.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.calls.keywords import SoftmaxOptions
from reweight_ops._core.calls.logits import resolve_logits
from reweight_ops._core.engine.sources import LogitsSource

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
B, T, D, V = 3, 5, 6, 23
SHAPES = {"one": (), "a sequence": (B, 1), "a row": (B, T)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(shape=(B, T), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    d = dict(
        hidden=normal(B, T, D).requires_grad_(),
        weight=(2 * normal(V, D)).requires_grad_(),
        bias=normal(V).requires_grad_(),
    )
    d |= dict(
        ids=torch.randint(V, (B, T), generator=g),
        mask=torch.rand(B, T, generator=g) < 0.7,
        upstream=normal(3, B, T),
    )
    d["heat"] = (normal(*shape).abs() + 0.6).requires_grad_()
    return d


def logits_of(d):
    return 1.3 * (d["hidden"] @ d["weight"].T + d["bias"])


def eager(z, ids, heat, softcap=None):
    """``(logps, entropies, lse, log Σp²)`` in plain PyTorch."""
    x = (z if softcap is None else softcap * torch.tanh(z / softcap)) / (
        heat[..., None] if heat.shape == z.shape[:-1] else heat.view(-1, 1, 1)
    )
    log_p = torch.log_softmax(x, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (
        log_p.gather(-1, ids[..., None])[..., 0],
        entropy,
        x.logsumexp(-1),
        (2 * log_p).logsumexp(-1),
    )


def weighed(values, d):
    return sum(
        (u * torch.where(d["mask"], value, 0)).sum()
        for u, value in zip(d["upstream"], values, strict=False)
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics(shape, softcap, frozen, backend):
    exact = make(shape)
    want = torch.autograd.grad(
        weighed(eager(logits_of(exact), exact["ids"], exact["heat"], softcap), exact),
        [exact["heat"], exact["hidden"]],
    )
    d = make(shape, torch.float64 if backend == "reference" else torch.float32)
    near = {} if backend == "reference" else dict(rtol=1e-4, atol=1e-5)
    stats, options = (
        ("logps", "entropies", "lse"),
        dict(completion_mask=d["mask"], temperature=d["heat"], softcap=softcap, backend=backend),
    )
    inputs = [d["heat"]] if frozen else [d["heat"], d["hidden"]]
    if frozen:
        d |= {name: d[name].detach() for name in ("hidden", "weight", "bias")}
    found = rw.token_stats(logits_of(d), d["ids"], stats=stats, **options)
    head = dict(lm_head_bias=d["bias"], logit_scale=1.3)
    linear = [
        rw.linear_token_stats(
            d["hidden"],
            d["weight"],
            d["ids"],
            stats=stats,
            chunk_rows=4,
            compact_rows=compact,
            **head,
            **options,
        )
        for compact in (False, True)
    ]
    for one in (found, *linear):
        got = torch.autograd.grad(weighed((one.logps, one.entropies, one.lse), d), inputs)
        for a, e in zip(got, want, strict=False):
            torch.testing.assert_close(a.double(), e, **near)


def test_each_statistic_alone_and_the_second_moment(backend):
    """Also ``log_sum_p_sq``, which losses read; a name that only a derivative reads is
    not returned.
    """
    d = make(dtype=torch.float32)
    heat = d["heat"].detach().double().requires_grad_()
    truth = dict(
        zip(
            ("logp", "entropy", "lse", "log_sum_p_sq"),
            eager(logits_of(d).double(), d["ids"], heat),
            strict=True,
        )
    )
    for name, value in truth.items():
        options = SoftmaxOptions(temperature=d["heat"], backend=backend)
        found = LogitsSource(
            resolve_logits("test", logits_of(d), d["ids"], options, {})
        ).statistics((name,), backend)
        assert set(found) == {"logp", "lse", name}
        (got,) = torch.autograd.grad(found[name].sum(), d["heat"])
        (want,) = torch.autograd.grad(value.sum(), heat, retain_graph=True)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["grpo", "gspo", rw.methods.dapo(entropy_coef=0.1)], ids=["grpo", "gspo", "dapo"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses(spec, shape):
    """The gradient is that of the loss on eager statistics; ``auto`` takes two passes,
    and ``explain`` says why.
    """
    d = make(shape)
    z = logits_of(d)
    old = eager(z, d["ids"], d["heat"])[0].detach() + 0.1 * d["upstream"][0]
    data = dict(spec=spec, completion_mask=d["mask"], old_per_token_logps=old)
    logps, entropies, *_ = eager(z, d["ids"], d["heat"])
    loss = rw.policy_loss_from_logps(
        logps, d["upstream"][1], entropies=entropies, unused="ignore", **data
    ).loss
    want = torch.autograd.grad(loss, [d["heat"], d["hidden"], d["weight"]], retain_graph=True)
    assert want[0].abs().max() > 1e-3
    calls = {
        rw.policy_loss: (z, d["ids"], d["upstream"][1]),
        rw.linear_policy_loss: (d["hidden"], d["weight"], d["ids"], d["upstream"][1]),
    }
    for op, arguments in calls.items():
        head = (
            dict(lm_head_bias=d["bias"], logit_scale=1.3, chunk_rows=4)
            if op is rw.linear_policy_loss
            else {}
        )
        out = op(*arguments, temperature=d["heat"], **data, **head)
        for a, e in zip(
            torch.autograd.grad(out.loss, [d["heat"], d["hidden"], d["weight"]], retain_graph=True),
            want,
            strict=True,
        ):
            torch.testing.assert_close(a, e)
        float32 = [x.float().detach() if x.is_floating_point() else x for x in arguments]
        rest = {
            **data,
            "spec": "grpo",
            "old_per_token_logps": old.float(),
            "temperature": d["heat"].float(),
            "backend": "reference",
        }
        told = rw.explain(op, *float32, **rest)
        assert (told.plan, told.one_pass_unsupported_reason) == (
            "two_pass",
            "temperature requires grad",
        )
        with pytest.raises(
            rw.UnsupportedRequest, match="plan='one_pass' is impossible: temperature requires grad"
        ):
            op(*float32, plan="one_pass", **rest)


def test_a_loss_of_pairs():
    d = make((4, 1))
    g = torch.Generator().manual_seed(1)
    z, ids = (
        torch.randn(4, 3, V, generator=g, dtype=torch.float64),
        torch.randint(V, (4, 3), generator=g),
    )
    reference = dict(spec="dpo", ref_sequence_logps=torch.full((4,), -9.0, dtype=torch.float64))
    got = torch.autograd.grad(
        rw.preference_loss(z, ids, temperature=d["heat"], **reference).loss, d["heat"]
    )[0]
    logps = eager(z, ids, d["heat"])[0]
    torch.testing.assert_close(
        got,
        torch.autograd.grad(rw.preference_loss_from_logps(logps, **reference).loss, d["heat"])[0],
    )


def test_columns_and_rows_without_probability(backend):
    """``-inf`` columns do not contribute. An ignored row adds exactly 0, whatever it
    holds.

    A target of ``-inf`` with a zero derivative gives no NaN.
    """
    d = make(dtype=torch.float32)
    z = logits_of(d).detach().clone()
    z[..., 3] = -math.inf
    d["ids"][0, 0] = 3
    d["upstream"][:, 0, 0] = 0
    d["ids"][d["ids"] == 3] = 4
    d["ids"][0, 0], d["mask"][0, 0] = 3, True
    z[~d["mask"]] = math.nan
    for softcap in (None, 5.0):
        found = rw.token_stats(
            z,
            d["ids"],
            stats=("logps", "entropies", "lse"),
            completion_mask=d["mask"],
            temperature=d["heat"],
            softcap=softcap,
            backend=backend,
        )
        (got,) = torch.autograd.grad(
            (found.logps * d["upstream"][0] + found.entropies * d["upstream"][1]).sum(), d["heat"]
        )
        heat = d["heat"].detach().double().requires_grad_()
        kept = torch.cat([z[..., :3], z[..., 4:]], -1).double().nan_to_num()
        shifted = torch.where(d["ids"] > 3, d["ids"] - 1, d["ids"]).clamp(max=V - 2)
        logps, entropies, *_ = eager(kept, shifted, heat, softcap)
        inside = d["mask"].clone()
        inside[0, 0] = False
        total = torch.where(
            inside, logps * d["upstream"][0] + entropies * d["upstream"][1], 0
        ).sum()
        torch.testing.assert_close(
            got.double(), torch.autograd.grad(total, heat)[0], rtol=1e-4, atol=1e-5
        )
        assert (got[~d["mask"]] == 0).all()


def test_transforms_compiled_and_second_derivatives():
    d = make((), torch.float32)

    def loss(heat, h):
        head = dict(lm_head_bias=d["bias"].detach(), chunk_rows=4, temperature=heat)
        logps, entropies = rw.linear_token_logps(
            h, d["weight"].detach(), d["ids"], return_entropy=True, **head
        )
        return (logps * d["upstream"][0] + entropies * d["upstream"][1]).sum()

    want = torch.autograd.grad(loss(d["heat"], d["hidden"]), [d["heat"], d["hidden"]])
    inputs = d["heat"].detach(), d["hidden"].detach()
    for a, e in zip(torch.func.grad(loss, argnums=(0, 1))(*inputs), want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        torch.autograd.grad(compiled(d["heat"], d["hidden"]), [d["heat"], d["hidden"]]),
        want,
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        rw.UnsupportedRequest,
        match=r"but the temperature requires grad: torch.func \(grad, hessian\) has them",
    ):
        torch.autograd.grad(loss(d["heat"], d["hidden"]), d["heat"], create_graph=True)


REFUSED = {
    "token_divergence": lambda z, ids, t: rw.token_divergence(z, z.detach(), temperature=t),
    "the other's": lambda z, ids, t: rw.token_divergence(z, z.detach(), other_temperature=t),
    "generalized_jsd": lambda z, ids, t: rw.token_divergence(
        z, z.detach(), kind="generalized_jsd", temperature=t
    ),
    "distillation_loss": lambda z, ids, t: rw.distillation_loss(z, z.detach(), temperature=t),
    "linear_token_divergence": lambda z, ids, t: rw.linear_token_divergence(
        z, torch.eye(V), z.detach(), temperature=t
    ),
    "the teacher's": lambda z, ids, t: rw.linear_distillation_loss(
        z, torch.eye(V), z.detach(), teacher_temperature=t
    ),
    "does not write over its logits": lambda z, ids, t: rw.divergences.pld(
        z, z.detach(), ids, temperature=t
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_op_without_that_gradient_refuses(name):
    z, ids = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        rw.InvalidCall, match="temperature requires grad, but no gradient of this op flows to it"
    ):
        REFUSED[name](z, ids, torch.ones(2, 3, requires_grad=True))
    with torch.no_grad():
        REFUSED[name](z, ids, torch.ones(2, 3, requires_grad=True))
