"""Calls on two logits tensors and the checks of their results, for kernel tests in the
emulation and on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch.utils import deterministic

from reweight_ops._core.backends import reference_divergence as reference
from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams
from reweight_ops._core.rows.groups import IGNORE_INDEX

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = ("plain", "shifted", "close", "peaked", "cap", "other_cap", "per_row")
#: KL(q‖p), KL(p‖q), H(p), and a mixture of them.
CONSTANTS = {
    "forward": (1.0, 0.0, 0.0),
    "reverse": (0.0, 1.0, 0.0),
    "entropy": (0.0, 0.0, 1.0),
    "all": (0.5, 0.7, -0.3),
}
U = 2.0**-24


def make(n, v, dtype=torch.float32, other=None, case="plain", seed=0, device="cpu"):
    """A call of n rows, of which every fourth is ignored."""
    g = torch.Generator().manual_seed(seed + v)
    z = 2 * torch.randn(n, v, generator=g, dtype=torch.float64)
    z += torch.where(torch.rand(z.shape, generator=g) < 4 / v, 8.0, 0.0)
    y = z + (0.05 if case == "close" else 1.5) * torch.randn(
        z.shape, generator=g, dtype=torch.float64
    )
    if case == "shifted":
        z, y = z + 300, y + 200
    if case == "peaked":
        z[:, v // 2] += 25
        y[:, v // 2] += 20
    ids = torch.arange(n)
    ids[3::4] = IGNORE_INDEX
    t, u = (
        (torch.linspace(0.5, 2, n), torch.linspace(1.7, 0.6, n))
        if case == "per_row"
        else (torch.tensor([0.8]), torch.tensor([0.9]))
    )
    caps = {"cap": (6.0, 5.0), "other_cap": (math.inf, 5.0)}.get(case, (math.inf, math.inf))
    tensors = (x.to(device) for x in (z.to(dtype), y.to(other or dtype), ids, t, u))
    return DivergenceInputs(*tensors, SoftmaxParams(v, caps[0]), SoftmaxParams(v, caps[1]))


def as_dtype(two, dtype):
    return two._replace(
        logits=two.logits.to(dtype),
        other=two.other.to(dtype),
        temperature=two.temperature.to(dtype),
        other_temperature=two.other_temperature.to(dtype),
    )


def pytorch_fp32(two, constants, weights):
    """The yardstick in fp32 by ``torch.log_softmax``; it shares no code with the
    package.

    It has four values and two log-sum-exps of each row, and the gradient.
    """

    def scaled(x, softmax, temperature):
        x = x.float()
        return (
            x if math.isinf(softmax.softcap) else softmax.softcap * torch.tanh(x / softmax.softcap)
        ) / temperature.float()[:, None]

    logits = two.logits.float().detach().requires_grad_()
    x, y = (
        scaled(logits, two.softmax, two.temperature),
        scaled(two.other, two.other_softmax, two.other_temperature),
    )
    log_p, log_q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    p, q = log_p.exp(), log_q.exp()
    values = torch.stack(
        [
            (q * (log_q - log_p)).sum(-1),
            (p * (log_p - log_q)).sum(-1),
            -(p * log_p).sum(-1),
            -(q * log_q).sum(-1),
        ]
    )
    kept = two.ids != IGNORE_INDEX
    (grad,) = torch.autograd.grad(
        ((constants[:, None] * values[:3]).sum(0) * weights)[kept].sum(), logits
    )
    sums = torch.stack([torch.logsumexp(x, -1), torch.logsumexp(y, -1)])
    return torch.where(kept, values, 0).detach(), torch.where(kept, sums, 0).detach(), grad


def close_enough(got, single, exact, floor, what):
    """Assert at most 1.5 times the error of PyTorch in fp32, plus the floor. The
    assertion holds for the maximum and the rms error.
    """
    e, b = (got.double() - exact).abs(), (single.to(got.dtype).double() - exact).abs()
    worst = (e / (1.5 * b.max() + floor)).max()
    rms = e.square().mean().sqrt() / (1.5 * b.square().mean().sqrt() + floor.max())
    assert worst <= 1 and rms <= 1, f"{what}: max {float(worst):.3f}, rms {float(rms):.3f}"


def both_plans(primitives, two, constants, weights):
    """Yield (plan, table, gradient). One pass also runs in place."""
    out = torch.full_like(two.logits, math.nan)
    yield "one pass", primitives.divergence_loss_grad(two, constants, weights, out), out
    table, out = primitives.divergence_stats(two), torch.full_like(two.logits, math.nan)
    primitives.divergence_grad(two, table, constants[:, None] * weights, out)
    yield "two passes", table, out
    place = two.logits.clone()
    yield (
        "in place",
        primitives.divergence_loss_grad(two._replace(logits=place), constants, weights, place),
        place,
    )


def assert_accurate(primitives, two, constants, same_bits=True):
    """Assert the criterion against the reference in fp64 for one pass, two passes and
    in place.

    ``same_bits`` also asserts that they are bitwise equal.
    """
    n, v = two.ids.numel(), two.logits.size(-1)
    constants, weights = (
        torch.tensor(constants, device=two.logits.device),
        torch.linspace(0.5, 2, n, device=two.logits.device),
    )
    exact_out = torch.empty_like(two.logits, dtype=torch.float64)
    exact = reference.divergence_loss_grad(
        as_dtype(two, torch.float64), constants.double(), weights.double(), exact_out
    )
    values, sums, single_out = pytorch_fp32(two, constants, weights)
    size = 4 * U * (exact[:4].max() + 1)
    floor = (4 * U * constants.abs().sum() * weights / two.temperature)[:, None].double()
    results = list(both_plans(primitives, two, constants, weights))
    for plan, table, grad in results:
        close_enough(table[:4], values, exact[:4], size, f"{plan}, values, V = {v}")
        for k in (4, 6):
            lse = table[k].double() + table[k + 1].double()
            close_enough(
                lse,
                sums[k // 2 - 2].double(),
                exact[k],
                4 * U * (exact[k].abs().max() + 1),
                f"{plan}, log-sum-exp {k}, V = {v}",
            )
        close_enough(grad, single_out, exact_out, floor, f"{plan}, gradient, V = {v}")
        out = two.ids == IGNORE_INDEX
        assert (grad[out] == 0).all() and (table[:, out] == 0).all()
        if same_bits or plan == "in place":
            assert torch.equal(grad, results[0][2]) and torch.equal(table, results[0][1]), (
                f"{plan}: other bits"
            )


def assert_far_rows(primitives, two, constants, weights, far, stride):
    """Rows of ``logits``, ``other`` or ``out`` that are ``stride`` elements apart give
    the same bits.

    The memory is mapped and, outside of those rows, never touched.
    """
    want = torch.empty_like(two.logits)
    table = primitives.divergence_loss_grad(two, constants, weights, want)
    n, v = want.shape
    # or all of it would be touched
    filled, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    try:
        wide = torch.empty((n - 1) * stride + v, dtype=want.dtype, device=want.device).as_strided(
            (n, v), (stride, 1)
        )
    finally:
        deterministic.fill_uninitialized_memory = filled
    out = torch.empty_like(want)
    if far == "out":
        out = wide
    else:
        wide.copy_(getattr(two, far))
        two = two._replace(**{far: wide})
    assert torch.equal(
        primitives.divergence_loss_grad(two, constants, weights, out), table
    ) and torch.equal(out, want)
