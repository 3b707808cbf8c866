"""The kernels of a weight's ``batch`` against PyTorch in fp64: statistics of the call
and of sequences, and sums along them (in Triton's interpreter).
"""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad

import reweight_ops as rw
from reweight_ops._core.backends import select, triton_launch, triton_rows
from reweight_ops._core.rows.batch import BatchStatistics
from reweight_ops._core.rows.resolve import resolve_rows
from reweight_ops.testing import make_batch
from reweight_ops.triton_kernels import row_config

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

N = 75
#: Three ways to cut rows into sequences. The packed ones have an empty sequence and
#: rows of none, and the owners change from row to row.
PLACES = {
    "equal": ((3, 25), {}),
    "offsets": ((N,), {"cu_seqlens": torch.tensor([0, 37, 37, 70])}),
    "ids": (
        (N,),
        {"sequence_ids": torch.tensor([2, 0, 0, 4, 2, 3, 0] * 11)[:N], "num_sequences": 4},
    ),
}
MASKS = {
    "all": torch.ones(N),
    "some": torch.tensor([1, 0, 1, 1, 0, 1, 1] * 11)[:N],
    "most blocks are empty": (torch.arange(N) % 31 == 30).long(),
    "none": torch.zeros(N),
}
OVER_CALL = ("sum", "mean", "min", "max")
OF_SEQUENCE = ("seq_sum", "seq_mean", "seq_min", "seq_max")
ALONG = ("seq_cumsum", "seq_suffix_sum")
#: 0.9 is a number of fp64, which fp32 would round.
DECAYS = {"plain": 1.0, "a number": 0.9, "a tensor": torch.tensor(0.5)}


@pytest.fixture
def launched(monkeypatch):
    """The names of what is launched, in small blocks: sequences have several. Memory
    that nothing has written is NaN.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    names, launch = [], triton_launch.launch

    def recorded(kernel, *args, **meta):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(triton_launch, "launch", recorded)
    small = row_config.RowConfig(padded=16, packed=16, scanned=8, part=16)
    monkeypatch.setattr(row_config, "_current", small)
    yield names
    torch.use_deterministic_algorithms(False)


def rows_of(place, mask, dtype=torch.float32):
    shape, where = PLACES[place]
    mask = MASKS[mask] if isinstance(mask, str) else mask
    if place == "ids":  # PyTorch refuses a valid row of no sequence
        mask = mask * (where["sequence_ids"] < where["num_sequences"])
    primitives = select.load("triton").rows if dtype == torch.float32 else None
    tensors = {"completion_mask": mask.view(shape), **where}
    return resolve_rows("op", shape, torch.device("cpu"), dtype, tensors, primitives=primitives)


def both(place, mask):
    """The statistics of rows by Triton, and by PyTorch in fp64."""
    return [
        BatchStatistics(rows_of(place, mask, dtype)) for dtype in (torch.float32, torch.float64)
    ]


def values(keep, seed=0):
    """Numbers of both signs, and what must not matter in ignored rows."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    junk = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(N) % 3]
    return torch.where(keep, x, junk)


def assert_rounded_once(got, want, size):
    """``want`` and the sum of absolute values ``size`` are fp64.

    A result that is found in fp64 has the error of rounding it to fp32, and in fp64 at
    most two roundings (a product and a sum) for each of N rows.
    """
    assert got.dtype == torch.float32 and got.shape == (N,)
    want, size = want.expand(N), size.expand(N)
    known = want.isfinite()
    torch.testing.assert_close(got[~known].double(), want[~known], equal_nan=True)
    error = (got.double() - want)[known].abs()
    bound = (2**-24 * want.abs() + 2 * N * 2**-53 * size)[known]
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
def test_statistics(launched, place, mask):
    got, exact = both(place, mask)
    x = values(got._rows.keep)
    for name in (*OVER_CALL, *OF_SEQUENCE):
        launched.clear()
        found = getattr(got, name)(x)
        per_sequence = name.startswith("seq_")
        assert launched == (
            ["sequence_total_kernel"] if per_sequence else ["parts_kernel", "total_kernel"]
        )
        sizes = exact.seq_sum(x.double().abs()) if per_sequence else exact.sum(x.double().abs())
        assert_rounded_once(found, getattr(exact, name)(x.double()), sizes)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
def test_sums_along_sequences(launched, place, mask):
    got, exact = both(place, mask)
    x = values(got._rows.keep)
    for name, decay in itertools.product(ALONG, DECAYS.values()):
        launched.clear()
        found = getattr(got, name)(x, decay)
        assert launched == ["along_kernel"]
        decay = decay.double() if isinstance(decay, torch.Tensor) else decay
        by = getattr(exact, name)
        assert_rounded_once(found, by(x.double(), decay), by(x.double().abs(), decay))


@pytest.mark.parametrize("place", PLACES)
def test_numbers(launched, place):
    got, exact = both(place, "some")
    for name in ("sum", "mean", "seq_sum", "seq_mean", *ALONG):
        launched.clear()
        for number in (1.0, 3, True):
            found, want = getattr(got, name)(number), getattr(exact, name)(number)
            assert torch.equal(found.double(), want.expand(N)), name
        assert len(launched) == (6 if name in OVER_CALL else 3)
    torch.testing.assert_close(got.seq_cumsum(0.1, 0.9).double(), exact.seq_cumsum(0.1, 0.9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_kept_rows_that_are_not_finite(launched, place, bad):
    """Of a sequence, or of the call, and along a sequence from the row on."""
    got, exact = both(place, "some")
    at = (got._rows.keep & (torch.arange(N) > 12)).nonzero()[0]
    x = values(got._rows.keep)
    x[at] = bad
    for name in (*OVER_CALL, *OF_SEQUENCE, *ALONG):
        for decay in ((1.0,), (0.5,)) if name in ALONG else ((),):
            found = getattr(got, name)(x, *decay)
            want = getattr(exact, name)(x.double(), *decay).expand(N)
            torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    x[at + 2] = -bad  # inf - inf
    for name in ALONG:
        found, want = getattr(got, name)(x), getattr(exact, name)(x.double())
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_powers_that_are_0_or_inf(launched):
    """0·inf is not NaN. PyTorch's steps would have one."""
    batch = BatchStatistics(rows_of("equal", "all"))
    x = torch.zeros(N)
    x[3], x[4] = 1.0, -2.0
    grows = batch.seq_cumsum(x, 1e200)[:25]
    assert grows.tolist() == [0.0] * 3 + [1.0, math.inf] + [math.inf] * 20
    x[3] = math.inf
    for decay in (1e-200, torch.tensor(0.0)):
        fades = batch.seq_cumsum(x, decay)[:25]
        assert fades.tolist() == [0.0] * 3 + [math.inf] * 22
        back = batch.seq_suffix_sum(x, decay)[:25]
        assert back[:4].tolist() == [math.inf] * 4 and back[4] == -2 and not back[5:].any()


def test_the_mean_of_equal_numbers_is_that_number(launched):
    batch, x = BatchStatistics(rows_of("offsets", "some")), torch.full((N,), 0.1)
    keep = batch._rows.keep
    for found in (batch.mean(x), batch.seq_mean(x)):
        assert found[keep].eq(x[0]).all()


def test_as_exact_as_steps_of_pytorch():
    """Sums along 3000 rows, in blocks of the usual size."""
    x = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    for decay in (1.0, 0.999):
        found = []
        for primitives in (select.load("triton").rows, None):
            rows = resolve_rows(
                "op", (1, 3000), torch.device("cpu"), torch.float32, {}, primitives=primitives
            )
            found.append(BatchStatistics(rows).seq_cumsum(x, decay).double())
        want = BatchStatistics(rows).seq_cumsum(x.double(), decay)
        ours, steps = [(y - want).abs().max() for y in found]
        assert ours <= steps


@pytest.mark.parametrize("place", PLACES)
def test_into_memory_of_the_caller(launched, place):
    """A row of a table, and nothing beside it."""
    got, exact = both(place, "some")
    masked, table, x = got._rows.masked, torch.empty(3, N), torch.arange(1.0, N + 1)
    for call, want in (
        (lambda into: triton_rows.total(masked, x, "sum", True, into), exact.seq_sum(x.double())),
        (lambda into: triton_rows.total(masked, 2.0, "max", False, into), torch.tensor(2.0)),
        (lambda into: triton_rows.along(masked, 1.0, 1.0, True, into), exact.seq_suffix_sum(1.0)),
    ):
        table.fill_(math.nan)
        assert call(table[1]).data_ptr() == table[1].data_ptr()
        assert torch.equal(table[1], want.float().expand(N)) and table[::2].isnan().all()


def test_gradients_are_pytorchs(launched):
    batch = BatchStatistics(rows_of("offsets", "some"))
    x, decay = values(batch._rows.keep).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    launched.clear()
    for name in (*OVER_CALL, *OF_SEQUENCE, *ALONG):
        assert getattr(batch, name)(x).requires_grad
    assert batch.seq_cumsum(x.detach(), decay).requires_grad
    assert not launched
    with torch.no_grad():
        batch.seq_cumsum(x, decay)
    assert launched == ["along_kernel"]


def test_what_kernels_do_not_take(launched):
    """Integers, fp64, other views, transforms, and rows without sequences."""
    batch = BatchStatistics(rows_of("offsets", "some"))
    x = torch.where(batch._rows.keep, 1.0, 0.0)
    launched.clear()
    assert batch.sum(x.long()) == batch.sum(x.double()) == batch._rows.keep.sum()
    assert batch.seq_cumsum(x, torch.tensor(0.5, device="cpu").requires_grad_()).requires_grad
    torch.func.vmap(batch.seq_sum)(x.expand(2, N))
    torch.func.vmap(batch.seq_cumsum)(x.expand(2, N))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(N))
        for statistic in (batch.sum, batch.seq_cumsum):
            assert forward_ad.unpack_dual(statistic(dual)).tangent is not None
    assert not launched
    # one number for all rows, and rows with gaps
    assert batch.sum(torch.tensor(2.0))[0] == 2 * batch._rows.keep.sum()
    gaps = torch.stack([x, x + 1], 1)[:, 0]
    assert torch.equal(batch.seq_sum(gaps), batch.seq_sum(x))
    flat = BatchStatistics(
        resolve_rows(
            "op", (N,), torch.device("cpu"), torch.float32, {}, primitives=batch._rows.primitives
        )
    )
    assert flat.sum(x)[0] == x.sum()
    for call in (flat.seq_sum, flat.seq_cumsum):
        with pytest.raises(rw.InvalidCall, match="needs sequences"):
            call(x)


@pytest.mark.parametrize("name", ["ctpo", "fipo", "m2po", "trm"])
def test_losses(name):
    """Methods whose weights and bounds read the batch: loss, gradient and metrics."""
    if name in ("ctpo", "m2po"):
        spec = rw.method(name)
    else:
        weight = {"fipo": rw.weights.fipo, "trm": lambda: rw.weights.trm(threshold=0.3)}[name]()
        spec = rw.methods.dapo().with_weight(weight)
    batch, found = make_batch(spec, (3, 5), 13), []
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][-1] = 0
    for backend in ("triton", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, backend=backend, unused="ignore")
        (grad,) = torch.autograd.grad(out.loss, z)
        found.append((out.loss.detach(), grad, out.metrics.sums, out.ratio))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
def test_quantiles(launched, place, mask, q):
    got, exact = both(place, mask)
    x = values(got._rows.keep)
    for name in ("quantile", "quantile_nearest"):
        launched.clear()
        found, want = getattr(got, name)(x, q), getattr(exact, name)(x.double(), q)
        assert launched == ["quantile_kernel"] and found.shape == (N,)
        torch.testing.assert_close(found.double(), want.expand(N), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_a_quantile_at_a_half_and_of_infinite_values(launched, count):
    """A half rounds to the even order statistic. Beside -inf nothing is between."""
    mask = (torch.arange(N) < count).long()
    got, exact = both("equal", mask)
    x = torch.arange(N).float().flip(0)
    x[0], x[1] = math.inf, -math.inf
    for q in (0.0, 0.25, 0.5, 0.75, 1.0):
        for name in ("quantile", "quantile_nearest"):
            found, want = getattr(got, name)(x, q), getattr(exact, name)(x.double(), q)
            torch.testing.assert_close(found.double(), want.expand(N), rtol=1e-6, atol=0)


def test_a_quantile_that_is_a_tensor_or_of_some_rows_is_pytorchs(launched):
    got, exact = both("equal", "some")
    x = values(got._rows.keep)
    launched.clear()
    found = got.quantile(x, torch.tensor(0.3)), got.quantile(x, 0.3, x > 0)
    assert not launched
    wanted = exact.quantile(x.double(), 0.3), exact.quantile(x.double(), 0.3, x > 0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
