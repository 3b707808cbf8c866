"""Sure tokens and large offsets in the emulated CUDA kernels: log-prob and gradient
keep their digits.

tests/support/sure_rows.py has the bound.
"""

import math

import pytest
import sure_rows
import torch
from cuda_emulation.fixtures import SCHEDULES, emulated

from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: From rows in one thread to rows over several warps, tiles and slices.
WIDTHS = [9, 65, 257, 5003, 20011]
ONE = torch.ones(1)
PLAIN = Program.of(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield emulated()
    torch.set_num_threads(threads)


@pytest.fixture
def kernels(loaded):
    loaded[0].set_schedule("random", 1)
    yield loaded
    loaded[0].set_kernel("auto")


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def one_pass(primitives, z, ids, adv=None):
    """Rows and gradient of ``adv·logp``: on-policy, so that the coefficient is -adv."""
    n = ids.numel()
    adv = torch.ones(n) if adv is None else adv
    columns = -(-z.size(-1) * z.itemsize // 16) * 16 // z.itemsize
    out = torch.full((n, columns), math.nan, dtype=z.dtype)[:, : z.size(-1)]
    rows = primitives.token_loss_grad(
        z, ids, ONE, SoftmaxParams(z.size(-1)), RowInputs(torch.ones(1, n), None, adv), *PLAIN, out
    )
    return rows, out


def aligned(z):
    """The same in rows that start at multiples of 16 bytes."""
    columns = -(-z.size(-1) * z.itemsize // 16) * 16 // z.itemsize
    made = torch.zeros((z.size(0), columns), dtype=z.dtype)[:, : z.size(-1)]
    made.copy_(z)
    return made


def target_gradient(out, ids):
    return out.gather(-1, ids[:, None])[:, 0]


def tolerance(dtype):
    """A gradient is also rounded to its dtype; in fp16, numbers below its range are
    lost.
    """
    return sure_rows.TOLERANCE + torch.finfo(dtype).eps / 2


def assert_kept(rows, logp, out, dtype):
    assert sure_rows.worst(logp, rows.logp) <= sure_rows.TOLERANCE
    got, want = -target_gradient(out, rows.ids), rows.one_minus_p
    within = want >= torch.finfo(dtype).tiny
    assert sure_rows.worst(got[within], want[within]) <= tolerance(dtype)


@pytest.mark.parametrize("kernel", ["streaming", "ring"])
@pytest.mark.parametrize("vocab", WIDTHS)
def test_one_pass(kernels, dtype, vocab, kernel):
    module, primitives = kernels
    module.set_kernel(kernel)
    rows = sure_rows.sure_rows(vocab, dtype)
    got, out = one_pass(primitives, aligned(rows.logits), rows.ids)
    assert_kept(rows, got[0], out, dtype)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_statistics_and_gradient(kernels, dtype, vocab):
    _module, primitives = kernels
    rows = sure_rows.sure_rows(vocab, dtype)
    names = ("logp", "max_logp", "lse", "entropy", "log_sum_p_sq")
    stats = dict(
        zip(
            names,
            primitives.token_stats(rows.logits, rows.ids, ONE, SoftmaxParams(vocab), names),
            strict=True,
        )
    )
    out = torch.full_like(rows.logits, math.nan)
    primitives.token_grad(
        rows.logits,
        rows.ids,
        ONE,
        SoftmaxParams(vocab),
        stats,
        {"logp": -torch.ones(rows.ids.numel())},
        out,
    )
    assert_kept(rows, stats["logp"], out, dtype)
    assert torch.equal(stats["max_logp"], stats["logp"])
    # Σp² is (1 - δ)² and less than e^-2δ; the entropy is at least δ·(1 + margin). Both
    # vanish with the log-prob.
    z = rows.logits.double()
    p = (z - z.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    others = p.scatter(-1, rows.ids[:, None], 0.0)
    entropy = -(torch.xlogy(others, others)).sum(-1) - (1 - rows.one_minus_p) * rows.logp
    assert sure_rows.worst(stats["entropy"], entropy) <= sure_rows.TOLERANCE


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_bits(kernels, schedule):
    """Every kernel and thread that sums again gives the same bits: with a ring that
    holds part of the next row, in blocks of two slices.
    """
    module, primitives = kernels
    module.set_schedule(schedule, 3)
    rows = sure_rows.sure_rows(8 * 10 * 1024 + 1003, torch.bfloat16)
    some = torch.arange(0, rows.ids.numel(), 5)
    z, ids = aligned(rows.logits[some]), rows.ids[some]
    logp = primitives.token_stats(z, ids, ONE, SoftmaxParams(z.size(-1)), ("logp",))[0]
    assert sure_rows.worst(logp, rows.logp[some]) <= sure_rows.TOLERANCE
    found = {}
    for kernel in ("streaming", "ring"):
        module.set_kernel(kernel)
        found[kernel] = one_pass(primitives, z, ids)
    assert torch.equal(found["ring"][0], found["streaming"][0]) and torch.equal(
        found["ring"][1], found["streaming"][1]
    )
    assert torch.equal(found["ring"][0][0], logp)


@pytest.mark.parametrize("kernel", ["streaming", "ring"])
@pytest.mark.parametrize("value", [1e10, -1e10, -1e30, 3e38, -3e38, 1e6, 0.0])
def test_one_value_everywhere(kernels, value, kernel):
    module, primitives = kernels
    module.set_kernel(kernel)
    for dtype, vocab in (
        (torch.float32, 9),
        (torch.float32, 5003),
        (torch.bfloat16, 9),
        (torch.bfloat16, 5003),
    ):
        z, ids = (
            aligned(torch.full((3, vocab), value, dtype=dtype)),
            torch.tensor([0, 4, vocab - 1]),
        )
        got, out = one_pass(primitives, z, ids)
        assert got[0].tolist() == pytest.approx([-math.log(vocab)] * 3, rel=1e-6)
        assert got[1].tolist() == pytest.approx([math.log(vocab)] * 3, rel=1e-6)
        want = torch.full((3, vocab), 1 / vocab, dtype=torch.float64)
        want[torch.arange(3), ids] -= 1
        torch.testing.assert_close(
            out.double(), want, rtol=float(torch.finfo(dtype).eps) + 1e-6, atol=0
        )
        names = ("logp", "lse", "lse_low")
        stats = dict(
            zip(
                names, primitives.token_stats(z, ids, ONE, SoftmaxParams(vocab), names), strict=True
            )
        )
        logp, lse = stats["logp"], stats["lse"]
        assert torch.equal(logp, got[0]) and lse.tolist() == pytest.approx(
            [float(z[0, 0]) + math.log(vocab)] * 3
        )
        by_primitive = torch.full_like(z, math.nan)
        primitives.token_grad(
            z, ids, ONE, SoftmaxParams(vocab), stats, {"logp": -torch.ones(3)}, by_primitive
        )
        torch.testing.assert_close(
            by_primitive.double(), want, rtol=float(torch.finfo(dtype).eps) + 1e-6, atol=0
        )
        if abs(value) < 1e38:  # otherwise there is no log-sum-exp
            cold = torch.full((1,), 0.7)
            stats = dict(
                zip(
                    names,
                    primitives.token_stats(z, ids, cold, SoftmaxParams(vocab), names),
                    strict=True,
                )
            )
            primitives.token_grad(
                z, ids, cold, SoftmaxParams(vocab), stats, {"logp": -torch.ones(3)}, by_primitive
            )
            torch.testing.assert_close(
                by_primitive.double(), want / 0.7, rtol=float(torch.finfo(dtype).eps) + 1e-6, atol=0
            )


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5, 1e7])
@pytest.mark.parametrize("vocab", [257, 5003])
def test_offsets(kernels, vocab, offset):
    """Logits that keep their differences at an offset keep their log-probs and
    gradients, judged by the row in fp32.
    """
    module, primitives = kernels
    rows = sure_rows.sure_rows(vocab, torch.float32, offset)
    for kernel in ("streaming", "ring"):
        module.set_kernel(kernel)
        got, out = one_pass(primitives, aligned(rows.logits), rows.ids)
        assert_kept(rows, got[0], out, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -9000.0, 60000.0])
@pytest.mark.parametrize("vocab", [257, 5003])
def test_an_offset_costs_no_digits(kernels, vocab, offset):
    """Logits that are multiples of 1/64 keep their differences exactly: statistics and
    gradient are those of no offset, to fp32's last digits.
    """
    module, primitives = kernels
    z = (
        torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 3 * 64
    ).round() / 64
    ids = torch.tensor([0, 1, vocab // 2, vocab - 1])
    truth = torch.log_softmax(z.double(), -1)
    entropy = -(truth.exp() * truth).sum(-1)
    for kernel in ("streaming", "ring"):
        module.set_kernel(kernel)
        got, out = one_pass(primitives, aligned(z + offset), ids)
        assert ((got[0].double() - truth[range(4), ids]).abs() <= 3e-6).all()
        assert ((got[1].double() - entropy).abs() <= 3e-6).all()
        want = truth.exp()
        want[range(4), ids] -= 1
        torch.testing.assert_close(out.double(), want, rtol=5e-6, atol=1e-12)


def test_masks_far_below_a_sure_token(kernels):
    """Warps that see only masked logits have nothing to sum again; the
    few others do."""
    module, primitives = kernels
    for dtype in (torch.float32, torch.bfloat16):
        vocab = 20011
        z = torch.full((2, vocab), torch.finfo(dtype).min, dtype=dtype)
        ids = torch.tensor([7, 15000])
        z[torch.arange(2), ids] = 30.0
        z[0, 8] = z[1, 3] = 0.0
        truth, rest = sure_rows.exact(z, ids)
        for kernel in ("streaming", "ring"):
            module.set_kernel(kernel)
            got, out = one_pass(primitives, aligned(z), ids)
            assert sure_rows.worst(got[0], truth) <= sure_rows.TOLERANCE
            assert sure_rows.worst(-target_gradient(out, ids), rest) <= tolerance(dtype)
