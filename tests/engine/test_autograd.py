"""Outputs and autograd: what is differentiable, what upstream gradients, second
backwards and consumed logits do (docs/api.md).
"""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops.testing import make_batch

PLANS = ["one_pass", "two_pass"]
BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(
        b, Request("token_loss_grad", torch.device("cpu"), torch.float32, rw.methods.grpo().program)
    )
    is None
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def batch():
    return make_batch(rw.methods.grpo(), (3, 8), 29)


def leaf(batch):
    return batch["logits"].detach().clone().requires_grad_()


def call(batch, logits, spec="grpo", **options):
    return rw.policy_loss(**{**batch, "logits": logits, **options}, spec=spec)


@pytest.mark.parametrize("plan", PLANS)
def test_all_but_the_loss_is_detached(batch, backend, plan):
    out = call(batch, leaf(batch), plan=plan, backend=backend)
    assert out.loss.requires_grad and out.plan == plan and out.backend == backend
    rows = (
        out.per_token_logps,
        out.entropies,
        out.per_token_loss,
        out.ratio,
        out.coef,
        out.is_clipped,
    )
    assert not any(x.requires_grad for x in (*rows, out.metrics.sums))
    assert (
        all(x.shape == (3, 8) for x in rows)
        and all(x.dtype == torch.float32 for x in rows[:-1])
        and out.is_clipped.dtype == torch.bool
    )


def test_differentiable_outputs_select_two_pass(batch, backend):
    z = leaf(batch)
    out = call(batch, z, differentiable_outputs=True, backend=backend)
    assert out.plan == "two_pass"
    (got,) = torch.autograd.grad(
        out.loss + 0.1 * out.entropies.sum() + (0.3 * out.per_token_logps).sum(), z
    )
    logps, entropies = rw.token_logps(
        z,
        batch["completion_ids"],
        completion_mask=batch["completion_mask"],
        return_entropy=True,
        backend=backend,
    )
    (want,) = torch.autograd.grad(
        call(batch, z, plan="two_pass", backend=backend).loss
        + 0.1 * entropies.sum()
        + (0.3 * logps).sum(),
        z,
    )
    torch.testing.assert_close(got, want)
    with pytest.raises(rw.UnsupportedRequest, match="differentiable_outputs"):
        call(batch, z, differentiable_outputs=True, plan="one_pass", backend=backend)


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 0.0])
@pytest.mark.parametrize("plan", PLANS)
def test_a_scalar_upstream_scales_the_gradient(batch, backend, plan, upstream):
    z = leaf(batch)
    (plain,) = torch.autograd.grad(call(batch, z, plan=plan, backend=backend).loss, z)
    (scaled,) = torch.autograd.grad(call(batch, z, plan=plan, backend=backend).loss * upstream, z)
    torch.testing.assert_close(scaled, plain * upstream)


def test_upstream_one_does_no_work(batch, monkeypatch):
    """No memory is touched: the saved gradient itself is returned."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "mul_", lambda self, other: calls.append(other) or self)
    z = leaf(batch)
    call(batch, z, plan="one_pass", backend="reference").loss.backward()
    assert not calls
    (call(batch, z, plan="one_pass", backend="reference").loss * 2).backward()
    assert len(calls) == 1


def test_second_backward_of_one_pass_raises_and_two_pass_retains(batch, backend):
    z = leaf(batch)
    out = call(batch, z, plan="one_pass", backend=backend)
    torch.autograd.grad(out.loss, z, retain_graph=True)
    with pytest.raises(rw.ReweightOpsError, match='plan="two_pass"'):
        torch.autograd.grad(out.loss, z)
    out = call(batch, z, plan="two_pass", backend=backend)
    first, second = (torch.autograd.grad(out.loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_auto_takes_one_pass_only_when_it_may(batch, backend):
    z = leaf(batch)
    rows = torch.rand(3, 8)

    def plan(logits=z, spec="grpo", **options):
        return call(batch, logits, spec, backend=backend, **options).plan

    assert plan() == "one_pass"
    assert plan(spec="gspo") == plan(spec="top_entropy") == "two_pass"
    assert (
        plan(advantages=rows.clone().requires_grad_())
        == plan(token_weights=rows.clone().requires_grad_())
        == "two_pass"
    )
    assert plan(spec=rw.methods.grpo().replace(reduction=rw.NoReduction())) == "two_pass"
    assert plan(spec=rw.methods.grpo(epsilon_high=rows)) == "two_pass"
    assert (
        plan(logits=z.half()) == "two_pass"
        and plan(logits=z.half(), loss_scale=1024.0) == "one_pass"
    )
    assert plan(logits=z.detach()) == "two_pass"
    with torch.no_grad():
        assert plan() == "two_pass"
    if backend == "reference":
        assert plan(logits=z.double()) == "two_pass"


def test_gradient_to_advantages_and_token_weights_is_exact(backend):
    batch = make_batch(rw.methods.grpo(), (3, 8), 29, dtype=torch.float64)
    z = leaf(batch)
    w = torch.rand(3, 8, dtype=torch.float64)
    w[0, 0] = 0  # a weight of zero still has a gradient

    def loss(adv, weights):
        return rw.policy_loss(
            **{**batch, "logits": z, "advantages": adv}, spec="grpo", token_weights=weights
        ).loss

    assert torch.autograd.gradcheck(
        loss, (batch["advantages"].requires_grad_(), w.requires_grad_())
    )


def test_a_hyper_parameter_may_learn():
    batch = make_batch(rw.methods.grpo(beta=0.1), (3, 8), 29, dtype=torch.float64)

    def loss(beta):
        return rw.policy_loss(**batch, spec=rw.methods.grpo(beta=beta)).loss

    assert torch.autograd.gradcheck(
        loss, (torch.tensor(0.1, dtype=torch.float64, requires_grad=True),)
    )


def test_per_row_hyper_parameters(batch, backend):
    """HAPO's clip bounds, one number per row, equal the calls with each number."""
    z = leaf(batch)
    high = torch.where(torch.arange(3) == 1, 0.5, 0.1)[:, None].expand(3, 8)
    out = call(batch, z, rw.methods.dapo(epsilon_high=high), backend=backend)
    parts = {
        e: call(batch, z, rw.methods.dapo(epsilon_high=e), backend=backend).per_token_loss
        for e in (0.1, 0.5)
    }
    torch.testing.assert_close(out.per_token_loss, torch.where(high == 0.5, parts[0.5], parts[0.1]))


def test_a_schedule_tensor_equals_the_number(batch, backend):
    z = leaf(batch)
    for plan in PLANS:
        want = call(
            batch,
            z,
            rw.methods.grpo(epsilon_high=0.3, entropy_coef=0.01),
            plan=plan,
            backend=backend,
        )
        spec = rw.methods.grpo(epsilon_high=torch.tensor(0.3), entropy_coef=torch.tensor(0.01))
        got = call(batch, z, spec, plan=plan, backend=backend)
        assert got.plan == plan
        torch.testing.assert_close(got.loss, want.loss)


# --- consumed logits ------------------------------------------------------------------
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_consumed_logits_hold_the_gradient(batch, backend, plan, drop_last):
    z = leaf(batch)
    if drop_last:
        z = torch.cat([z.detach(), z.detach()[:, :1]], 1).requires_grad_()
    (want,) = torch.autograd.grad(
        call(batch, z, plan=plan, backend=backend, drop_last=drop_last).loss, z
    )
    logits = z * 1
    out = call(batch, logits, plan=plan, backend=backend, consume_logits=True, drop_last=drop_last)
    (got,) = torch.autograd.grad(out.loss, z)
    assert torch.equal(got, want) and torch.equal(logits.detach(), want)
    with pytest.raises(rw.InvalidCall, match="consumed"):
        rw.token_logps(logits, batch["completion_ids"], drop_last=drop_last)


def test_consuming_token_logps(batch, backend):
    z = leaf(batch)
    (want,) = torch.autograd.grad(
        rw.token_logps(z, batch["completion_ids"], backend=backend).sum(), z
    )
    logits = z * 1
    (got,) = torch.autograd.grad(
        rw.token_logps(logits, batch["completion_ids"], consume_logits=True, backend=backend).sum(),
        z,
    )
    assert torch.equal(got, want) and torch.equal(logits.detach(), want)


def test_an_earlier_user_of_consumed_logits_raises(batch, backend):
    z = leaf(batch)
    logits = z * 1
    earlier = (logits * logits).sum()
    call(batch, logits, plan="one_pass", consume_logits=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()


def test_consuming_a_leaf_is_an_error_and_nothing_happens_without_grad(batch, backend):
    z = leaf(batch)
    with pytest.raises(rw.InvalidCall, match="leaf"):
        call(batch, z, consume_logits=True, backend=backend)
    before = z.detach().clone()
    with torch.no_grad():
        call(batch, z, consume_logits=True, backend=backend)
    call(batch, z.detach(), consume_logits=True, backend=backend)
    assert torch.equal(z.detach(), before)


def test_a_change_of_the_logits_before_backward_is_noticed(batch, backend):
    logits = leaf(batch) * 1
    out = call(batch, logits, plan="two_pass", backend=backend)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


# --- surroundings ---------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_around_head_and_loss(batch, backend, plan):
    weight = torch.randn(29, 6, requires_grad=True)
    hidden = torch.randn(3, 8, 6)

    def head(w):
        return call(batch, hidden @ w.T, plan=plan, backend=backend, consume_logits=True).loss

    (want,) = torch.autograd.grad(
        call(batch, hidden @ weight.T, plan=plan, backend=backend).loss, weight
    )
    (got,) = torch.autograd.grad(checkpoint(head, weight, use_reentrant=False), weight)
    torch.testing.assert_close(got, want)


def test_inputs_from_inference_mode(batch, backend):
    with torch.inference_mode():
        old, adv, mask = (
            batch["old_per_token_logps"] * 1,
            batch["advantages"] * 1,
            batch["completion_mask"] & True,
        )
        ids = batch["completion_ids"] * 1
    z = leaf(batch)
    for plan in PLANS:
        out = rw.policy_loss(
            z,
            ids,
            adv,
            spec="grpo",
            old_per_token_logps=old,
            completion_mask=mask,
            plan=plan,
            backend=backend,
        )
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, z)[0],
            torch.autograd.grad(call(batch, z, plan=plan, backend=backend).loss, z)[0],
        )


def test_under_inference_mode_and_autocast(batch, backend):
    z = leaf(batch)
    want = call(batch, z, backend=backend)
    with torch.inference_mode():
        assert torch.equal(
            call(batch, z, backend=backend).loss, call(batch, z.detach(), backend=backend).loss
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(batch, z, backend=backend)
        assert torch.equal(got.loss, want.loss) and torch.equal(
            torch.autograd.grad(got.loss, z)[0], torch.autograd.grad(want.loss, z)[0]
        )


def test_a_result_does_not_keep_the_logits_alive(batch, backend):
    logits = leaf(batch) * 1
    out = call(batch, logits, plan="two_pass", backend=backend)
    out.loss.backward()
    alive = weakref.ref(logits)
    del logits
    batch.pop("logits")
    gc.collect()
    assert alive() is None and out.metrics["tokens"] > 0


@pytest.mark.parametrize("plan", PLANS)
def test_the_output_is_a_frozen_pytree(batch, backend, plan):
    out = call(batch, leaf(batch), plan=plan, backend=backend)
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.loss = 0
    doubled = _pytree.tree_map(lambda x: x * 2 if x.is_floating_point() else x, out)
    torch.testing.assert_close(doubled.loss, out.loss * 2)
    torch.testing.assert_close(doubled.metrics["tokens"], out.metrics["tokens"] * 2)
    assert torch.equal(doubled.is_clipped, out.is_clipped) and doubled.plan == plan


def test_coef_is_the_derivative_by_the_log_prob(batch, backend):
    """One column's gradient is coef * (1[v = y] - p): the target's determines coef."""
    for spec in ("grpo", "gspo", rw.methods.advantage_reweighting()):
        z = leaf(batch)
        out = call(batch, z, spec, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, z)
        p = torch.softmax(z.detach(), -1).gather(-1, batch["completion_ids"][..., None])
        target = grad.gather(-1, batch["completion_ids"][..., None])
        torch.testing.assert_close((out.coef[..., None] * (1 - p)), target, rtol=1e-4, atol=1e-8)


def test_statistics(batch, backend):
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
    z, ids, mask = leaf(batch), batch["completion_ids"], batch["completion_mask"]
    got = rw.token_stats(
        z, ids, stats=names, completion_mask=mask, temperature=0.8, backend=backend
    )
    logp = torch.log_softmax(z.double() / 0.8, -1)
    y = logp.gather(-1, ids[..., None])[..., 0]
    want = {
        "logps": y,
        "entropies": -(logp.exp() * logp).sum(-1),
        "lse": (z.double() / 0.8).logsumexp(-1),
        "log_sum_p_sq": (2 * logp).logsumexp(-1),
        "max_logp": logp.amax(-1),
        "mean_logits": (z.double() / 0.8).mean(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(
            getattr(got, name).double(), torch.where(mask, value, 0), rtol=2e-6, atol=2e-6
        )
    # From the fp32 log-prob: four of its roundings, over 1 - p.
    log1m_p = torch.log1p(-y.exp())
    assert ((got.log1m_p - log1m_p).abs() <= 4 * 2.0**-24 * (1 + 1 / (-torch.expm1(y))))[
        mask
    ].all() and (got.log1m_p[~mask] == 0).all()
    assert (
        torch.equal(got.is_top1, (logp.argmax(-1) == ids) & mask)
        and got.is_top1.any()
        and not got.is_top1.all()
    )
    assert [n for n in names if getattr(got, n).requires_grad] == ["logps", "entropies", "lse"]
    (grad,) = torch.autograd.grad(got.logps.sum() + 2 * got.entropies.sum() + 3 * got.lse.sum(), z)
    x = z.detach().double().requires_grad_()
    logp = torch.log_softmax(x / 0.8, -1)
    total = (
        logp.gather(-1, ids[..., None])[..., 0]
        - 2 * (logp.exp() * logp).sum(-1)
        + 3 * (x / 0.8).logsumexp(-1)
    )
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad((total * mask).sum(), x)[0], rtol=1e-5, atol=1e-6
    )
    only = rw.token_stats(z, ids, stats=("is_top1",), backend=backend)
    assert only.logps is None and only.lse is None and only.is_top1 is not None


def test_policy_loss_from_logps_is_the_middle(batch):
    spec = rw.methods.grpo(beta=0.1, entropy_coef=0.01)
    batch = make_batch(spec, (3, 8), 29, dtype=torch.float64)
    z = leaf(batch)
    logps, entropies = rw.token_logps(z, batch["completion_ids"], return_entropy=True)
    rest = {k: v for k, v in batch.items() if k not in ("logits", "completion_ids", "advantages")}
    out = rw.policy_loss_from_logps(
        logps, batch["advantages"], spec=spec, entropies=entropies, **rest
    )
    whole = call(batch, z, spec)
    torch.testing.assert_close(out.loss, whole.loss)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, z)[0], torch.autograd.grad(whole.loss, z)[0]
    )
    with pytest.raises(rw.InvalidCall, match="reads entropy: pass entropies"):
        rw.policy_loss_from_logps(logps, batch["advantages"], spec=spec, **rest)
