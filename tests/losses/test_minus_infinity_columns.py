"""A column that is ``-inf`` in every tensor of a call does not exist.

The value and the gradient of the other columns are unchanged, and its gradient is 0.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.engine.distillation import KINDS

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
N, V, MASKED = 5, 11, 4
KEEP = torch.arange(V) != MASKED


def inputs():
    g = torch.Generator().manual_seed(0)
    z, other = 2 * torch.randn(N, V, generator=g), 2 * torch.randn(N, V, generator=g)
    return z, other, torch.tensor([0, 3, 5, 10, 7])


def compare(function):
    """``function(logits, other, ids)`` with the column masked, and without it."""
    z, other, ids = inputs()
    whole = z.clone()
    whole[:, MASKED] = other[:, MASKED] = -math.inf
    found = []
    for x, y, label in (
        (whole, other, ids),
        (z[:, KEEP], other[:, KEEP], ids - (ids > MASKED).long()),
    ):
        x = x.clone().requires_grad_()
        value = function(x, y, label)
        (grad,) = torch.autograd.grad(value.sum(), x)
        found.append((value.detach(), grad))
    (value, grad), (want, slope) = found
    torch.testing.assert_close(value, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad[:, KEEP], slope, rtol=2e-5, atol=2e-6)
    assert torch.equal(grad[:, MASKED], torch.zeros(N))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*KINDS, "generalized_jsd"])
def test_token_divergence(kind, backend):
    compare(lambda x, y, ids: rw.token_divergence(x, y, kind=kind, backend=backend))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd_where_one_has_no_mass(beta):
    """It is finite for any two distributions; the gradient is that of the formula on
    the columns with mass.
    """
    z, other, _ = inputs()
    other[:, 2] = -math.inf
    z[:, 6] = -math.inf
    z[:, MASKED] = other[:, MASKED] = -math.inf
    got = z.clone().requires_grad_()
    value = rw.token_divergence(got, other, kind="generalized_jsd", beta=beta)
    x = z.double().requires_grad_()
    p, q = torch.softmax(x, -1), torch.softmax(other.double(), -1)
    m = beta * q + (1 - beta) * p
    tiny = 1e-300  # 0·log 0 = 0
    want = (beta * q * (q.clamp(min=tiny).log() - m.clamp(min=tiny).log())).sum(-1)
    want = want + ((1 - beta) * p * (p.clamp(min=tiny).log() - m.clamp(min=tiny).log())).sum(-1)
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), got)[0].double(),
        torch.autograd.grad(want.sum(), x)[0],
        rtol=1e-5,
        atol=1e-6,
    )


COMPOSITES = {
    "symmetric_cross_entropy": lambda x, y, ids: rw.divergences.symmetric_cross_entropy(x, y),
    "confidence_masked_kl": lambda x, y, ids: rw.divergences.confidence_masked_kl(
        x, y, threshold=0.1, sharpening_temperature=0.5
    ),
    "pld": lambda x, y, ids: rw.divergences.pld(x, y, ids),
    "dhkd": lambda x, y, ids: rw.divergences.dhkd(x, y),
    # its V counts columns
    "ldr": lambda x, y, ids: rw.divergences.ldr(x, ids) + math.log(x.shape[-1]),
    "stablemax": lambda x, y, ids: rw.divergences.stablemax(x, ids),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name):
    compare(COMPOSITES[name])


def test_tw_grpo():
    z, other, _ = inputs()
    both = torch.stack([z, other])
    both[..., MASKED] = -math.inf
    mask = torch.ones(2, N)
    whole, without = (rw.weights.tw_grpo(x, mask, group_size=2) for x in (both, both[..., KEEP]))
    torch.testing.assert_close(whole, without)


@pytest.mark.parametrize("method", ["dppo_kl", "dppo_tv", "glm5"])
def test_a_dropped_token_that_became_impossible_costs_nothing(method):
    """Its log-prob is -inf: as one of coefficient 0, it adds 0 and not 0·inf."""
    z, _, ids = inputs()
    z[2, ids[2]] = -math.inf
    old = torch.full((N,), -0.7)
    rest = torch.arange(N) != 2

    def run(**options):
        x = z.clone().requires_grad_()
        out = rw.policy_loss(
            x, ids, -torch.ones(N), spec=method, old_per_token_logps=old, **options
        )
        return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]

    loss, grad = run()
    want, slope = run(completion_mask=rest, num_items_in_batch=N)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad[rest], slope[rest])
    assert not grad[2].any()


def test_a_teacher_that_excludes_a_token_closes_its_gate():
    z, _, ids = inputs()
    ref = torch.full((2, 3), -2.0)
    ref[1, 0] = -math.inf
    x = torch.stack([z[:3], z[2:]]).requires_grad_()
    out = rw.policy_loss(
        x, ids[:3].expand(2, 3), torch.zeros(2), spec="sdar", ref_per_token_logps=ref
    )
    logp = x.detach().log_softmax(-1)[..., ids[:3]].diagonal(dim1=-2, dim2=-1)
    d = torch.where(ref.isinf(), 0, ref - logp)
    torch.testing.assert_close(out.loss.detach(), 0.1 * (torch.sigmoid(5 * d) * d).mean())
    (grad,) = torch.autograd.grad(out.loss, x)
    assert grad.isfinite().all() and not grad[1, 0].any()
