"""Columns masked by the lowest number of the dtype act like -inf, also where a
temperature takes it beyond that dtype.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
IDS = torch.tensor([[1, 2], [0, 3]])
LOWEST = torch.finfo(torch.float32).min


def masked(by, seed=0):
    z = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(seed))
    z[..., 4:6] = by
    return z.requires_grad_()


CALLS = {
    "statistics": lambda z, low, b, t: rw.token_logps(
        z, IDS, return_entropy=True, temperature=t, backend=b
    ),
    "two softmaxes": lambda z, low, b, t: (
        rw.token_divergence(z, masked(low, 1).detach(), kind="jeffreys", temperature=t, backend=b),
    ),
    "their mixture": lambda z, low, b, t: (
        rw.token_divergence(
            z, masked(low, 1).detach(), kind="generalized_jsd", temperature=t, backend=b
        ),
    ),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_lowest_number_is_minus_infinity(call, backend, order, temperature):
    found = []
    for low in (LOWEST, -math.inf):
        z = masked(low)
        values = CALLS[call](z, low, backend, temperature)
        (grad,) = torch.autograd.grad(sum(v.sum() for v in values), z, create_graph=order == 2)
        more = torch.autograd.grad(grad.square().sum(), z) if order == 2 else ()
        found.append([x.detach() for x in (*values, grad, *more)])
    for a, b in zip(*found, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["grpo", "top_entropy"])
def test_a_loss_over_them(name):
    """Its entropy's gradient, and the whole reference, used to be NaN below a
    temperature of 1.
    """
    spec = rw.METHODS[name].build().with_penalty(rw.Penalty(rw.rules.penalties.EntropyBonus(), 0.1))
    found = []
    for low in (LOWEST, -math.inf):
        z = masked(low)
        out = rw.policy_loss(
            z,
            IDS,
            torch.tensor([1.0, -1.0]),
            spec=spec,
            temperature=0.5,
            backend="reference",
            plan="two_pass",
        )
        found.append(torch.autograd.grad(out.loss, z)[0])
    assert found[1].isfinite().all() and found[1].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
