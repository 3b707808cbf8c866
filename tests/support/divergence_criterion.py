"""Divergences of two logits tensors by the public op, compared to textbook formulas in
fp64 by the accuracy criterion.
"""

from __future__ import annotations

import pytest
import torch

import reweight_ops as rw

U = 2.0**-24


def textbook(x, y, kind, beta=0.5):
    """Divergence by its definition; ``x`` and ``y`` are already divided by
    temperatures.
    """
    p, q = torch.softmax(x, -1), torch.softmax(y, -1)
    log_p, log_q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    forward, reverse = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "jeffreys": forward + reverse,
        "cross_entropy": -(q * log_p).sum(-1),
        "reverse_cross_entropy": -(p * log_q).sum(-1),
        "symmetric_cross_entropy": -0.5 * (q * log_p).sum(-1) - 0.5 * (p * log_q).sum(-1),
        "generalized_jsd": beta * (q * (log_q - m.log())).sum(-1)
        + (1 - beta) * (p * (log_p - m.log())).sum(-1),
    }[kind]


def two_logits(shape=(3, 5), vocab=257, dtype=torch.float64, seed=0, shift=0.0, close=False):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(*shape, vocab, generator=g, dtype=torch.float64)
    z += torch.where(torch.rand(z.shape, generator=g) < 4 / vocab, 8.0, 0.0)
    other = z + (0.05 if close else 1.5) * torch.randn(z.shape, generator=g, dtype=torch.float64)
    mask = (
        torch.arange(shape[-1])
        < torch.randint(1, shape[-1] + 1, shape[:-1], generator=g)[..., None]
    )
    return (z + shift).to(dtype), (other + shift).to(dtype), mask


def available(backend):
    if backend == "triton":
        pytest.importorskip("triton")


def run(backend, z, other, kind, weights, plan, **options):
    x = z.detach().clone().requires_grad_()
    out = rw.distillation_loss(
        x * 1 if options.get("consume_logits") else x,
        other,
        kind=kind,
        token_weights=weights,
        num_items_in_batch=1.0,
        backend=backend,
        plan=plan,
        **options,
    )
    return out, torch.autograd.grad(out.loss, x)[0]


def criterion(got, single, exact, floor, what):
    """Assert at most 1.5 times the error of fp32 PyTorch maths rounded once, plus the
    floor. The assertion holds for the maximum and the rms error.
    """
    e, b = (got.double() - exact).abs(), (single.to(got.dtype).double() - exact).abs()
    worst = (e / (1.5 * b.max() + floor)).max()
    rms = e.square().mean().sqrt() / (1.5 * b.square().mean().sqrt() + floor.max())
    assert worst <= 1 and rms <= 1, f"{what}: max {float(worst):.3f}, rms {float(rms):.3f}"


def assert_accurate(backend, case, kind, dtype):
    available(backend)
    vocab = 5003 if backend == "cpu" else 1031
    z, other, mask = two_logits(
        (2, 4), vocab, dtype, shift=300.0 if case == "shifted" else 0.0, close=case == "close"
    )
    options = dict(
        temperature=0.8,
        completion_mask=mask,
        **(dict(softcap=6.0, teacher_softcap=5.0) if case == "cap" else {}),
    )
    weights = torch.linspace(0.5, 2, 8).view(2, 4)

    def fp32():
        x = z.float().requires_grad_()

        def capped(t, c):
            return c * torch.tanh(t / c) if case == "cap" else t

        d = textbook(capped(x, 6.0) / 0.8, capped(other.float(), 5.0) / 0.8, kind)
        return d.detach(), torch.autograd.grad((d * weights * mask).sum(), x)[0]

    exact, grad = run(
        "reference", z.double(), other.double(), kind, weights.double(), "two_pass", **options
    )
    value32, grad32 = fp32()
    floor = (4 * U * weights / 0.8)[..., None].double()
    for plan in ("one_pass", "two_pass"):
        got, g = run(backend, z, other, kind, weights, plan, **options)
        assert got.backend == backend and got.plan == plan
        criterion(g, torch.where(mask[..., None], grad32, 0), grad, floor, f"gradient, {plan}")
        size = 4 * U * (exact.per_token_divergence.abs().max() + exact.entropies.max() + 1)
        criterion(
            got.per_token_divergence,
            torch.where(mask, value32, 0),
            exact.per_token_divergence,
            size,
            f"value, {plan}",
        )
    assert (g[~mask] == 0).all()
