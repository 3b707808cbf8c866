"""The CPU kernels on unusual inputs: infinities, NaN, layouts, shards, threads; and
what the Python layer refuses.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import contract
import pytest
import torch
from contract import BONUS, CLIP, ONE
from kernel_oracle import rows

import reweight_ops as rw
from reweight_ops._core.backends.base import Request, RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops.errors import InvalidCall

cpu = pytest.importorskip("reweight_ops._core.backends.cpu", exc_type=ImportError)
_C, cpu = cpu._C, cpu.BACKEND

DTYPES = list(contract.DTYPES.values())


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def loss_grad(*args, **keywords):
    return contract.loss_grad(cpu, *args, **keywords)


def stats_of(*args, **keywords):
    return contract.stats_of(cpu, *args, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [math.inf, 20.0])
def test_minus_infinity_has_no_mass_and_no_gradient(level, dtype, softcap):
    contract.check_minus_infinity(cpu, dtype, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-1e4, -1e10, -1e30, "lowest"])
def test_masked_by_a_number(level, dtype, low):
    contract.check_masked_by_a_number(cpu, dtype, low)


def test_a_masked_target(level):
    contract.check_a_masked_target(cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [math.inf, 20.0])
@pytest.mark.parametrize("at", [0, 1, 2100, 5002])
def test_a_bad_row_is_nan_and_stays_alone(level, dtype, softcap, at):
    contract.check_a_bad_row(cpu, dtype, softcap, at)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_or_invalid_are_never_read(level, dtype):
    contract.check_ignored_rows_or_invalid(cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_gradient_rows_get_exact_zeros(level, dtype):
    contract.check_zero_gradient_rows(cpu, dtype)


def test_a_zero_weight_selects_zero(level):
    """Never 0 * inf: a term without weight may overflow."""
    z, ids = rows(2, 100, torch.float32, "plain")
    inputs = RowInputs(
        torch.tensor([[0.0, 1.0]]), torch.tensor([-1e30, -2.0]), torch.tensor([math.inf, 1.0])
    )
    params = torch.tensor([-math.inf, math.inf, 1.0, 0.2, 0.2, math.inf])
    out = torch.full_like(z, math.nan)
    got = cpu.token_loss_grad(z, ids, ONE, SoftmaxParams(100), inputs, CLIP[0], params, out)
    assert (got[2:, 0] == 0).all() and (out[0] == 0).all() and got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_shards(level, dtype):
    contract.check_padding_and_shards(cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1031, 6144])
def test_any_layout_gives_the_same_bits(level, dtype, v):
    contract.check_layouts(cpu, dtype, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_around_rows(level, dtype):
    contract.check_nothing_is_written_around_rows(cpu, dtype)


def test_offsets_beyond_two_to_the_31():
    contract.check_offsets_beyond_two_to_the_31(cpu)


def test_expanded_logits_are_read_but_never_written():
    z, ids = rows(1, 50, torch.float32, "plain")
    wide = z.expand(4, 50)
    assert (stats_of(wide, ids.expand(4).contiguous())["logp"] == stats_of(z, ids)["logp"]).all()
    with pytest.raises(InvalidCall, match="overwrite each other"):
        loss_grad(wide, ids.expand(4).contiguous(), out=wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(level, dtype, threads):
    """A row has the same bits alone, anywhere in a batch, with any number of threads,
    in place or not, for any statistics.
    """
    n, v = 48, 5003
    z, ids = rows(n, v, dtype, "plain")
    t = torch.linspace(0.5, 1.5, n)
    threads(1)
    want_rows, want = loss_grad(z, ids, temperature=t)
    want_stats = stats_of(z, ids, temperature=t)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for count in (2, 3):
        threads(count)
        got_rows, got = loss_grad(z, ids, temperature=t)
        assert torch.equal(got_rows, want_rows) and torch.equal(got, want)
        shuffled = stats_of(z[order], ids[order], temperature=t[order])
        assert all(torch.equal(value, want_stats[name][order]) for name, value in shuffled.items())
        clone = z.clone()
        loss_grad(clone, ids, out=clone, temperature=t)
        assert torch.equal(clone, want)
    assert torch.equal(want_rows[0], want_stats["logp"]), (
        "one pass and the statistics must agree: the on-policy ratio is exactly 1"
    )
    for names in (("logp",), ("logp", "entropy"), ("lse", "logp")):
        for name, value in stats_of(z[7:8], ids[7:8], names, temperature=t[7:8]).items():
            assert torch.equal(value, want_stats[name][7:8])


def test_several_threads_at_once(threads):
    """The GIL is released, so that calls from Python threads overlap; each result must
    be as if alone.
    """
    threads(2)
    batches = [rows(40, 5003, torch.bfloat16, "plain", seed=k) for k in range(4)]
    want = [loss_grad(z, ids) for z, ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for (got_rows, got), (want_rows, want_grad) in zip(
                pool.map(lambda b: loss_grad(*b), batches), want, strict=True
            ):
                assert torch.equal(got_rows, want_rows) and torch.equal(got, want_grad)


def test_large_outputs_of_their_own_are_the_same_bits(level):
    """From 8 MiB on, a new gradient is streamed past the caches. Aligned or not, it
    equals one written in place.
    """
    z, ids = rows(40, 65600, torch.float32, "plain")
    assert z.numel() * 4 > 8 << 20
    for columns in (65600, 65599):
        inside = z[:, :columns].clone()
        ids = ids.clamp(max=columns - 1)
        for program in (CLIP, BONUS):
            _, fresh = loss_grad(
                z[:, :columns], ids, program=program, out=torch.full((40, columns), math.nan)
            )
            own = inside.clone()
            loss_grad(own, ids, program=program, out=own)
            assert torch.equal(fresh, own)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 10)])
def test_no_rows(shape):
    contract.check_no_rows(cpu, shape)


def request(primitive="token_stats", device="cpu", dtype=torch.float32, program=None):
    return Request(primitive, torch.device(device), dtype, program)


def test_what_the_backend_does_not_serve():
    reason = cpu.unsupported_reason
    assert reason(request()) is None and reason(request("token_loss_grad", program=CLIP[0])) is None
    assert "fp32, bf16 or fp16" in reason(request(dtype=torch.float64))
    assert "CPU" in reason(request(device="cuda"))
    assert reason(request("token_loss_grad", program=Program.of(("clip",) * 9))) is None
    huge = Program.of(("clip",) * 1000)
    assert "registers, one pass holds 4096" in reason(request("token_loss_grad", program=huge))


def test_bad_arguments_do_not_reach_the_kernel():
    z, ids = rows(4, 60, torch.float32, "plain")
    good = stats_of(z, ids)
    one = {"logp": torch.ones(4)}
    cases = {
        "the last dimension": lambda: stats_of(z.T, torch.zeros(60, dtype=torch.int64)),
        "ids is": lambda: stats_of(z, ids.int()),
        "ids is ": lambda: stats_of(z, ids[:3]),
        "temperature is": lambda: stats_of(z, ids, temperature=torch.ones(3)),
        "temperature is ": lambda: stats_of(z, ids, temperature=torch.ones(1).double()),
        "vocab_size is 61": lambda: stats_of(z, ids, softmax=SoftmaxParams(61)),
        "logits is": lambda: stats_of(z.double(), ids),
        "out is": lambda: loss_grad(z, ids, out=torch.empty(4, 61)),
        "out is ": lambda: loss_grad(z, ids, out=torch.empty(4, 60, dtype=torch.bfloat16)),
        "overlaps": lambda: overlap(ids),
        "coefficient logp": lambda: cpu.token_grad(
            z, ids, ONE, SoftmaxParams(60), good, {"logp": torch.ones(3)}, torch.empty_like(z)
        ),
        "'entropy' is needed": lambda: cpu.token_grad(
            z,
            ids,
            ONE,
            SoftmaxParams(60),
            {"logp": good["logp"], "lse": good["lse"]},
            {**one, "entropy": one["logp"]},
            z,
        ),
        "params is": lambda: loss_grad(z, ids, program=(CLIP[0], CLIP[1][:-1])),
        "adv is": lambda: cpu.token_loss_grad(
            z,
            ids,
            ONE,
            SoftmaxParams(60),
            RowInputs(torch.ones(1, 4), None, torch.ones(5)),
            *CLIP,
            torch.empty_like(z),
        ),
        "row weights are": lambda: cpu.token_loss_grad(
            z, ids, ONE, SoftmaxParams(60), RowInputs(torch.ones(2, 4)), *CLIP, torch.empty_like(z)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(InvalidCall, match=message.strip()):
            call()


def overlap(ids):
    buffer = torch.randn(5, 60)
    return loss_grad(buffer[:4], ids, out=buffer[1:])


def test_levels():
    info = _C.build_info()
    assert (
        set(info["supported_levels"]) <= set(info["levels"])
        and _C.level() == info["supported_levels"][-1]
    )
    with pytest.raises(ValueError, match="not built"):
        _C.set_level("v9")
    missing = [name for name in info["levels"] if name not in info["supported_levels"]]
    if missing:
        with pytest.raises(ValueError, match="lacks"):
            _C.set_level(missing[0])
    assert info["version"] == rw.__version__ and info["compiler"] and info["flags"]
