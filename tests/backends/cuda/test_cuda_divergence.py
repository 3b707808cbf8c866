"""The CUDA kernels on two logits tensors, run thread by thread on the CPU.

They are judged by the accuracy criterion and by the rules of divergences.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cuda_emulation.fixtures import SCHEDULES, emulated
from divergence_rows import (
    CASES,
    CONSTANTS,
    DTYPES,
    as_dtype,
    assert_accurate,
    assert_far_rows,
    both_plans,
    make,
)
from sure_rows import (
    CAPS,
    assert_close_divergences_bounded,
    assert_divergence_gradients_bounded,
    assert_divergences_kept,
    close_pairs,
    sure_pairs,
    transformed_pairs,
)

from reweight_ops._core.backends import reference_divergence as reference
from reweight_ops._core.backends.base import DIVERGENCE_STATS, DivergenceInputs, SoftmaxParams
from reweight_ops._core.backends.native_divergence import NativeDivergence
from reweight_ops.errors import InvalidCall


@pytest.fixture(scope="module")
def kernels():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    # memory that is not written holds NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    module, native = emulated()
    yield module, NativeDivergence(native)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(kernels):
    kernels[0].set_schedule("random", 1)
    return kernels[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(cuda, case, kind, dtype):
    for v in (9, 1031, 5003) if dtype != "fp32" else (3, 2050, 4999):
        assert_accurate(cuda, make(6, v, DTYPES[dtype], case=case), CONSTANTS[kind])


@pytest.mark.parametrize(
    ("dtype", "other"), [c for c in itertools.product(DTYPES, DTYPES) if c[0] != c[1]]
)
@pytest.mark.parametrize("v", [1, 7, 8, 33, 2049])
def test_mixed_dtypes_padding_and_strides(cuda, dtype, other, v):
    """Both tensors are views in NaNs, with other alignments and paddings: the bits are
    those of aligned rows.
    """
    two = make(5, v, DTYPES[dtype], DTYPES[other])
    constants, weights = torch.tensor(CONSTANTS["all"]), torch.linspace(0.5, 2, 5)
    want = torch.empty(5, v, dtype=torch.float64)
    table_want = reference.divergence_loss_grad(
        as_dtype(two, torch.float64), constants.double(), weights.double(), want
    )
    plain = torch.empty_like(two.logits)
    table = cuda.divergence_loss_grad(two, constants, weights, plain)
    torch.testing.assert_close(table[:4].double(), table_want[:4], rtol=1e-5, atol=2e-6)
    rtol = {"fp32": 2e-5, "bf16": 2**-8, "fp16": 2**-11}[dtype]
    torch.testing.assert_close(plain.double(), want, rtol=rtol, atol=2e-6)
    # A row has room for the columns, its own padding and a margin, and starts at a
    # multiple of 16 bytes plus a few elements.
    for starts in ((1, 3, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        wholes = [
            torch.full((7, -(-v // 8) * 8 + 16), math.nan, dtype=t.dtype)
            for t in (plain, two.other, plain)
        ]
        x, y, out = (
            w[1:6, s : v + s + padding]
            for w, s, padding in zip(wholes, starts, (4, 8, 4), strict=True)
        )
        assert [t.data_ptr() % 16 == 0 for t in (x, y, out)] == [s == 0 for s in starts]
        x[:, :v], y[:, :v] = two.logits, two.other
        got = cuda.divergence_loss_grad(two._replace(logits=x, other=y), constants, weights, out)
        assert (
            torch.equal(got, table) and torch.equal(out[:, :v], plain) and (out[:, v:] == 0).all()
        ), starts
        around, s = wholes[2], starts[2]
        assert (
            around[1:6, v + s + 4 :].isnan().all()
            and around[1:6, :s].isnan().all()
            and around[[0, 6]].isnan().all()
        ), starts


@pytest.mark.parametrize("far", ["logits", "other", "out"])
def test_offsets_beyond_two_to_the_31(cuda, far):
    assert_far_rows(
        cuda,
        make(2, 1000, torch.bfloat16),
        torch.tensor(CONSTANTS["all"]),
        torch.ones(2),
        far,
        stride=2**31 + 5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-1e4, -1e10, -1e30, "lowest"])
def test_masked_by_a_number(cuda, dtype, low):
    """Masking columns of both tensors by a number far below all others, even the lowest
    finite one, gives the results of -inf.
    """
    low = (
        torch.finfo(DTYPES[dtype]).min
        if low == "lowest"
        else max(low, torch.finfo(DTYPES[dtype]).min)
    )
    two, constants, weights = (
        make(3, 9001, DTYPES[dtype]),
        torch.tensor(CONSTANTS["all"]),
        torch.ones(3),
    )
    z, y = two.logits, two.other
    masked = torch.zeros(9001, dtype=torch.bool)
    masked[:5000], masked[5001:8990] = True, True  # most threads see only these
    z[:, masked] = y[:, masked] = -math.inf
    want = torch.empty_like(z)
    table = cuda.divergence_loss_grad(two, constants, weights, want)
    assert table.isfinite().all()
    z[:, masked] = y[:, masked] = low
    for plan, got, grad in both_plans(cuda, two, constants, weights):
        assert torch.equal(got, table) and torch.equal(grad, want), plan


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_tensor_masked_more_than_the_other(cuda, dtype):
    """Some threads see only masked columns of p, and some unmasked columns of q:
    KL(p‖q) and both entropies are those of -inf.
    """
    two = make(3, 9001, DTYPES[dtype])
    two.logits[:, :4999], two.logits[:, 5001:], two.other[:, :4998:3] = (
        -math.inf,
        -math.inf,
        -math.inf,
    )
    of_p = [DIVERGENCE_STATS.index(name) for name in ("reverse_kl", "entropy", "other_entropy")]
    want = cuda.divergence_stats(two)[of_p]
    assert want.isfinite().all()
    for t in (two.logits, two.other):
        t[t == -math.inf] = torch.finfo(DTYPES[dtype]).min
    assert torch.equal(cuda.divergence_stats(two)[of_p], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [math.inf, 20.0])
def test_zero_probabilities_and_nan_rows(cuda, dtype, cap):
    v = 5003
    two = make(12, v, DTYPES[dtype])._replace(
        ids=torch.arange(12), softmax=SoftmaxParams(v, cap), other_softmax=SoftmaxParams(v, cap)
    )
    z, y = two.logits, two.other
    z[0, 4700] = -math.inf  # p = 0 < q
    y[1, 5001] = -math.inf  # q = 0 < p, in the tail
    z[2, 5] = y[2, 5] = -math.inf
    z[3, :4800] = y[3, :4800] = -math.inf
    z[4, ::2] = y[4, ::2] = -math.inf
    z[5, 2048:], y[5, 2048:] = -math.inf, -math.inf
    z[6] = -math.inf
    y[7] = -math.inf
    y[8, 5000] = math.nan
    z[9, 17] = math.inf
    y[10] = -math.inf
    y[10, 0] = math.nan
    nan_rows = [6, 7, 8, 9, 10]
    constants, weights = torch.tensor(CONSTANTS["all"]), torch.ones(12)
    want = torch.empty(12, v, dtype=torch.float64)
    exact = reference.divergence_loss_grad(
        as_dtype(two, torch.float64), constants.double(), weights.double(), want
    )
    assert exact[0, 0] == math.inf and exact[1, 1] == math.inf and exact[:4, nan_rows].isnan().all()
    for plan, table, grad in both_plans(cuda, two, constants, weights):
        torch.testing.assert_close(
            table[:4].double(),
            exact[:4],
            rtol=1e-5,
            atol=2e-6,
            equal_nan=True,
            msg=lambda m, plan=plan: f"{plan}: {m}",
        )
        assert grad[1].isnan().sum() == v and grad[nan_rows].isnan().all()
        for i in (0, 2, 3, 4, 5, 11):
            assert (grad[i][z[i] == -math.inf] == 0).all() and grad[i].isfinite().all()
            torch.testing.assert_close(
                grad[i].double(), want[i], rtol=1e-2 if dtype != "fp32" else 1e-4, atol=2e-6
            )
    # Only the forward direction is finite where q = 0.
    out = torch.full_like(z, math.nan)
    cuda.divergence_loss_grad(two, torch.tensor(CONSTANTS["forward"]), weights, out)
    assert out[1].isfinite().all() and out[0].isfinite().all()


def test_ignored_rows_or_without_coefficients_are_not_read(cuda):
    two = make(8, 700, torch.bfloat16)
    constants, weights = torch.tensor(CONSTANTS["all"]), torch.ones(8)
    clean = torch.empty_like(two.logits)
    table = cuda.divergence_loss_grad(two, constants, weights, clean)
    two.logits[3], two.other[7] = math.nan, math.nan
    out = torch.full_like(two.logits, math.nan)
    assert torch.equal(
        cuda.divergence_loss_grad(two, constants, weights, out), table
    ) and torch.equal(out, clean)
    assert (out[[3, 7]] == 0).all() and (table[:, [3, 7]] == 0).all()
    two.logits[1] = two.other[1] = math.nan
    derivatives = constants[:, None] * weights
    derivatives[:, 1] = 0
    cuda.divergence_grad(two, table, derivatives, out)
    assert (out[1] == 0).all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tensors_give_exact_zeros(cuda, dtype):
    two = make(3, 2500, DTYPES[dtype])
    two = two._replace(other=two.logits.clone(), other_temperature=two.temperature)
    out = torch.full_like(two.logits, math.nan)
    table = cuda.divergence_loss_grad(two, torch.tensor([1.0, 1.0, 0.0]), torch.ones(3), out)
    assert (table[:2] == 0).all() and (out == 0).all()


def test_far_apart(cuda):
    z, y = torch.zeros(1, 3000), torch.zeros(1, 3000)
    z[0, 7], y[0, 2900] = 1000.0, 1000.0
    one = torch.ones(1)
    two = DivergenceInputs(
        z, y, torch.zeros(1, dtype=torch.int64), one, one, SoftmaxParams(3000), SoftmaxParams(3000)
    )
    out = torch.empty_like(z)
    table = cuda.divergence_loss_grad(two, torch.tensor(CONSTANTS["forward"]), one, out)
    assert (
        table[:2, 0].tolist() == pytest.approx([1000, 1000], rel=1e-6)
        and out[0, 7] == 1
        and out[0, 2900] == -1
        and out.isfinite().all()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 257, 2563])
def test_sure_tokens(cuda, vocab, dtype):
    pairs = sure_pairs(vocab, DTYPES[dtype])
    assert_divergences_kept(cuda, pairs)
    assert_divergence_gradients_bounded(cuda, pairs.some(3))


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_sure_tokens_at_temperatures_and_soft_caps(cuda, caps):
    pairs = transformed_pairs(2563, torch.bfloat16, caps)
    assert_divergences_kept(cuda, pairs.some(3))


def test_close_sure_distributions(cuda):
    assert_close_divergences_bounded(cuda, close_pairs(2563))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same_bits(kernels, schedule):
    """More rows than blocks, so that buffers are reused; a row has the same result
    alone and among others.
    """
    module, cuda = kernels
    two = make(13, 2563, torch.bfloat16, torch.float32)
    constants, weights = torch.tensor(CONSTANTS["all"]), torch.linspace(0.5, 2, 13)
    module.set_schedule("eager", 0)
    want_out = torch.empty_like(two.logits)
    want = cuda.divergence_loss_grad(two, constants, weights, want_out)
    for seed in range(3):
        module.set_schedule(schedule, seed)
        for plan, table, grad in both_plans(cuda, two, constants, weights):
            assert torch.equal(table, want) and torch.equal(grad, want_out), plan
    alone = two._replace(logits=two.logits[5:6], other=two.other[5:6], ids=two.ids[5:6])
    assert torch.equal(cuda.divergence_stats(alone)[:, 0], want[:, 5])


def test_a_long_row(cuda):
    """Qwen's vocabulary, by the criterion."""
    assert_accurate(cuda, make(2, 151936, torch.bfloat16), CONSTANTS["all"])


def test_three_dimensions_and_no_rows(cuda):
    two = make(6, 100)
    want = cuda.divergence_stats(two)
    batched = two._replace(logits=two.logits.view(2, 3, 100), other=two.other.view(2, 3, 100))
    assert torch.equal(cuda.divergence_stats(batched), want)
    none = two._replace(logits=two.logits[:0], other=two.other[:0], ids=two.ids[:0])
    assert cuda.divergence_stats(none).shape == (8, 0)


def test_bad_arguments_do_not_reach_the_kernel(cuda):
    two = make(4, 60)
    for message, call in {
        "rows or columns differ": lambda: cuda.divergence_stats(two._replace(other=two.other[:3])),
        "vocab_size is 60": lambda: cuda.divergence_stats(two._replace(other=two.other[:, :59])),
        "ids is": lambda: cuda.divergence_stats(two._replace(ids=two.ids[:3])),
        "derivatives is": lambda: cuda.divergence_grad(
            two, cuda.divergence_stats(two), torch.ones(2, 4), two.logits
        ),
        "weights is": lambda: cuda.divergence_loss_grad(
            two, torch.ones(3), torch.ones(3), two.logits
        ),
        "constants is": lambda: cuda.divergence_loss_grad(
            two, torch.ones(2), torch.ones(4), two.logits
        ),
        "out is": lambda: cuda.divergence_loss_grad(
            two, torch.ones(3), torch.ones(4), two.logits.double()
        ),
    }.items():
        with pytest.raises(InvalidCall, match=message):
            call()
