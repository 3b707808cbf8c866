"""Outputs that are first read in a mode (fake tensors, inference) are not kept: the
next read, outside, is of the call.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import reweight_ops as rw
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.1)
BATCH = make_batch(SPEC, (4, 6), 11)
LOGITS = BATCH.pop("logits").detach()
READ = {
    "metrics": lambda out: out.metrics["kl"],
    "metrics made before": lambda out: out.metrics["kl"],
    "ratio": lambda out: out.ratio,
    "coef": lambda out: out.coef,
    "is_clipped": lambda out: out.is_clipped,
    "per_token_loss": lambda out: out.per_token_loss,
    "entropies": lambda out: out.entropies,
}
MODES = {
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", READ)
def test_the_next_read_is_of_the_call(what, mode, plan):
    # the second call is a kept one, which has only the loss at first
    for _ in range(2):
        out, whole = (
            rw.policy_loss(LOGITS.clone().requires_grad_(), **BATCH, spec=SPEC, plan=plan)
            for _ in range(2)
        )
        want = READ[what](whole)
        if what == "metrics made before":
            assert out.metrics.names
        with MODES[mode]():
            READ[what](out)
        found = READ[what](out)
        assert not isinstance(found, FakeTensor) and not found.is_inference()
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(want))
        # kept from now on
        assert READ[what](out) is found or what.startswith("metrics")


def test_results_of_inference_are_computed_once():
    with torch.inference_mode():
        out = rw.policy_loss(LOGITS, **BATCH, spec=SPEC)
        assert (
            out.ratio is out.ratio
            and out.metrics is out.metrics
            and out.metrics.all_values is out.metrics.all_values
        )
