"""Outputs that are computed at the first read are those of the call, or an error: a
trainer refills its buffers.
"""

import copy

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.engine.versions import Versions

Z = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6).view(2, 3)
LATER = ("metrics", "ratio", "is_clipped", "coef")


def buffers():
    g = torch.Generator().manual_seed(1)
    return {
        "advantages": torch.randn(2, 3, generator=g),
        "old_per_token_logps": -torch.rand(2, 3, generator=g) - 1.5,
        "ref_per_token_logps": -torch.rand(2, 3, generator=g) - 1.5,
        "token_weights": torch.rand(2, 3, generator=g),
        "completion_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "num_items_in_batch": torch.tensor(4.0),
        "loss_scale": torch.tensor(2.0),
    }


def call_spec():
    """A spec that reads the old policy and the reference."""
    return rw.methods.dapo().with_penalty(
        rw.Penalty(rw.methods.grpo(beta=0.1).penalties[0].rule, 0.1)
    )


def call(given, plan, spec=None):
    z = Z.clone().requires_grad_()
    rest = dict(given)
    return rw.policy_loss(
        z,
        IDS,
        rest.pop("advantages"),
        spec=call_spec() if spec is None else spec,
        plan=plan,
        **rest,
    )


def value(out, what):
    found = getattr(out, what)
    return found.sums if what == "metrics" else found


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("what", LATER)
@pytest.mark.parametrize("name", list(buffers()))
def test_a_refilled_buffer(name, what, plan):  # docs/semantics.md: S22
    given = buffers()
    want = value(call(buffers(), plan), what)
    out = call(given, plan)
    out.loss.backward()
    given[name].zero_()
    if name in ("advantages", "old_per_token_logps", "ref_per_token_logps", "token_weights"):
        with pytest.raises(
            rw.ReweightOpsError,
            match=rf"{what} is computed when it is first read, and {name}.* read out.{what} before",
        ):
            value(out, what)
    else:
        try:
            found = value(out, what)
        except rw.ReweightOpsError as error:
            assert name in str(error) and plan == "two_pass" and what in ("metrics", "coef")
        else:
            assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_what_was_read_stays(plan):
    given = buffers()
    out = call(given, plan)
    before = {what: value(out, what).clone() for what in LATER}
    for name in ("advantages", "old_per_token_logps", "completion_mask"):
        given[name].zero_()
    for what in LATER:
        assert torch.equal(value(out, what).nan_to_num(7), before[what].nan_to_num(7))


def test_through_a_view_of_the_buffer():
    store = torch.full((4, 3), -2.0)
    given = {**buffers(), "old_per_token_logps": store[1:3]}
    out = call(given, "one_pass")
    store.view(-1)[3:].fill_(0)
    with pytest.raises(rw.ReweightOpsError, match="old_per_token_logps has been written"):
        out.metrics["ratio/mean"]


def test_a_schedule_that_is_advanced():
    epsilon = torch.tensor(0.2)
    spec = call_spec().replace(**{"surrogate.epsilon_high": epsilon})
    out = call(buffers(), "one_pass", spec)
    epsilon.fill_(0.3)
    with pytest.raises(rw.ReweightOpsError, match="surrogate.epsilon_high has been written"):
        value(out, "metrics")


def test_what_a_call_copied_may_change():
    """With another dtype, a constant or a mask, no later read uses the
    caller's memory."""
    given = buffers()
    given["advantages"] = given["advantages"].double()
    want = value(call(given, "two_pass"), "metrics")
    out = call(given, "two_pass")
    given["advantages"].zero_()
    given["completion_mask"].zero_()
    assert torch.equal(value(out, "metrics").nan_to_num(7), want.nan_to_num(7))


def test_a_copy_has_tensors_of_its_own():
    tensor = torch.zeros(2).add_(1)
    copied = copy.deepcopy(Versions([("x", tensor)]))
    tensor.zero_()
    copied.check("metrics")
    with pytest.raises(rw.ReweightOpsError, match=r"x has been written.*\(x.clone\(\)\)"):
        once = Versions([("x", tensor)])
        tensor.zero_()
        once.check("metrics")


def test_inference_mode_and_log_probs():
    given = buffers()
    with torch.inference_mode():
        old = given["old_per_token_logps"].clone()
        assert call({**given, "old_per_token_logps": old}, "two_pass").metrics["ratio/mean"] > 0
    logps = torch.full((2, 3), -1.5, requires_grad=True)
    out = rw.policy_loss_from_logps(
        logps, given["advantages"], spec="dapo", old_per_token_logps=given["old_per_token_logps"]
    )
    given["old_per_token_logps"].zero_()
    with pytest.raises(rw.ReweightOpsError, match="old_per_token_logps has been written"):
        value(out, "metrics")


def test_a_graph_holds_no_counter():
    given = buffers()

    def step(z, old):
        out = rw.policy_loss(z, IDS, given["advantages"], spec="dapo", old_per_token_logps=old)
        return out.loss, out.per_token_logps

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    z, old = Z.clone().requires_grad_(), given["old_per_token_logps"]
    torch.testing.assert_close(compiled(z, old), step(z, old))
