"""Behaviour that needs a device: graphs, streams, other devices, compiled callers,
waiting, memory, tensors beyond 2³¹ elements.
"""

import pytest
import torch
from places import (
    DRY,
    REHEARSED,
    as_leaf,
    batch_on,
    captured,
    compilations,
    keep_busy,
    no_synchronization,
    other_stream,
    peak_bytes,
    sized,
    synchronize,
    two_devices,
)

import reweight_ops as rw
from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.backends.select import load
from reweight_ops._core.calls.consumed import forget
from reweight_ops._core.formula.loss_program import Program

pytestmark = pytest.mark.gpu

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01)
PLANS = ["one_pass", "two_pass"]


def loss_and_gradient(batch, place, **options):
    z = as_leaf(batch["logits"]) if "logits" in batch else None
    out = rw.policy_loss(
        **{**batch, "logits": z}, spec=options.pop("spec", SPEC), backend=place.backend, **options
    )
    return out.loss, torch.autograd.grad(out.loss, z)[0], out.per_token_logps


def another(batch):
    """Other values for every input of a batch, in the same shapes."""
    g = torch.Generator().manual_seed(5)

    def fresh(name, x):
        if name == "completion_mask":
            return x.roll(1, 0)
        if name == "completion_ids":
            return x.flip(0)
        noise = torch.randn(x.shape, generator=g).to(x.device, x.dtype)
        return x.detach() * 0.7 + 0.3 * noise

    return {name: fresh(name, x) for name, x in batch.items()}


# --- graphs ---------------------------------------------------------------------------


def replayed(run, batch):
    """What a captured ``run`` gives for other inputs than it was captured with; and
    what it gives when it is simply called.
    """
    replay, held = captured(run)
    first = [x.clone() for x in held]
    change = another(batch)
    for name, x in batch.items():
        x.copy_(change[name])
    replay()
    synchronize()
    got = [x.clone() for x in held]
    assert not torch.equal(first[0], got[0])
    return got, run()


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_policy_loss_in_a_graph(place, plan, consume):
    batch = {k: v.detach() for k, v in batch_on(place, SPEC).items()}

    def run():
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(
            **{**batch, "logits": z * 1},
            spec=SPEC,
            plan=plan,
            backend=place.backend,
            consume_logits=consume,
        )
        (grad,) = torch.autograd.grad(out.loss, z)
        return out.loss.detach(), grad, out.per_token_logps, out.metrics["kl"]

    got, want = replayed(run, batch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_token_logps_in_a_graph(place):
    batch = {
        k: v.detach()
        for k, v in batch_on(place, SPEC).items()
        if k in ("logits", "completion_ids", "completion_mask")
    }

    def run():
        z = batch["logits"].detach().clone().requires_grad_()
        options = dict(
            completion_mask=batch["completion_mask"],
            temperature=0.8,
            return_entropy=True,
            backend=place.backend,
        )
        logps, entropies = rw.token_logps(z, batch["completion_ids"], **options)
        (grad,) = torch.autograd.grad((logps * 0.3 + entropies).sum(), z)
        return logps.detach(), entropies.detach(), grad

    got, want = replayed(run, batch)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_schedule_in_a_graph(place):
    """A hyper-parameter that is a tensor changes between replays."""
    epsilon, beta = torch.tensor(0.2, device=place.device), torch.tensor(0.04, device=place.device)
    spec = rw.methods.grpo(epsilon_low=epsilon, epsilon_high=epsilon, beta=beta)
    batch = {k: v.detach() for k, v in batch_on(place, spec).items()}

    def run():
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(
            **{**batch, "logits": z}, spec=spec, plan="one_pass", backend=place.backend
        )
        return out.loss.detach(), torch.autograd.grad(out.loss, z)[0]

    replay, held = captured(run)
    before = held[1].clone()
    epsilon.fill_(0.5)
    beta.fill_(0.4)
    replay()
    synchronize()
    assert not torch.equal(before, held[1])
    assert torch.equal(held[1], run()[1])


# --- streams and devices --------------------------------------------------------------


def test_it_runs_on_the_current_stream(place):
    """The stream sleeps, then the logits are written, then the op runs: code on another
    stream would read the old contents.
    """
    batch = batch_on(place, SPEC)
    want = loss_and_gradient(batch, place)
    late = torch.zeros_like(batch["logits"])
    synchronize()
    with other_stream():
        keep_busy(sized(50, 0))
        late.copy_(batch["logits"])
        got = loss_and_gradient({**batch, "logits": late}, place)
    synchronize()
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a, b)


def test_it_does_not_wait_for_another_stream(place):
    batch = batch_on(place, SPEC)
    loss_and_gradient(batch, place)
    synchronize()
    with other_stream():
        asleep = keep_busy(sized(500, 0))
    loss_and_gradient(batch, place)
    if not DRY:
        torch.cuda.current_stream().synchronize()
        assert not asleep.query(), (
            "the call waited for a stream that is none of its business (or the sleep was too short)"
        )
        asleep.synchronize()


def test_on_a_device_that_is_not_the_current_one(place):
    batch, devices = batch_on(place, SPEC), two_devices()
    results = [loss_and_gradient({k: v.to(d) for k, v in batch.items()}, place) for d in devices]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu()) and str(b.device).startswith(devices[1])


# --- compiled callers -----------------------------------------------------------------


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_in_a_compiled_caller(place, plan, consume):
    if DRY and consume:
        pytest.skip("one of them shows that the test runs")
    batch = batch_on(place, SPEC)

    def step(z):
        out = rw.policy_loss(
            **{**batch, "logits": z * 1},
            spec=SPEC,
            plan=plan,
            backend=place.backend,
            consume_logits=consume,
        )
        return out.loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=sized("inductor", "aot_eager"))
    grads = []
    for f in (step, compiled):
        z = as_leaf(batch["logits"])
        grads.append((f(z), z))
        grads[-1] = (grads[-1][0].detach(), torch.autograd.grad(grads[-1][0], z)[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- waiting, compiling, memory -------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(place, plan):
    batch = batch_on(place, SPEC)
    leaf = as_leaf(batch["logits"])
    for quiet in (False, True):  # the first call uploads constants, compiles and loads
        if quiet:
            with no_synchronization():
                step(batch, leaf, place, plan)
        else:
            step(batch, leaf, place, plan)


def step(batch, leaf, place, plan):
    leaf.grad = None
    out = rw.policy_loss(
        **{**batch, "logits": leaf * 1},
        spec=SPEC,
        plan=plan,
        backend=place.backend,
        consume_logits=True,
    )
    out.loss.backward()
    logps, entropies = rw.token_logps(
        leaf, batch["completion_ids"], return_entropy=True, temperature=0.9, backend=place.backend
    )
    (logps + entropies).sum().backward()
    return out.metrics["kl"]


def test_the_guard_against_waiting_fires(place):
    if DRY:
        pytest.skip("there is nothing to wait for")
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization():
        torch.ones(1, device=place.device).item()


def test_nothing_is_compiled_twice(place):
    """Lengths, batch sizes, temperatures, masks, hyper-parameters, vocabularies of one
    alignment class: the second call finds it all.
    """
    if place.backend != "triton":
        pytest.skip("only Triton compiles at run time")

    def call(rows, length, vocab, temperature, beta):
        spec = rw.methods.grpo(beta=beta)
        batch = batch_on(place, spec, (rows, length), vocab, torch.bfloat16)
        loss_and_gradient(batch, place, spec=spec, plan="one_pass", temperature=temperature)
        loss_and_gradient(batch, place, spec=spec, plan="two_pass", temperature=temperature)

    call(4, sized(16, 3), 32000, 1.0, 0.04)
    with compilations() as names:
        call(sized(8, 2), sized(33, 5), 32000, 0.7, 0.1)
        call(5, sized(17, 4), 31992, 1.3, 0.2)
    assert names == []
    with compilations() as names:
        # another launch shape: this one must be seen
        call(4, sized(16, 3), 70000, 1.0, 0.04)
    assert names or (DRY and not REHEARSED)


def test_memory(place):
    """In place: nothing the size of the logits. A drop-in: the gradient and no more.
    Log-probs without a gradient: nothing.
    """
    vocab = sized(128256, 131)
    batch = batch_on(place, SPEC, sized((8, 64), (2, 16)), vocab)
    whole = batch["logits"].numel() * batch["logits"].element_size()
    few = whole // 50
    leaf = torch.zeros((), device=place.device, requires_grad=True)

    def policy(**options):
        def run():
            # Not a leaf, and nobody else's: what a head hands over. Its memory is the
            # batch's own.
            z = _Owned.apply(leaf, batch["logits"])
            # the run before may have consumed it; its values do not matter here
            forget(z)
            loss = rw.policy_loss(
                **{**batch, "logits": z}, spec=SPEC, backend=place.backend, **options
            ).loss
            loss.backward()

        return run

    def logps():
        with torch.no_grad():
            return rw.token_logps(
                batch["logits"], batch["completion_ids"], return_entropy=True, backend=place.backend
            )

    for run, allowed in (
        (policy(plan="one_pass", consume_logits=True), few),
        (policy(plan="two_pass", consume_logits=True), few),
        (policy(plan="one_pass"), whole + few),
        (policy(plan="two_pass"), whole + few),
        (logps, few),
    ):
        peak = peak_bytes(run)
        assert peak is None or peak <= allowed, f"{peak} bytes, {peak / whole:.2f} times the logits"


class _Owned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, z):
        return torch.empty(0, dtype=z.dtype, device=z.device).set_(
            z.untyped_storage(), z.storage_offset(), z.shape, z.stride()
        )

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros((), device=grad.device), None


# --- beyond 2³¹ elements --------------------------------------------------------------

PROGRAM, PARAMS = Program.of(("clip",)), [-20.0, 20.0, 1.0, 0.2, 0.2, float("inf")]


def primitives_on(place, z, ids, adv):
    primitives, one, softmax = (
        load(place.backend),
        torch.ones(1, device=z.device),
        SoftmaxParams(z.size(-1)),
    )
    n = ids.numel()
    stats = primitives.token_stats(z, ids, one, softmax, ("logp", "lse", "entropy"))
    rows = primitives.token_loss_grad(
        z,
        ids,
        one,
        softmax,
        RowInputs(adv.view(1, n), None, adv),
        PROGRAM,
        torch.tensor(PARAMS, device=z.device),
        z,
    )
    return stats, rows


@pytest.mark.parametrize("leading", ["rows", "one batch", "far batches"])
def test_more_than_2_31_elements(place, leading):
    """A row whose offset does not fit in 32 bits is the same as a row that stands
    first; nothing else is written.
    """
    v = sized(151936, 1024)
    n = 2**31 // v + 66
    # two batches, each of a few rows, more than 2³¹ elements apart: takes address space
    # and little memory
    if leading == "far batches":
        storage = torch.empty(2**31 + 64 * v, dtype=torch.bfloat16, device=place.device)
        z = storage.as_strided((2, 8, v), (2**31 + 8, v, 1))
    elif DRY:
        pytest.skip("needs 4 GB of memory that is really used")
    else:
        z = torch.empty(n, v, dtype=torch.bfloat16, device=place.device)
        z = z if leading == "rows" else z.view(1, n, v)
    flat = (
        [z[i // 8, i % 8] for i in range(16)]
        if leading == "far batches"
        else list(z.view(-1, v)[[0, 1, n // 2, n - 2, n - 1]].unbind())
    )
    g = torch.Generator(place.device).manual_seed(0)
    if leading != "far batches":
        for part in z.view(-1, v).split(1024):
            part.copy_(torch.randn(part.shape, generator=g, device=place.device))
    else:
        for row in flat:
            row.copy_(torch.randn(v, generator=g, device=place.device) * 3)
    count = z.numel() // v
    at = (
        torch.arange(16) if leading == "far batches" else torch.tensor([0, 1, n // 2, n - 2, n - 1])
    )
    at = at.to(place.device)
    some = (
        z.reshape(count, v)[at].clone() if leading != "far batches" else torch.stack(flat).clone()
    )
    ids = torch.randint(0, v, (count,), generator=g, device=place.device)
    adv = torch.randn(count, generator=g, device=place.device)
    want_stats, want_rows = primitives_on(place, some, ids[at], adv[at])
    stats, rows = primitives_on(place, z, ids, adv)
    assert torch.equal(stats[:, at], want_stats) and torch.equal(rows[:, at], want_rows)
    grads = torch.stack(flat) if leading == "far batches" else z.view(-1, v)[at]
    assert torch.equal(grads, some)
    assert some.abs().sum() > 0
