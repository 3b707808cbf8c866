"""Rows with one very likely token, and rows with a large common offset.

Log-probs and gradients must not be lost to 1 + x = 1 in fp32.
"""

import math

import contract
import pytest
import torch
from contract import DTYPES, ONE
from sure_rows import (
    CAPS,
    MARGINS,
    TOLERANCE,
    assert_close_divergences_bounded,
    assert_divergence_gradients_bounded,
    assert_divergences_kept,
    close_pairs,
    exact,
    sure_pairs,
    sure_rows,
    transformed_pairs,
    worst,
)

import reweight_ops as rw
from reweight_ops._core.backends import reference
from reweight_ops._core.backends.base import DIVERGENCE_STATS, DivergenceInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program

BACKENDS = {"reference": reference.BACKEND}
LEVELS = ["reference"]
try:
    from reweight_ops._core.backends import cpu

    BACKENDS["cpu"] = cpu.BACKEND
    LEVELS += cpu._C.build_info()["supported_levels"]
except ImportError:
    cpu = None

#: A soft cap changes margins: capped at 200, logits 119 apart are 107 apart.
CAP = 200.0
REINFORCE = Program.of(("reinforce",)), torch.tensor([-20.0, 20.0, 1.0])


@pytest.fixture(params=LEVELS)
def primitives(request):
    """The reference, or the CPU kernels at one instruction-set level."""
    if request.param == "reference":
        yield reference.BACKEND
        return
    cpu._C.set_level(request.param)
    yield cpu.BACKEND
    cpu._C.set_level("auto")


def capped(logits, cap):
    return logits.double() if math.isinf(cap) else cap * torch.tanh(logits.double() / cap)


def assert_kept(got, truth, what, rounding=0.0):
    """Assert the tolerance; ``rounding`` is half the smallest step of the result's
    dtype.
    """
    error = (got.double() - truth).abs()
    assert (error <= TOLERANCE * truth.abs() + rounding).all(), (
        f"{what}: {worst(got, truth):.3g} relative"
    )


def half_step(dtype):
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2


@pytest.mark.parametrize("cap", [math.inf, CAP])
@pytest.mark.parametrize("vocab", [3, 9, 257, 5003, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_primitives_keep_log_prob_and_gradient(primitives, dtype, vocab, cap):
    dtype = DTYPES[dtype]
    rows = sure_rows(vocab, dtype)
    z, ids, softmax, n = rows.logits, rows.ids, SoftmaxParams(vocab, cap), len(rows.ids)
    logp, one_minus_p = exact(capped(z, cap), ids)
    slope = (
        1 - (capped(z, cap) / cap).square().gather(1, ids[:, None])[:, 0] if cap < math.inf else 1.0
    )
    stats = contract.stats_of(primitives, z, ids, softmax=softmax)
    for name in ("logp", "max_logp"):
        assert_kept(stats[name], logp, name)
    grad = contract.grad_of(primitives, z, ids, stats, {"logp": torch.ones(n)}, softmax)
    assert_kept(
        grad.gather(1, ids[:, None])[:, 0], one_minus_p * slope, "gradient", half_step(dtype)
    )
    out, grad = contract.loss_grad(primitives, z, ids, program=REINFORCE, softmax=softmax)
    assert torch.equal(out[0], stats["logp"])
    assert_kept(
        grad.gather(1, ids[:, None])[:, 0],
        out[4].double() * one_minus_p * slope,
        "gradient in one pass",
        half_step(dtype),
    )


def test_narrow_rows(primitives):
    """Rows of one column, and of two in either order."""
    stats = contract.stats_of(
        primitives, torch.tensor([[7.0], [-1e30]]), torch.zeros(2, dtype=torch.int64)
    )
    assert all((value == 0).all() for name, value in stats.items() if name != "lse")
    for target in (0, 1):
        z = torch.zeros(len(MARGINS), 2)
        z[:, 1 - target] = -torch.tensor(MARGINS)
        ids = torch.full((len(MARGINS),), target)
        logp, one_minus_p = exact(z, ids)
        stats = contract.stats_of(primitives, z, ids)
        assert_kept(stats["logp"], logp, "logp")
        grad = contract.grad_of(primitives, z, ids, stats, {"logp": torch.ones(len(ids))})
        assert_kept(grad[torch.arange(len(ids)), ids], one_minus_p, "gradient")


def test_entropy_and_sum_of_squares(primitives):
    """Both are of the size of 1 - p."""
    rows = sure_rows(5003)
    x = rows.logits.double()
    below = x - x.amax(1, keepdim=True)
    rest = (rows.one_minus_p / (1 - rows.one_minus_p))[:, None]
    log_p = below - torch.log1p(rest)
    stats = contract.stats_of(primitives, rows.logits, rows.ids)
    assert_kept(stats["entropy"], -(log_p.exp() * log_p).sum(1), "entropy")
    squares = (2 * below).exp().scatter(1, rows.ids[:, None], 0.0).sum(1)
    assert_kept(
        stats["log_sum_p_sq"], torch.log1p(squares) - 2 * torch.log1p(rest[:, 0]), "log_sum_p_sq"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_public_ops(backend, dtype):  # docs/semantics.md: S27
    rows = sure_rows(5003, DTYPES[dtype])
    z, ids = rows.logits[None], rows.ids[None]
    found = rw.token_stats(z, ids, stats=("logps", "is_top1", "log1m_p"), backend=backend)
    assert_kept(found.logps[0], rows.logp, "logps")
    assert found.is_top1.all()
    assert ((found.log1m_p[0].double() - rows.one_minus_p.log()).abs() <= 1.01 * TOLERANCE).all()
    x = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rw.token_logps(x, ids, backend=backend).sum(), x)
    assert_kept(
        grad[0].gather(1, rows.ids[:, None])[:, 0], rows.one_minus_p, "gradient of log-probs"
    )
    for plan in ("one_pass", "two_pass"):
        loss = rw.policy_loss(x, ids, 1.0, spec="reinforce", backend=backend, plan=plan).loss
        (grad,) = torch.autograd.grad(loss, x)
        got = grad[0].gather(1, rows.ids[:, None])[:, 0].double() * len(rows.ids)
        assert_kept(got, -rows.one_minus_p, f"gradient of a loss, {plan}")


@pytest.mark.parametrize("dtype, vocab", [("fp32", 3), ("bf16", 257), ("fp32", 5003)])
def test_divergences(primitives, dtype, vocab):
    pairs = sure_pairs(vocab, DTYPES[dtype])
    assert_divergences_kept(primitives, pairs)
    assert_divergence_gradients_bounded(primitives, pairs.some(3))


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_divergences_at_temperatures_and_soft_caps(primitives, caps):
    pairs = transformed_pairs(257, DTYPES["fp32"], caps)
    assert_divergences_kept(primitives, pairs)


@pytest.mark.parametrize("vocab", [3, 5003])
def test_divergences_of_close_distributions(primitives, vocab):
    assert_close_divergences_bounded(primitives, close_pairs(vocab))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [1e4, 1e10, -1e30, 1e30])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equal_logits_of_any_size(primitives, dtype, offset, temperature):
    t = torch.tensor([temperature])
    z = torch.full((2, 9), offset, dtype=DTYPES[dtype])
    z[1, 4:] = -math.inf
    ids, n = torch.tensor([2, 3]), torch.tensor([9.0, 4.0])
    stats = contract.stats_of(primitives, z, ids, temperature=t)
    for name in ("logp", "max_logp", "log_sum_p_sq"):
        torch.testing.assert_close(stats[name], -n.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["entropy"], n.log(), rtol=1e-6, atol=0)
    want = torch.where(z == -math.inf, 0.0, -1 / n[:, None] / t).to(z.dtype)
    want[[0, 1], ids] = ((1 - 1 / n) / t).to(z.dtype)
    grad = contract.grad_of(primitives, z, ids, stats, {"logp": torch.ones(2)}, temperature=t)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)
    out, grad = contract.loss_grad(primitives, z, ids, program=REINFORCE, temperature=t)
    torch.testing.assert_close(
        grad.float(),
        out[4, :, None] * want.float(),
        rtol=2**-7 if dtype == "bf16" else 1e-6,
        atol=0,
    )


@pytest.mark.parametrize("offset", [1e4, 1e10, -1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences_of_any_offset(backend, offset):
    """Uniform over nine columns against uniform over three of them, both far from 0."""
    p, q = torch.full((1, 9), -math.inf), torch.full((1, 9), offset)
    p[:, :3] = offset
    for kind, want in (("reverse_kl", math.log(3)), ("forward_kl", math.inf)):
        x = p.clone().requires_grad_()
        d = rw.token_divergence(x[None], q[None], kind=kind, backend=backend)
        assert d.item() == pytest.approx(want, rel=1e-6)
        if kind == "reverse_kl":
            (grad,) = torch.autograd.grad(d.sum(), x)
            assert grad.abs().max() < 1e-6  # log p - log q = KL wherever p has mass
    x = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        rw.token_divergence(x[None], p[None], kind="forward_kl", backend=backend).sum(), x
    )
    torch.testing.assert_close(grad, torch.tensor([[-2 / 9] * 3 + [1 / 9] * 6]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_that_is_masked_by_the_lowest_number(backend, dtype):
    """KL(p‖q) is p·3.4e38 and finite, and so is its gradient."""
    lowest = torch.finfo(dtype).min
    z = torch.zeros(1, 1, 16, dtype=dtype)
    other = z.clone()
    other[..., 5] = lowest
    x = z.clone().requires_grad_()
    d = rw.token_divergence(x, other, kind="reverse_kl", backend=backend)
    assert d.item() == pytest.approx(-lowest / 16, rel=1e-6)
    (grad,) = torch.autograd.grad(d.sum(), x)
    want = torch.full((16,), -1 / 16 * -lowest / 16, dtype=torch.float64)
    want[5] = 1 / 16 * -lowest * (1 - 1 / 16)
    torch.testing.assert_close(
        grad.double().view(16), want, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


FAR_BELOW = [0.0, -800.0, -1919.0, -1e5]


@pytest.mark.parametrize("offset", FAR_BELOW)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_whose_first_columns_are_masked(primitives, dtype, offset):
    """Blocks of -inf come before the logits, which are far below zero."""
    z = torch.full((1, 9001), -math.inf, dtype=DTYPES[dtype])
    z[0, 8500:8504] = offset
    ids = torch.tensor([8501])
    stats = contract.stats_of(primitives, z, ids)
    for name in ("logp", "max_logp", "log_sum_p_sq"):
        torch.testing.assert_close(stats[name], -torch.tensor([4.0]).log(), rtol=1e-6, atol=0)
    grad = contract.grad_of(primitives, z, ids, stats, {"logp": torch.ones(1)})
    want = torch.zeros(9001).index_fill(0, torch.arange(8500, 8504), -0.25)
    want[8501] = 0.75
    torch.testing.assert_close(grad[0].float(), want, rtol=1e-5, atol=0)
    out, _ = contract.loss_grad(primitives, z, ids)
    assert torch.equal(out[0], stats["logp"])


@pytest.mark.parametrize("offset", FAR_BELOW)
def test_divergences_of_rows_whose_first_columns_are_masked(primitives, offset):
    z, y = torch.full((1, 9001), -math.inf), torch.full((1, 9001), -math.inf)
    z[0, 8500:8502] = offset
    y[0, 8500:8502] = torch.tensor([3.0, 1.0]).log() + offset / 2
    softmax = SoftmaxParams(9001)
    two = DivergenceInputs(z, y, torch.zeros(1, dtype=torch.int64), ONE, ONE, softmax, softmax)
    table = dict(zip(DIVERGENCE_STATS, primitives.divergence_stats(two), strict=True))
    q = torch.softmax(y[:, 8500:8502].double(), 1)  # about 3/4 and 1/4
    for name, want in (
        ("entropy", math.log(2)),
        ("other_entropy", -(q * q.log()).sum()),
        ("forward_kl", (q * (2 * q).log()).sum()),
        ("reverse_kl", -(2 * q).log().sum() / 2),
    ):
        assert table[name].item() == pytest.approx(float(want), rel=1e-5), name
