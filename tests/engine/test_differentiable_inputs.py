"""``differentiable_inputs=True``: gradients of policy losses to old, reference and
sampling log-probs.
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.engine.kept import KEPT

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
B, T, V = 3, 4, 11
NAMES = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
TOKEN_FIELDS = dict(zip(NAMES, ("old_logp", "ref_logp", "sampling_logp"), strict=True))

SPECS = {
    "grpo": rw.methods.grpo(beta=0.1),
    "gspo": rw.methods.trl(
        loss_type="grpo",
        importance_sampling_level="sequence",
        beta=0.2,
        use_bias_correction_kl=False,
    ),
    "against ref": rw.PolicyLossSpec(
        surrogate=rw.method("gspo").surrogate, ratio=rw.TokenRatio(against="ref")
    ),
    "drpo": rw.methods.drpo(),
    "probability": rw.methods.advantage_reweighting(),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, V, generator=g, dtype=torch.float64).to(dtype)
    ids, mask = torch.randint(V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.8
    logp = torch.log_softmax(z.double(), -1).gather(-1, ids[..., None])[..., 0]
    row = torch.float64 if dtype == torch.float64 else torch.float32
    stored = {
        name: (logp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64))
        .to(row)
        .requires_grad_()
        for name in NAMES
    }
    return dict(
        z=z.requires_grad_(),
        ids=ids,
        mask=mask,
        adv=torch.randn(B, generator=g, dtype=torch.float64).to(row),
        stored=stored,
    )


def inputs(d, spec):
    return [d["stored"][name] for name in NAMES if TOKEN_FIELDS[name] in spec.moving]


def given(d, spec):
    found = {
        name: x if TOKEN_FIELDS[name] in spec.moving else x.detach()
        for name, x in d["stored"].items()
    }
    groups = {} if spec.name != "drpo" else dict(group_ids=torch.tensor([0, 0, 0]), num_groups=1)
    return dict(
        completion_mask=d["mask"], differentiable_inputs=True, unused="ignore", **found, **groups
    )


# nothing in these is detached, so that finite differences match autograd
@pytest.mark.parametrize("name", ["grpo", "gspo", "against ref"])
def test_exact_under_autograd(name):
    """Exact against finite differences, including second derivatives and transforms."""
    d, spec = make(), SPECS[name]
    leaves = inputs(d, spec)
    assert leaves

    def loss(*stored):
        known = iter(stored)
        arguments = {
            n: next(known) if any(x is y for y in leaves) else x for n, x in given(d, spec).items()
        }
        return rw.policy_loss(
            d["z"], d["ids"], d["adv"], spec=spec, plan="two_pass", **arguments
        ).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_plan_and_source_agrees(name, dtype, backend):
    if dtype == torch.float64 and backend != "reference":
        backend = "reference"
    d, spec = make(dtype), SPECS[name]
    leaves, arguments = [d["z"], *inputs(d, spec)], given(d, spec)
    exact = make()
    want = rw.policy_loss(
        exact["z"],
        exact["ids"],
        exact["adv"],
        spec=spec,
        plan="two_pass",
        backend="reference",
        **given(exact, spec),
    )
    wanted = torch.autograd.grad(2 * want.loss, [exact["z"], *inputs(exact, spec)])
    near = {} if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    calls = [
        lambda plan: rw.policy_loss(
            d["z"], d["ids"], d["adv"], spec=spec, plan=plan, backend=backend, **arguments
        ),
        lambda plan: rw.linear_policy_loss(
            d["z"],
            torch.eye(V, dtype=dtype),
            d["ids"],
            d["adv"],
            spec=spec,
            plan=plan,
            backend=backend,
            chunk_rows=5,
            **arguments,
        ),
    ]
    plans = ("one_pass", "two_pass") if spec.one_pass_unsupported_reason is None else ("two_pass",)
    for call in calls:
        for plan in plans:
            for _ in range(2):  # the second one may be a kept call
                out = call(plan)
                assert out.plan == plan
                for a, b in zip(torch.autograd.grad(2 * out.loss, leaves), wanted, strict=True):
                    torch.testing.assert_close(a.double(), b, **near)
                torch.testing.assert_close(out.loss.double(), want.loss, **near)


def test_from_log_probs_and_one_number_a_sequence():
    d, spec = make(), SPECS["grpo"]
    logp = torch.log_softmax(d["z"], -1).gather(-1, d["ids"][..., None])[..., 0]
    out = rw.policy_loss_from_logps(logp, d["adv"], spec=spec, **given(d, spec))
    want = rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, **given(d, spec))
    leaves = [d["z"], *inputs(d, spec)]
    for a, b in zip(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
    old = torch.full((B, 1), -1.5, dtype=torch.float64, requires_grad=True)
    arguments = given(d, spec) | dict(old_per_token_logps=old)
    found = [
        rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, plan=p, **arguments).loss
        for p in ("one_pass", "two_pass")
    ]
    a, b = (torch.autograd.grad(x, old)[0] for x in found)
    assert a.shape == (B, 1) and (a != 0).any()
    torch.testing.assert_close(a, b)


def test_a_sampler_through_a_weight_that_is_not_detached():
    d = make()
    sampler = d["stored"]["sampling_per_token_logps"]
    spec = rw.methods.reinforce().with_weight(rw.weights.TruncatedImportance(detach=False))
    arguments = dict(
        completion_mask=d["mask"],
        sampling_per_token_logps=sampler,
        old_per_token_logps=d["stored"]["old_per_token_logps"],
    )

    def loss(s, old):
        more = arguments | dict(
            sampling_per_token_logps=s, old_per_token_logps=old, differentiable_inputs=True
        )
        return rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, **more).loss

    assert torch.autograd.gradcheck(
        loss, (sampler, arguments["old_per_token_logps"]), fast_mode=True
    )
    (grad,) = torch.autograd.grad(loss(sampler, arguments["old_per_token_logps"]), sampler)
    assert grad.abs().max() > 0
    with pytest.raises(
        rw.InvalidCall,
        match="old_per_token_logps requires grad, but the spec detaches everything it reads of it",
    ):
        old = dict(old_per_token_logps=arguments["old_per_token_logps"], differentiable_inputs=True)
        rw.policy_loss(d["z"], d["ids"], d["adv"], spec=rw.methods.dppo_kl(), **old)
    detached = rw.methods.reinforce().with_weight(rw.weights.TruncatedImportance())
    with pytest.raises(
        rw.InvalidCall,
        match="sampling_per_token_logps requires grad, but the spec detaches everything it reads of it",
    ):
        rw.policy_loss(
            d["z"],
            d["ids"],
            d["adv"],
            spec=detached,
            **arguments | dict(old_per_token_logps=None),
            differentiable_inputs=True,
        )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_ignored_rows_and_nan(plan):
    d, spec = make(), SPECS["grpo"]
    with torch.no_grad():
        for x in d["stored"].values():
            x[~d["mask"]] = float("nan")
    out = rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, plan=plan, **given(d, spec))
    for grad in torch.autograd.grad(out.loss, inputs(d, spec)):
        assert (grad[~d["mask"]] == 0).all() and grad.isfinite().all() and (grad != 0).any()


def test_is_asked_for_and_kept_calls_are_apart():
    d, spec = make(torch.float32), SPECS["grpo"]
    arguments = given(d, spec)
    for name in NAMES[:2]:
        asked = {**arguments, "differentiable_inputs": False} | {
            n: arguments[n].detach() for n in NAMES if n != name
        }
        with pytest.raises(
            rw.InvalidCall,
            match=f"{name} requires grad.* differentiable_inputs=True for its gradient",
        ):
            rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, **asked)
    plain = {
        name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    before = len(KEPT)
    for _ in range(2):
        for call in (plain, arguments, {**plain, "differentiable_inputs": False}):
            out = rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, **call)
            assert out.plan == "one_pass"
            out.loss.backward()
    assert len(KEPT) <= before + 3
    with torch.no_grad():
        assert not rw.policy_loss(
            d["z"], d["ids"], d["adv"], spec=spec, **arguments
        ).loss.requires_grad


def test_second_derivatives_of_one_pass_are_refused_and_compiled_calls_take_two_passes():
    d, spec = make(torch.float32), SPECS["grpo"]
    old = d["stored"]["old_per_token_logps"]
    out = rw.policy_loss(d["z"].detach(), d["ids"], d["adv"], spec=spec, **given(d, spec))
    assert out.plan == "two_pass"  # no gradient to logits
    out = rw.policy_loss(d["z"], d["ids"], d["adv"], spec=spec, **given(d, spec))
    with pytest.raises(rw.UnsupportedRequest, match="second derivatives by stored log-probs"):
        torch.autograd.grad(out.loss, old, create_graph=True)
    torch._dynamo.reset()

    def loss(z, old):
        return rw.policy_loss(
            z, d["ids"], d["adv"], spec=spec, **given(d, spec) | dict(old_per_token_logps=old)
        ).loss

    got, want = (
        torch.compile(loss, fullgraph=True, backend="aot_eager")(d["z"], old),
        loss(d["z"], old),
    )
    for a, b in zip(
        torch.autograd.grad(got, (d["z"], old)),
        torch.autograd.grad(want, (d["z"], old)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
