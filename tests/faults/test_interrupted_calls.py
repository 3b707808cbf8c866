"""A call that fails in the middle (no memory, Ctrl-C) leaves the caller's logits
unchanged or known to be consumed.

The next call works.
"""

import dataclasses
import signal
import threading
import time

import pytest
import torch
from kept_calls import assert_equal, batch_of, result

import reweight_ops as rw
from reweight_ops._core.backends import native, select
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load, unsupported_reason
from reweight_ops._core.engine import direct, memory, ops
from reweight_ops._core.engine.kept import KEPT

HAS_CPU = (
    unsupported_reason("cpu", Request("token_stats", torch.device("cpu"), torch.float32)) is None
)
BACKENDS = ["reference", *(["cpu"] if HAS_CPU else [])]
SPEC = rw.methods.grpo(beta=0.1)


@pytest.fixture(params=[False, True], ids=["first call", "again"])
def warm(request):
    """Whether the call has been made before: kept calls take another path."""
    KEPT._calls.clear()
    return request.param


def call(z, batch, plan, backend, consume):
    return rw.policy_loss(
        **{**batch, "logits": z}, spec=SPEC, plan=plan, backend=backend, consume_logits=consume
    )


def logits(batch):
    return batch["logits"].detach().clone().requires_grad_() * 1


class Failing:
    """Raises at the ``at``-th call."""

    def __init__(self, function, error, at=0):
        self.function, self.error, self.left = function, error, at

    def __call__(self, *arguments, **keywords):
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.function(*arguments, **keywords)


def after(function, error):
    """Do the work and then raise, like a signal during a kernel."""

    def run(*arguments, **keywords):
        function(*arguments, **keywords)
        raise error

    return run


NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("consume", [False, True], ids=["new gradient", "in place"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory(backend, plan, consume, warm, monkeypatch):
    """At each of the allocations of a call in turn."""
    batch = batch_of(SPEC, 0)
    expected = result(batch, spec=SPEC, plan=plan, backend=backend)
    if warm:
        call(logits(batch), batch, plan, backend, consume)
    failed = 0
    for at in range(40):
        z = logits(batch)
        before = z.detach().clone()
        with monkeypatch.context() as patched:
            failing = Failing(torch.empty, NO_MEMORY, at)
            patched.setattr(torch, "empty", failing)
            for module in (memory, native):
                assert module.torch is torch
            try:
                out = call(z, batch, plan, backend, consume)
                torch.autograd.grad(out.loss, z)
            except RuntimeError as error:
                assert error is NO_MEMORY
                failed += 1
        if failing.left >= 0:  # so many allocations a call has not
            break
        untouched = torch.equal(z.detach(), before)
        try:
            again = rw.token_logps(z.detach(), batch["completion_ids"])
        except rw.InvalidCall as error:
            assert consume and "consumed" in str(error)
        else:
            assert untouched, "logits that were overwritten are taken for logits"
            torch.testing.assert_close(again, rw.token_logps(before, batch["completion_ids"]))
        assert_equal(result(batch, spec=SPEC, plan=plan, backend=backend), expected)
    assert failed or backend == "reference"


@pytest.mark.parametrize("primitive", ["token_loss_grad", "token_stats"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_while_a_kernel_runs(backend, primitive, monkeypatch):
    """The exception is raised when the kernel returns: its gradient is then in the
    logits' memory.
    """
    batch, plan = batch_of(SPEC, 0), "one_pass" if primitive == "token_loss_grad" else "two_pass"
    expected = result(batch, spec=SPEC, plan=plan, backend=backend)
    KEPT._calls.clear()
    z = logits(batch)
    before = z.detach().clone()
    real = load(backend)
    with monkeypatch.context() as patched:
        broken = dataclasses.replace(
            real, prepare=None, **{primitive: after(getattr(real, primitive), KeyboardInterrupt())}
        )
        patched.setitem(select._loaded, backend, broken)
        with pytest.raises(KeyboardInterrupt):
            call(z, batch, plan, backend, consume=True)
    assert torch.equal(z.detach(), before) is (primitive == "token_stats")
    if primitive == "token_loss_grad":
        with pytest.raises(rw.InvalidCall, match="consumed"):
            rw.token_logps(z.detach(), batch["completion_ids"])
    else:
        rw.token_logps(z.detach(), batch["completion_ids"])
    KEPT._calls.clear()
    assert_equal(result(batch, spec=SPEC, plan=plan, backend=backend), expected)


@pytest.mark.skipif(not HAS_CPU, reason="the C++ backend is not built")
@pytest.mark.parametrize("where", ["in the kernel", "after it"])
def test_ctrl_c_in_a_call_that_is_made_again(where, monkeypatch):
    batch = batch_of(SPEC, 0)
    expected = result(batch, spec=SPEC, plan="one_pass", backend="cpu")
    call(logits(batch), batch, "one_pass", "cpu", consume=True)
    z = logits(batch)
    before = z.detach().clone()
    (kept,) = [
        found for found in KEPT._calls.values() if found.consume and found.direct is not None
    ]
    with monkeypatch.context() as patched:
        if where == "in the kernel":
            patched.setattr(
                type(kept.direct.run),
                "__call__",
                after(type(kept.direct.run).__call__, KeyboardInterrupt()),
            )
        else:
            patched.setattr(direct, "clear_last", after(ops.clear_last, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(z, batch, "one_pass", "cpu", consume=True)
    assert not torch.equal(z.detach(), before)
    with pytest.raises(rw.InvalidCall, match="consumed"):
        rw.token_logps(z.detach(), batch["completion_ids"])
    assert_equal(result(batch, spec=SPEC, plan="one_pass", backend="cpu"), expected)


def test_a_call_that_is_refused_marks_nothing():
    """In a repeated call the kernel finds a bad id: the logits are still logits."""
    batch = batch_of(SPEC, 0)
    call(logits(batch), batch, "auto", "auto", consume=True)
    z, ids = logits(batch), batch["completion_ids"].clone()
    ids[0, 0] = 10_000
    with pytest.raises(rw.InvalidCall, match="expected 0 to 16"):
        call(z, {**batch, "completion_ids": ids}, "auto", "auto", consume=True)
    rw.token_logps(z.detach(), batch["completion_ids"])


def test_ctrl_c_at_any_moment():
    """A timer's signals arrive anywhere: after each, every call gives its
    usual result."""
    batch = batch_of(SPEC, 0, (4, 8))
    expected, sent = result(batch, spec=SPEC), []

    def interrupt(number, frame):
        sent.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    old, interrupted, end = signal.signal(signal.SIGALRM, interrupt), 0, time.monotonic() + 1.0
    try:
        while time.monotonic() < end:
            try:
                sent.clear()
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (1 + interrupted % 7) / 3)
                while not sent:  # Python drops an exception in a callback of its collector
                    result(batch, spec=SPEC)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            # PyTorch's own no_grad, interrupted while it is entered, is never left
            torch.set_grad_enabled(True)
            assert_equal(result(batch, spec=SPEC), expected)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 20
