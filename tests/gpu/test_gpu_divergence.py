"""Two logits tensors on every GPU backend: against the fp64 reference, layouts bitwise,
and behaviour that needs a device.
"""

import itertools
import math

import pytest
import torch
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
from places import (
    DRY,
    captured,
    compilations,
    keep_busy,
    no_synchronization,
    other_stream,
    peak_bytes,
    sized,
    synchronize,
    two_devices,
)

import reweight_ops as rw
from reweight_ops._core.backends import reference_divergence as reference
from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams
from reweight_ops._core.backends.select import load
from reweight_ops._core.engine.distillation import KINDS

pytestmark = pytest.mark.gpu

VOCABULARIES = sized((1, 7, 1031, 32000, 151936), (1, 131))
#: Of the public ops.
SHAPE, VOCAB, SMALL = sized((4, 64), (2, 5)), sized(32000, 131), sized(4099, 131)


@pytest.fixture
def primitives(place):
    return load(place.backend)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def mixture(two, rows=None):
    """Constants that differ, and weights that do."""
    return torch.tensor(CONSTANTS["all"], device=two.logits.device), torch.linspace(
        0.5, 2, rows or two.ids.numel(), device=two.logits.device
    )


# --- accuracy -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(place, primitives, dtype, case, kind):
    two = make(sized(64, 6), sized(5003, 131), dtype, case=case, device=place.device)
    assert_accurate(primitives, two, CONSTANTS[kind], same_bits=place.backend == "cuda")


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_vocabularies(place, primitives, dtype, vocab):
    two = make(sized(40, 5), vocab, dtype, device=place.device)
    assert_accurate(primitives, two, CONSTANTS["all"], same_bits=place.backend == "cuda")


@pytest.mark.parametrize(
    ("first", "second"), [c for c in itertools.product(DTYPES, DTYPES) if c[0] != c[1]]
)
def test_mixed_dtypes(place, primitives, first, second):
    two = make(sized(16, 5), sized(2049, 131), DTYPES[first], DTYPES[second], device=place.device)
    assert_accurate(primitives, two, CONSTANTS["all"], same_bits=place.backend == "cuda")


@pytest.mark.parametrize("cap", [math.inf, 20.0])
def test_zero_probabilities_and_nan_rows(place, primitives, dtype, cap):
    v = sized(5003, 131)
    two = make(12, v, dtype, device=place.device)._replace(
        ids=torch.arange(12, device=place.device),
        softmax=SoftmaxParams(v, cap),
        other_softmax=SoftmaxParams(v, cap),
    )
    z, y = two.logits, two.other
    z[0, v - 3] = -math.inf  # p = 0 < q
    y[1, v - 1] = -math.inf  # q = 0 < p
    z[2, 5] = y[2, 5] = -math.inf
    z[3, : v - 30] = y[3, : v - 30] = -math.inf  # all that most threads see
    z[4, ::2] = y[4, ::2] = -math.inf
    z[5, 100:] = y[5, 100:] = -math.inf
    z[6] = -math.inf
    y[7] = -math.inf
    y[8, v - 1] = math.nan
    z[9, 17] = math.inf
    y[10] = -math.inf
    y[10, 0] = math.nan
    nan_rows = [6, 7, 8, 9, 10]
    constants, weights = mixture(two)
    want = torch.empty_like(z, dtype=torch.float64)
    exact = reference.divergence_loss_grad(
        as_dtype(two, torch.float64), constants.double(), weights.double(), want
    )
    assert exact[0, 0] == math.inf and exact[1, 1] == math.inf and exact[:2, nan_rows].isnan().all()
    for plan, table, grad in both_plans(primitives, two, constants, weights):
        torch.testing.assert_close(
            table[:2].double(),
            exact[:2],
            rtol=1e-5,
            atol=2e-6,
            equal_nan=True,
            msg=lambda m, p=plan: f"{p}: {m}",
        )
        assert grad[1].isnan().all() and grad[nan_rows].isnan().all(), plan
        for i in (0, 2, 3, 4, 5, 11):
            assert (grad[i][z[i] == -math.inf] == 0).all() and grad[i].isfinite().all(), (plan, i)
            torch.testing.assert_close(
                grad[i].double(), want[i], rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=2e-6
            )


@pytest.mark.parametrize("low", [-1e4, -1e30, -3.5e38])
def test_masked_by_a_number(place, primitives, dtype, low):
    """A number far below all others gives what -inf gives."""
    two = make(3, sized(9001, 131), dtype, device=place.device)
    z, y = two.logits, two.other
    masked = torch.ones(z.size(-1), dtype=torch.bool, device=z.device)
    masked[[3, z.size(-1) // 2, -1]] = False
    z[:, masked] = y[:, masked] = -math.inf
    want = [
        (plan, table.clone(), grad.clone())
        for plan, table, grad in both_plans(primitives, two, *mixture(two))
    ]
    z[:, masked] = y[:, masked] = max(low, torch.finfo(dtype).min)
    for (plan, table, grad), (_, table_want, grad_want) in zip(
        both_plans(primitives, two, *mixture(two)), want, strict=True
    ):
        assert table_want[:4].isfinite().all()
        assert torch.equal(table, table_want) and torch.equal(grad, grad_want), plan


def test_ignored_rows_or_without_coefficients_are_not_read(place, primitives):
    two = make(8, sized(5000, 131), torch.bfloat16, device=place.device)
    constants, weights = mixture(two)
    clean = torch.empty_like(two.logits)
    table = primitives.divergence_loss_grad(two, constants, weights, clean)
    two.logits[3], two.other[7] = math.nan, math.nan
    out = torch.full_like(two.logits, math.nan)
    assert torch.equal(
        primitives.divergence_loss_grad(two, constants, weights, out), table
    ) and torch.equal(out, clean)
    assert (out[[3, 7]] == 0).all() and (table[:, [3, 7]] == 0).all()
    derivatives, want = constants[:, None] * weights, torch.empty_like(out)
    primitives.divergence_grad(two, table, derivatives, want)
    two.logits[1] = two.other[1] = math.nan
    derivatives[:, 1] = 0
    primitives.divergence_grad(two, table, derivatives, out)
    assert (out[1] == 0).all() and torch.equal(out[[0, 2]], want[[0, 2]])


# --- bitwise --------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", sized((1031, 32000, 151936), (131,)))
def test_a_row_is_the_same_bits_wherever_it_stands(place, primitives, dtype, vocab):
    """Permuted, alone, in another batch size, with padding, either tensor or the
    gradient unaligned.
    """
    n = sized(300, 9)
    two = make(n, vocab, dtype, torch.float32, case="per_row", device=place.device)
    constants, weights = mixture(two)
    out = torch.full_like(two.logits, math.nan)
    table = primitives.divergence_loss_grad(two, constants, weights, out)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(place.device)
    for few in (order, order[:1], order[: n // 3]):
        some = DivergenceInputs(*(x[few].contiguous() for x in two[:5]), *two[5:])
        got_out = torch.full_like(some.logits, math.nan)
        got = primitives.divergence_loss_grad(some, constants, weights[few].contiguous(), got_out)
        assert torch.equal(got, table[:, few]) and torch.equal(got_out, out[few])
    whole = -(-vocab // 8) * 8 + 16
    for starts in ((1, 3, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1), (8, 8, 8)):
        buffers = [
            torch.full((n, whole), math.nan, dtype=t.dtype, device=t.device)
            for t in (two.logits, two.other, out)
        ]
        x, y, g = (b[:, s : s + vocab + 4] for b, s in zip(buffers, starts, strict=True))
        x[:, :vocab], y[:, :vocab] = two.logits, two.other
        got = primitives.divergence_loss_grad(
            two._replace(logits=x, other=y), constants, weights, g
        )
        assert (
            torch.equal(got, table) and torch.equal(g[:, :vocab], out) and (g[:, vocab:] == 0).all()
        ), starts
        assert (
            buffers[2][:, : starts[2]].isnan().all()
            and buffers[2][:, starts[2] + vocab + 4 :].isnan().all()
        ), starts


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_split_rows_have_the_bits_of_whole_rows(place, primitives, dtype, vocab):
    if DRY or place.backend != "cuda":
        pytest.skip("the CUDA backend alone has both kernels")
    from reweight_ops import _cuda

    two = make(5, vocab, dtype, device=place.device)
    constants, weights = mixture(two)
    try:
        _cuda.set_divergence_kernel("whole")
        *_, (_, want, want_grad) = both_plans(primitives, two, constants, weights)
        if torch.cuda.get_device_capability() >= (9, 0):
            _cuda.set_divergence_kernel("split")
        for plan, table, grad in both_plans(primitives, two, constants, weights):
            assert torch.equal(table, want) and torch.equal(grad, want_grad), plan
    finally:
        _cuda.set_divergence_kernel("auto")


def test_run_to_run(place, primitives, dtype, poisoned):
    two = make(sized(500, 8), sized(32000, 131), dtype, device=place.device)
    want = [
        (table.clone(), grad.clone())
        for _, table, grad in both_plans(primitives, two, *mixture(two))
    ]
    for _ in range(sized(10, 2)):
        for (plan, table, grad), (table_want, grad_want) in zip(
            both_plans(primitives, two, *mixture(two)), want, strict=True
        ):
            assert torch.equal(table, table_want) and torch.equal(grad, grad_want), plan


def test_equal_tensors_give_exact_zeros(place, primitives, dtype):
    two = make(sized(40, 3), sized(32000, 131), dtype, device=place.device)
    two = two._replace(other=two.logits.clone(), other_temperature=two.temperature)
    _, weights = mixture(two)
    for plan, table, grad in both_plans(
        primitives, two, torch.tensor([1.0, 1.0, 0.0], device=place.device), weights
    ):
        assert (table[:2] == 0).all() and (grad == 0).all(), plan


# --- what only a device shows ---------------------------------------------------------


def two_logits(place, vocab=VOCAB):
    """``(logits, other, mask)`` for the public ops."""
    rows = make(SHAPE[0] * SHAPE[1], vocab, torch.bfloat16, device=place.device)
    mask = (
        torch.arange(SHAPE[1]) < torch.tensor([SHAPE[1] - i for i in range(SHAPE[0])])[:, None]
    ).to(place.device)
    return rows.logits.view(*SHAPE, vocab), rows.other.view(*SHAPE, vocab), mask


def divergence(z, other, mask, place, kind="jeffreys", **options):
    """``(values, gradient)``."""
    z = z.detach().clone().requires_grad_()
    values = rw.token_divergence(
        z, other, kind=kind, completion_mask=mask, backend=place.backend, **options
    )
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def distillation(z, other, mask, place, plan="one_pass", **options):
    z = z.detach().clone().requires_grad_()
    out = rw.distillation_loss(
        z,
        other,
        kind="reverse_kl",
        completion_mask=mask,
        plan=plan,
        backend=place.backend,
        **options,
    )
    assert out.plan == plan
    return out.loss.detach(), torch.autograd.grad(out.loss, z)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_the_reference(place, kind):
    z, other, mask = two_logits(place, SMALL)
    got = divergence(z, other, mask, place, kind, temperature=0.8)
    want = divergence(
        z.double(), other.double(), mask, place._replace(backend="reference"), kind, temperature=0.8
    )
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2**-8, atol=2e-6)
    assert (got[0][~mask] == 0).all() and (got[1][~mask] == 0).all()


@pytest.mark.parametrize("op", [divergence, distillation])
def test_in_a_graph(place, op):
    z, other, mask = two_logits(place, SMALL)
    replay, held = captured(lambda: op(z, other, mask, place))
    before = [x.clone() for x in held]
    z.copy_(z * 0.7 + 0.3 * z.flip(0))
    other.copy_(other.flip(1))
    mask.copy_(mask.flip(0))
    replay()
    synchronize()
    for old, got, want in zip(before, held, op(z, other, mask, place), strict=True):
        assert torch.equal(got, want) and not torch.equal(got, old)


@pytest.mark.parametrize("op", [divergence, distillation])
@pytest.mark.parametrize("late", [0, 1])
def test_it_runs_on_the_current_stream(place, op, late):
    """The stream sleeps, then one tensor is written, then the op runs: code on another
    stream would read the old contents.
    """
    z, other, mask = two_logits(place)
    want = op(z, other, mask, place)
    written = [z, other]
    written[late] = torch.zeros_like(written[late])
    synchronize()
    with other_stream():
        keep_busy(sized(50, 0))
        written[late].copy_((z, other)[late])
        got = op(*written, mask, place)
    synchronize()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_it_does_not_wait_for_another_stream(place):
    z, other, mask = two_logits(place)
    divergence(z, other, mask, place)
    synchronize()
    with other_stream():
        asleep = keep_busy(sized(500, 0))
    divergence(z, other, mask, place)
    if not DRY:
        torch.cuda.current_stream().synchronize()
        assert not asleep.query(), (
            "the call waited for a stream that is none of its business (or the sleep was too short)"
        )
        asleep.synchronize()


def test_nothing_waits_for_the_gpu(place):
    z, other, mask = two_logits(place)
    for op in (divergence, distillation):
        op(z, other, mask, place)  # what is uploaded or compiled once
        with no_synchronization():
            op(z, other, mask, place)


def test_on_a_device_that_is_not_the_current_one(place):
    devices = two_devices()
    tensors = two_logits(place, SMALL)
    for op in (divergence, distillation):
        first, second = (op(*(t.to(d) for t in tensors), place) for d in devices)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.cpu(), b.cpu()) and str(b.device).startswith(devices[1])


def test_in_a_compiled_caller(place):
    z, other, mask = two_logits(place, SMALL)

    def step(x):
        return rw.token_divergence(
            x * 1, other, kind="reverse_kl", completion_mask=mask, backend=place.backend
        ).sum()

    torch._dynamo.reset()
    found = []
    for f in (step, torch.compile(step, fullgraph=True, backend=sized("inductor", "aot_eager"))):
        leaf = z.detach().clone().requires_grad_()
        value = f(leaf)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_compiled_twice(place):
    if place.backend != "triton":
        pytest.skip("only Triton compiles at run time")
    z, other, mask = two_logits(place)
    for op in (divergence, distillation):
        op(z, other, mask, place)
        with compilations() as names:
            op(z[:1], other[:1], mask[:1], place, temperature=0.7)
            op(z[:, :-1], other[:, :-1], mask[:, :-1], place)
        assert names == []


def test_memory(place):
    """Values alone: nothing the size of the logits. With a gradient: the gradient, and
    nothing if it is written over the logits.
    """
    z, other, mask = two_logits(place, sized(128256, 131))
    whole = z.numel() * z.element_size()
    leaf = z.detach().clone().requires_grad_()

    def values():
        with torch.no_grad():
            return rw.token_divergence(z, other, completion_mask=mask, backend=place.backend)

    def gradient():
        loss = rw.distillation_loss(
            leaf, other, kind="jeffreys", completion_mask=mask, backend=place.backend
        ).loss
        return torch.autograd.grad(loss, leaf)

    for run, allowed in ((values, whole // 50), (gradient, whole + whole // 50)):
        peak = peak_bytes(run)
        assert peak is None or peak <= allowed, f"{peak} bytes, {peak / whole:.2f} times the logits"


@pytest.mark.parametrize("far", ["logits", "other", "out"])
def test_offsets_beyond_two_to_the_31(place, primitives, far):
    """Takes address space, and on a GPU 4 GiB."""
    two = make(2, sized(32000, 1024), torch.bfloat16, device=place.device)
    assert_far_rows(primitives, two, *mixture(two), far, stride=2**31 + 8)
