"""The rules of docs/semantics.md on values that are not finite, old log-probs, factors,
divisors and scales, on every backend here.
"""

import math

import pytest
import torch
from small_calls import CPU_BACKENDS, PLANS, B, T, V, loss_and_grad, same, small_batch

import reweight_ops as rw


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def data():
    return small_batch()


# --- -inf, NaN ------------------------------------------------------------------------
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("plan", PLANS)
def test_minus_inf_columns(data, backend, plan, softcap):  # docs/semantics.md: S23
    masked = torch.zeros(V, dtype=torch.bool)
    masked[[0, 4, 12]] = True
    z = data["z"].masked_fill(masked, -math.inf)
    kept = torch.nonzero(~masked)[:, 0]
    position = torch.searchsorted(kept, data["ids"].clamp(1, 3))
    ids = kept[position]
    spec = rw.methods.grpo(entropy_coef=0.05)
    options = dict(old_per_token_logps=data["old"], plan=plan, backend=backend, softcap=softcap)
    out, grad = loss_and_grad(z, ids, data["adv"], spec, **options)
    want, small = loss_and_grad(data["z"][..., kept], position, data["adv"], spec, **options)
    assert (grad[..., masked] == 0).all()
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(grad[..., kept], small, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS)
def test_minus_inf_target(data, backend, plan):  # docs/semantics.md: S24
    z = data["z"].clone()
    z[0, 0, data["ids"][0, 0]] = -math.inf
    out, grad = loss_and_grad(z, data["ids"], data["adv"], "reinforce", plan=plan, backend=backend)
    assert out.per_token_logps[0, 0] == -math.inf and out.loss.isinf()
    assert (
        grad.isfinite().all() and grad[0, 0, data["ids"][0, 0]] == 0 and grad[0, 0].abs().sum() > 0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plan", PLANS)
def test_a_bad_row_is_nan_alone(data, backend, plan, value):  # docs/semantics.md: S25
    z = data["z"].clone()
    if value == -math.inf:
        z[1, 2] = value
    else:
        z[1, 2, 4] = value
    out, grad = loss_and_grad(z, data["ids"], data["adv"], "reinforce", plan=plan, backend=backend)
    other = torch.ones(B, T, dtype=torch.bool)
    other[1, 2] = False
    assert (
        out.per_token_logps[1, 2].isnan()
        and out.entropies[1, 2].isnan()
        and grad[1, 2].isnan().all()
    )
    clean, expected = loss_and_grad(
        data["z"], data["ids"], data["adv"], "reinforce", plan=plan, backend=backend
    )
    torch.testing.assert_close(grad[other], expected[other], rtol=0, atol=0)
    torch.testing.assert_close(
        out.per_token_logps[other], clean.per_token_logps[other], rtol=0, atol=0
    )


@pytest.mark.parametrize("plan", PLANS)
def test_a_ratio_that_would_overflow(data, backend, plan):  # docs/semantics.md: S15
    """exp(200) is inf in fp32; the clamp bounds it, and a clipped token's gradient is
    0, not NaN.
    """
    old = data["old"].clone()
    old[0, 0], old[0, 1] = -250.0, 200.0
    for spec in ("grpo", "sapo", "cispo", rw.methods.grpo(beta=0.1)):
        resolved = rw.method(spec) if isinstance(spec, str) else spec
        ref = {"ref_per_token_logps": old} if "ref_logp" in resolved.requires else {}
        out, grad = loss_and_grad(
            data["z"],
            data["ids"],
            data["adv"].abs(),
            resolved,
            old_per_token_logps=old,
            plan=plan,
            backend=backend,
            **ref,
        )
        assert out.loss.isfinite() and grad.isfinite().all()
        assert spec != "grpo" or (grad[0, 0] == 0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_a_zero_weight_selects_zero(data, backend, plan):  # docs/semantics.md: S11
    """0 * inf would be NaN: a token with weight 0 may hold anything."""
    adv = data["adv"].clone()
    adv[0, 1] = math.inf
    weights = torch.ones(B, T)
    weights[0, 1] = 0
    out, grad = loss_and_grad(
        data["z"], data["ids"], adv, token_weights=weights, plan=plan, backend=backend
    )
    assert out.loss.isfinite() and grad.isfinite().all() and (grad[0, 1] == 0).all()


# --- on-policy, weights, divisors, scale ----------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
def test_no_old_log_probs_is_on_policy(data, backend, plan):  # docs/semantics.md: S8
    out, grad = loss_and_grad(data["z"], data["ids"], data["adv"], plan=plan, backend=backend)
    _, reinforce = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        rw.methods.reinforce().replace(reduction=rw.SequenceMean()),
        plan=plan,
        backend=backend,
    )
    assert (out.ratio == 1).all()
    torch.testing.assert_close(grad, reinforce)
    own = rw.token_logps(data["z"], data["ids"], backend=backend)
    assert (
        rw.policy_loss(
            data["z"],
            data["ids"],
            data["adv"],
            spec="grpo",
            old_per_token_logps=own,
            plan="two_pass",
            backend=backend,
        ).ratio
        == 1
    ).all()
    given, same_grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], old_per_token_logps=own, plan=plan, backend=backend
    )
    assert (given.ratio == 1).all()
    torch.testing.assert_close(same_grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S10
def test_factors_multiply_the_surrogate_only(data, backend, plan):
    spec = rw.methods.dapo(entropy_coef=0.3)
    w, r = torch.rand(B, T), torch.rand(B, 1)
    options = dict(old_per_token_logps=data["old"], plan=plan, backend=backend)
    both = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        spec,
        token_weights=w,
        importance_sampling_ratio=r,
        **options,
    )
    same(
        both,
        loss_and_grad(data["z"], data["ids"], data["adv"], spec, token_weights=w * r, **options),
    )
    surrogate = loss_and_grad(
        data["z"], data["ids"], data["adv"], rw.methods.dapo(), token_weights=w * r, **options
    )
    entropy = loss_and_grad(data["z"], data["ids"], data["adv"] * 0, spec, **options)
    torch.testing.assert_close(both[0].loss, surrogate[0].loss + entropy[0].loss)
    torch.testing.assert_close(both[1], surrogate[1] + entropy[1])


# docs/semantics.md: S9
def test_a_weight_multiplies_the_term_not_the_advantage(data, backend):
    """They differ for a negative factor: -L(A) is not L(-A) under a clip."""
    old = data["old"] - 1
    flipped, _ = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        "dapo",
        token_weights=-torch.ones(B, T),
        old_per_token_logps=old,
        backend=backend,
    )
    plain, _ = loss_and_grad(
        data["z"], data["ids"], data["adv"], "dapo", old_per_token_logps=old, backend=backend
    )
    negative, _ = loss_and_grad(
        data["z"], data["ids"], -data["adv"], "dapo", old_per_token_logps=old, backend=backend
    )
    torch.testing.assert_close(flipped.loss, -plain.loss)
    assert abs(flipped.loss - negative.loss) > 0.1
    torch.testing.assert_close(
        flipped.metrics["clip_ratio/region_mean"], plain.metrics["clip_ratio/region_mean"]
    )


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S12
def test_num_items_in_batch_is_the_divisor(data, backend, plan):
    options = dict(
        old_per_token_logps=data["old"], completion_mask=data["mask"], plan=plan, backend=backend
    )
    plain, grad = loss_and_grad(data["z"], data["ids"], data["adv"], "dapo", **options)
    for n in (37.0, torch.tensor(37.0)):
        out, scaled = loss_and_grad(
            data["z"], data["ids"], data["adv"], "dapo", num_items_in_batch=n, **options
        )
        torch.testing.assert_close(out.loss, plain.loss * data["mask"].sum() / 37)
        torch.testing.assert_close(scaled, grad * data["mask"].sum() / 37)


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S14
def test_loss_scale_scales_loss_and_gradient_but_not_metrics(data, backend, plan):
    spec = rw.methods.grpo(entropy_coef=0.1)
    plain, grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], spec, plan=plan, backend=backend
    )
    for scale in (1024.0, torch.tensor(1024.0)):
        out, scaled = loss_and_grad(
            data["z"], data["ids"], data["adv"], spec, loss_scale=scale, plan=plan, backend=backend
        )
        torch.testing.assert_close(out.loss, plain.loss * 1024)
        torch.testing.assert_close(scaled, grad * 1024)
        assert out.metrics.as_floats() == pytest.approx(plain.metrics.as_floats())


def test_from_function_equals_the_reducer(data, backend):
    def reducer(loss, mask):
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    options = dict(old_per_token_logps=data["old"], completion_mask=data["mask"], backend=backend)
    same(
        loss_and_grad(
            data["z"],
            data["ids"],
            data["adv"],
            rw.methods.grpo().replace(reduction=rw.FromFunction(reducer)),
            **options,
        ),
        loss_and_grad(data["z"], data["ids"], data["adv"], "grpo", **options),
    )


def test_no_reduction_takes_a_per_row_upstream(data, backend):
    spec = rw.methods.dapo().replace(reduction=rw.NoReduction())
    z = data["z"].clone().requires_grad_()
    out = rw.policy_loss(
        z,
        data["ids"],
        data["adv"],
        spec=spec,
        completion_mask=data["mask"],
        old_per_token_logps=data["old"],
        backend=backend,
    )
    assert (
        out.plan == "two_pass"
        and out.loss.shape == (B, T)
        and (out.loss[data["mask"] == 0] == 0).all()
    )
    upstream = torch.rand(B, T)
    (grad,) = torch.autograd.grad(out.loss, z, upstream)
    _, want = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        rw.methods.dapo().replace(reduction=rw.TokenSum()),
        token_weights=upstream,
        completion_mask=data["mask"],
        old_per_token_logps=data["old"],
        backend=backend,
    )
    torch.testing.assert_close(grad, want)
    # An expanded upstream gradient, as from .sum(), is not a special case.
    (ones,) = torch.autograd.grad(rw.token_logps(z, data["ids"], backend=backend).sum(), z)
    (reference,) = torch.autograd.grad(
        torch.log_softmax(z, -1).gather(-1, data["ids"][..., None]).sum(), z
    )
    torch.testing.assert_close(ones, reference)


def test_advantages_may_be_none_where_nothing_reads_them(data, backend):
    from reweight_ops._core.formula.base import RULES

    @rw.rule("sft_nll")
    class SftNll(rw.Rule):
        def loss(self, xp, t):
            return -t.logp

    try:
        out, grad = loss_and_grad(
            data["z"],
            data["ids"],
            None,
            rw.PolicyLossSpec(surrogate=SftNll()),
            completion_mask=data["mask"],
            backend=backend,
        )
        z = data["z"].clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(
            z.view(-1, V), data["ids"].where(data["mask"].bool(), -100).view(-1)
        )
        same(
            (out, grad),
            (
                rw.policy_loss(
                    z,
                    data["ids"],
                    None,
                    spec=rw.PolicyLossSpec(surrogate=SftNll()),
                    completion_mask=data["mask"],
                ),
                torch.autograd.grad(want, z)[0],
            ),
        )
        torch.testing.assert_close(out.loss, want)
    finally:
        del RULES["sft_nll"]


def test_constants_are_uploaded_once(data):
    from reweight_ops._core.rows import constants

    spec = rw.methods.grpo(epsilon_low=0.123)
    rw.policy_loss(data["z"], data["ids"], 1.0, spec=spec)
    before = dict(vars(constants._constants))
    z = data["z"].clone().requires_grad_()
    for _ in range(3):
        rw.policy_loss(z, data["ids"], 1.0, spec=spec, temperature=0.77)
    after = vars(constants._constants)
    assert len(set(after) - set(before)) <= 2 and all(
        after[key] is value for key, value in before.items()
    )


def test_micro_batches_add_up(data, backend):  # docs/semantics.md: S12
    whole, grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], "dapo", num_items_in_batch=11.0, backend=backend
    )
    parts = [
        loss_and_grad(
            data["z"][i : i + 1],
            data["ids"][i : i + 1],
            data["adv"][i : i + 1],
            "dapo",
            num_items_in_batch=11.0,
            backend=backend,
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(p[0].loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)


def test_a_shift_of_the_row_changes_nothing(data, backend):  # docs/semantics.md: S16
    plain = loss_and_grad(data["z"], data["ids"], data["adv"], backend=backend)
    shifted = loss_and_grad(data["z"] - 300, data["ids"], data["adv"], backend=backend)
    same(plain, shifted, rtol=1e-4, atol=1e-5)
