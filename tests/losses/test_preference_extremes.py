"""Pair losses at margins where an exponential overflows."""

import pytest
import torch

import reweight_ops as rw


@pytest.mark.parametrize("margin", [-2000.0, -200.0, -20.0, 0.0, 20.0, 200.0])
def test_discopop(margin):
    """``-(1-g)·log σ(x) + g·exp(-x)`` in fp64, with the logs of both factors of the
    last term added.
    """
    x = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    sigmoid = torch.nn.functional.logsigmoid
    gate = torch.sigmoid(x / 0.05)
    want = -(1 - gate) * sigmoid(x) + (sigmoid(x / 0.05) - x).exp()
    logps = torch.tensor([[margin], [0.0]], requires_grad=True)
    spec = rw.preference.discopop(beta=1.0)
    out = rw.preference_loss_from_logps(logps, spec=spec, ref_sequence_logps=torch.zeros(2))
    torch.testing.assert_close(out.loss.double(), want[0].detach())
    (slope,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0][0].double(), slope)
