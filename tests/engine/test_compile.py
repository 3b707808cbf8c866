"""Custom ops and torch.compile: opcheck, fullgraph through both plans, and schedules
that compile once.
"""

import itertools
import subprocess
import sys

import pytest
import torch
import torch._dynamo

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01)
BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(
        b, Request("token_loss_grad", torch.device("cpu"), torch.float32, SPEC.program)
    )
    is None
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def ops_arguments(backend, drop_last):
    g = torch.Generator().manual_seed(0)
    n, t, v = 2, 3, 17
    rows = [torch.randn(n * t, generator=g) for _ in range(4)]
    z = torch.randn(n, t + drop_last, v, generator=g)
    ids = torch.randint(v, (n * t,), generator=g)
    one = torch.ones(1)
    logp, entropy, lse, low, p_sq = rw.kernels.token_stats(
        z[:, :t],
        ids,
        one,
        stats=("logp", "entropy", "lse", "lse_low", "log_sum_p_sq"),
        backend="reference",
    )
    tail, whole = (v, float("inf"), bool(drop_last)), (v, float("inf"), 0, v, bool(drop_last))
    params = torch.tensor([v if torch.is_tensor(v) else float(v) for v in SPEC.parameter_values])
    weights = torch.full((len(SPEC.rules), n * t), 0.1)
    # the other logits, and arguments of both
    two = (torch.randn(n, t, v, generator=g), ids, one, one)
    two_tail = (v, float("inf"), 5.0, bool(drop_last), backend)
    table = torch.ops.reweight_ops.divergence_stats(z, *two, *two_tail)
    mixed = torch.tensor([0.5, 0.7, -0.3])
    return {
        "token_stats": (z, ids, one, *whole, "logp,entropy", backend),
        "token_grad": (
            z,
            ids,
            one,
            logp,
            lse,
            low,
            entropy,
            p_sq,
            rows[0],
            rows[1],
            None,
            None,
            *whole,
            backend,
        ),
        "token_grad_": (
            z.clone(),
            ids,
            one,
            logp,
            lse,
            None,
            entropy,
            None,
            rows[0],
            rows[1],
            None,
            None,
            *whole,
            backend,
        ),
        "token_loss_grad": (
            z,
            ids,
            one,
            weights,
            logp - 0.1,
            rows[0],
            logp + 0.1,
            None,
            params,
            SPEC.program.encode(),
            *tail,
            backend,
        ),
        "token_loss_grad_": (
            z.clone(),
            ids,
            one,
            weights,
            None,
            rows[0],
            logp + 0.1,
            None,
            params,
            SPEC.program.encode(),
            *tail,
            backend,
        ),
        "scale_": (z.clone(), torch.tensor(2.0), backend),
        "divergence_stats": (z, *two, *two_tail),
        "divergence_grad": (z, *two, table, torch.stack(rows[:3]), *two_tail),
        "divergence_grad_": (z.clone(), *two, table, torch.stack(rows[:3]), *two_tail),
        "divergence_loss_grad": (z, *two, mixed, rows[0], *two_tail),
        "divergence_loss_grad_": (z.clone(), *two, mixed, rows[0], *two_tail),
    }


OPS = [
    f"{kind}{in_place}"
    for kind in ("token_grad", "token_loss_grad", "divergence_grad", "divergence_loss_grad")
    for in_place in ("", "_")
]
OPS += ["token_stats", "divergence_stats", "scale_"]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, backend, drop_last):
    results = torch.library.opcheck(
        getattr(torch.ops.reweight_ops, op).default, ops_arguments(backend, drop_last)[op]
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_")])
def test_in_place_ops_bump_the_version(backend, op):
    z, *rest = ops_arguments(backend, False)[op]
    before = z._version
    getattr(torch.ops.reweight_ops, op)(z, *rest)
    assert z._version > before


def run(function, batch, **options):
    z = batch["logits"].detach().clone().requires_grad_()
    out = function(z, batch, **options)
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_fullgraph(backend, plan, consume):
    batch = make_batch(SPEC, (3, 8), 29)

    def step(z, batch):
        return rw.policy_loss(
            **{**batch, "logits": z * 1},
            spec=SPEC,
            plan=plan,
            backend=backend,
            consume_logits=consume,
        )

    want, expected = run(step, batch)
    got, grad = run(torch.compile(step, fullgraph=True, backend="aot_eager"), batch)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(grad, expected)
    assert (
        got.metrics.as_floats() == pytest.approx(want.metrics.as_floats(), rel=1e-5)
        and got.plan == plan
    )


@pytest.mark.parametrize("spec", ["dapo", "gspo", "cispo", "advantage_reweighting", "top_entropy"])
def test_fullgraph_by_name(spec):
    batch = make_batch(rw.method(spec), (3, 8), 29)

    def step(z, batch):
        return rw.policy_loss(**{**batch, "logits": z * 1}, spec=spec)

    want, expected = run(step, batch)
    got, grad = run(torch.compile(step, fullgraph=True, backend="aot_eager"), batch)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(grad, expected)


def test_fullgraph_inductor(backend):
    """Runs the real compiler once: the middle of two_pass is then generated code."""
    batch = make_batch(SPEC, (3, 8), 29)

    def step(z, batch):
        return rw.policy_loss(
            **{**batch, "logits": z * 1}, spec=SPEC, plan="two_pass", backend=backend
        ).loss

    z = batch["logits"].detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(step(z, batch), z)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(z, batch), z)
    torch.testing.assert_close(got, want)


def test_fullgraph_token_logps(backend):
    batch = make_batch(SPEC, (3, 8), 29)
    z, ids = batch["logits"].detach().clone().requires_grad_(), batch["completion_ids"]

    def step(z):
        logps, entropies = rw.token_logps(
            z * 1, ids, return_entropy=True, temperature=0.7, backend=backend
        )
        return (logps * 0.3 + entropies).sum()

    (want,) = torch.autograd.grad(step(z), z)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(z), z)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_schedule_over_any_hyper_parameter_compiles_once(plan):
    """Every hyper-parameter is a 0-d tensor that changes each step: there is one
    compilation, and each step uses its own value.
    """
    values = [torch.tensor(x) for x in (0.2, 0.3, 1.5, 0.04, 0.01, 0.3, 1.0, 30.0, 1.5)]
    low, high, delta, beta, bonus, alpha, temperature, items, scale = values
    spec = rw.methods.dapo(epsilon_low=low, epsilon_high=high).replace(**{"surrogate.delta": delta})
    spec = spec.with_penalty(rw.Penalty(rw.rules.penalties.K3(), beta)).with_penalty(
        rw.Penalty(rw.rules.penalties.EntropyBonus(), bonus)
    )
    spec = spec.with_weight(rw.weights.AdvantageReweighting(alpha=alpha))
    # large enough that every hyper-parameter is active somewhere
    batch = make_batch(spec, (8, 16), 29)
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(z, batch):
        return rw.policy_loss(
            **{**batch, "logits": z * 1},
            spec=spec,
            plan=plan,
            temperature=temperature,
            num_items_in_batch=items,
            loss_scale=scale,
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend=counting)
    z = batch["logits"].detach().clone().requires_grad_()
    seen = []
    for index in range(len(values)):
        values[index].mul_(1.1)
        (want,) = torch.autograd.grad(step(z, batch), z)
        (got,) = torch.autograd.grad(compiled(z, batch), z)
        torch.testing.assert_close(got, want)
        seen.append(got)
    assert compilations == 1
    assert [
        i for i, (a, b) in enumerate(itertools.pairwise(seen)) if (a - b).abs().max() < 1e-9
    ] == []


def test_the_first_call_of_a_process_compiles():
    """Nothing was uploaded before: the trace must find what it uploads itself."""
    script = (
        "import torch, reweight_ops as rw\n"
        "def loss(z, ids, t):\n"
        "    kl = rw.token_divergence(z, t).mean()\n"
        "    return kl + rw.policy_loss(z, ids, 1.0, spec='dapo', temperature=0.7).loss\n"
        "z, t = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11)\n"
        "args = z, torch.randint(0, 11, (2, 3)), t\n"
        "got = torch.compile(loss, fullgraph=True, backend='aot_eager')(*args)\n"
        "torch.testing.assert_close(got, loss(*args))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ONE_TEMPERATURE = {
    "kd": lambda z, y, ids: rw.divergences.kd(z, y, ids).sum(),
    "a number twice": lambda z, y, ids: (
        rw.distillation_loss(z, y, temperature=2.0, teacher_temperature=2.0).loss
    ),
}


@pytest.mark.parametrize("name", ONE_TEMPERATURE)
def test_one_temperature_of_two_logits_tensors(name):
    """torch.compile takes no tensor twice as an argument of one function."""
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(6, 5, generator=generator) for _ in range(2))
    ids, loss = torch.arange(6) % 5, ONE_TEMPERATURE[name]
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    grads = []
    for function in (loss, compiled):
        leaf = z.clone().requires_grad_()
        function(leaf, y, ids).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
