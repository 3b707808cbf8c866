"""The CPU kernels where inputs are unusual: infinities, NaN, layouts, shards, threads; and what the Python layer refuses."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_oracle import STATS, gradient, rows, statistics

import reweight_ops as rw
from reweight_ops.backends.base import OUT, Head, Program, Request, RowInputs
from reweight_ops.errors import InvalidCall

cpu = pytest.importorskip("reweight_ops.backends.cpu", exc_type=ImportError)
_C = cpu._C

ONE = torch.ones(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLIP = Program(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])
BONUS = Program(("clip", "entropy_bonus")), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf, 0.05])


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


def loss_grad(z, ids, out=None, program=BONUS, head=None, temperature=ONE, seed=0):
    """(rows, gradient) of a clipped loss with an entropy bonus."""
    g = torch.Generator().manual_seed(seed)
    n = ids.numel()
    inputs = RowInputs(torch.ones(len(program[0].terms), n), None, torch.randn(n, generator=g))
    out = torch.full_like(z, math.nan) if out is None else out
    got = cpu.token_loss_grad(z, ids, temperature, head or Head(z.size(-1)), inputs, *program, out)
    return got, out


def stats_of(z, ids, names=STATS, head=None, temperature=ONE):
    return dict(zip(names, cpu.token_stats(z, ids, temperature, head or Head(z.size(-1)), names), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [math.inf, 20.0])
def test_minus_infinity_has_no_mass_and_no_gradient(level, dtype, softcap):
    v = 3 * 2048 + 70
    z, ids = rows(4, v, dtype, "plain")
    dead = torch.zeros(4, v, dtype=torch.bool)
    dead[0, ::3] = True  # columns
    dead[1, :4096] = True  # the first tiles, whole
    dead[2, 2048:6144] = True  # tiles in the middle
    dead[3, 5:] = True  # all but a few
    ids = torch.tensor([1, 5000, 7, 2])
    z[dead] = -math.inf
    head = Head(v, softcap)
    got = stats_of(z, ids, head=head)
    for i in range(4):
        live = ~dead[i]
        column = live.cumsum(0)[ids[i]] - 1
        truth = statistics(z[i : i + 1, live].double(), column.view(1), ONE.double(), softcap)
        for name in STATS:
            torch.testing.assert_close(got[name][i].double(), truth[name][0], rtol=2e-6, atol=2e-6, msg=f"{name}, row {i}")
    _, grad = loss_grad(z, ids, head=head)
    assert (grad[dead] == 0).all() and grad.isfinite().all() and (grad != 0).any(1).all()
    coefs = {name: torch.ones(4) for name in ("logp", "entropy", "lse", "log_sum_p_sq")}
    out = torch.full_like(z, math.nan)
    cpu.token_grad(z, ids, ONE, head, got, coefs, out)
    assert (out[dead] == 0).all() and out.isfinite().all()


def test_a_dead_target(level):
    """logp is -inf, the loss follows by formula, the other columns get their gradient and the target's is 0."""
    z, ids = rows(1, 300, torch.float32, "plain")
    z[0, ids[0]] = -math.inf
    program = Program(("reinforce",)), torch.tensor([-20.0, 20.0, 1.0])
    got, grad = loss_grad(z, ids, program=program)
    assert got[0] == -math.inf and got[3].isinf() and grad[0, ids[0]] == 0 and grad.isfinite().all()
    coef = got[4, 0].double()
    p = torch.softmax(z.double(), -1)
    torch.testing.assert_close(grad.double(), -coef * p, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [math.inf, 20.0])
@pytest.mark.parametrize("at", [0, 1, 2100, 5002])
def test_a_bad_row_is_nan_and_stays_alone(level, dtype, softcap, at):
    z, ids = rows(6, 5003, dtype, "plain")
    head = Head(5003, softcap)
    clean_stats, clean = stats_of(z, ids, head=head), loss_grad(z, ids, head=head)
    z[1, at] = math.nan
    z[3, at] = math.inf
    z[4] = -math.inf
    z[5] = -math.inf
    z[5, at] = math.nan
    good, bad = [0, 2], [1, 3, 4, 5]
    for name, value in stats_of(z, ids, head=head).items():
        assert torch.equal(value[good], clean_stats[name][good])
        assert value[bad].isnan().all(), name
    got, grad = loss_grad(z, ids, head=head)
    assert torch.equal(grad[good], clean[1][good]) and torch.equal(got[:, good], clean[0][:, good])
    assert grad[bad].isnan().all() and got[0, bad].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_out_are_never_read(level, dtype):
    z, ids = rows(5, 777, dtype, "plain")
    clean = loss_grad(z, ids)
    z[1] = math.nan
    ids[1] = OUT
    for name, value in stats_of(z, ids).items():
        assert value[1] == 0, name
    got, grad = loss_grad(z, ids)
    keep = [0, 2, 3, 4]
    assert (got[:, 1] == 0).all() and (grad[1] == 0).all()
    assert torch.equal(grad[keep], clean[1][keep])
    out = torch.full_like(z, math.nan)
    cpu.token_grad(z, ids, ONE, Head(777), stats_of(z, ids), {"logp": torch.ones(5)}, out)
    assert (out[1] == 0).all() and not out.isnan().any()


def test_an_id_outside_the_vocabulary(level):
    for bad in (-1, 777, 2**40, -(2**62)):
        z, ids = rows(3, 777, torch.float32, "plain")
        ids[1] = bad
        assert all(value[1].isnan() and not value[0].isnan() for value in stats_of(z, ids).values())
        got, grad = loss_grad(z, ids)
        assert got[:, 1].isnan().all() and (grad[1] == 0).all() and not grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inert_rows_get_zeros_and_are_not_swept(level, dtype):
    """A zero coefficient in both verbs: exact zeros, even where a sweep would find something to multiply."""
    z, ids = rows(4, 2500, dtype, "plain")
    out = torch.full_like(z, math.nan)
    stats = stats_of(z, ids)
    stats["lse"][2] = math.nan  # a sweep of row 2 would show
    cpu.token_grad(z, ids, ONE, Head(2500), stats, {"logp": torch.tensor([1.0, 0.0, 0.0, 1.0]), "entropy": None}, out)
    assert (out[1:3] == 0).all() and (out[[0, 3]] != 0).any(1).all()
    inputs = RowInputs(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), stats["logp"] - 1, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    got = cpu.token_loss_grad(z, ids, ONE, Head(2500), inputs, *CLIP, out)
    # rows 0 and 2: ratio e > 1.2 and a positive advantage, clipped; row 1: no weight; row 3: not clipped
    assert (got[4, :3] == 0).all() and (out[:3] == 0).all() and got[4, 3] != 0 and (out[3] != 0).any()


def test_a_zero_weight_selects_zero(level):
    """Never 0 * inf: a term without weight may overflow."""
    z, ids = rows(2, 100, torch.float32, "plain")
    inputs = RowInputs(torch.tensor([[0.0, 1.0]]), torch.tensor([-1e30, -2.0]), torch.tensor([math.inf, 1.0]))
    params = torch.tensor([-math.inf, math.inf, 1.0, 0.2, 0.2, math.inf])
    out = torch.full_like(z, math.nan)
    got = cpu.token_loss_grad(z, ids, ONE, Head(100), inputs, CLIP[0], params, out)
    assert (got[2:, 0] == 0).all() and (out[0] == 0).all() and got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_shards(level, dtype):
    v, start, total = 700, 500, 2000
    z, _ = rows(4, v + 37, dtype, "plain")
    z[:, v:] = math.nan  # padding is not in the softmax
    ids = torch.tensor([500, 1199, 1200, 3])  # the first two are here
    head = Head(v, vocab_start=start, vocab_total=total)
    got = stats_of(z, ids, head=head)
    truth = statistics(z[:, :v].double(), (ids - start).clamp(0, v - 1), torch.ones(4, dtype=torch.float64))
    for name in STATS:
        here = slice(0, 2) if name == "logp" else slice(0, 4)
        torch.testing.assert_close(got[name][here].double(), truth[name][here], rtol=2e-6, atol=2e-6)
    assert (got["logp"][2:] == -math.inf).all()
    out = torch.full_like(z, math.nan)
    cpu.token_grad(z, ids, ONE, head, got, {"logp": torch.ones(4)}, out)
    p = torch.softmax(z[:, :v].double(), -1)
    expected = -p
    expected[[0, 1], [0, 699]] += 1
    atol = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(out[:, :v].double(), expected, rtol=0, atol=atol)
    assert (out[:, v:] == 0).all()


def layouts(dtype, n, v):
    """Views with rows of their own strides: padded, unaligned, batched and sliced, transposed, with expanded rows."""
    flat, ids = rows(n, v, dtype, "plain")
    yield "unaligned", torch.empty(n * (v + 3) + 1, dtype=dtype)[1:].view(n, v + 3)[:, :v], flat, ids
    yield "every second row", torch.empty(2 * n, v, dtype=dtype)[::2], flat, ids
    yield "last position dropped", torch.empty(2, n // 2 + 1, v, dtype=dtype)[:, :-1], flat.view(2, n // 2, v), ids
    yield "transposed batch", torch.empty(n // 2, 2, v + 1, dtype=dtype)[..., 1:].transpose(0, 1), flat.view(2, n // 2, v), ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(level, dtype):
    for name, view, values, ids in layouts(dtype, 6, 1031):
        view.copy_(values)
        want_rows, want = loss_grad(values.contiguous(), ids)
        want_stats = stats_of(values.contiguous(), ids)
        assert all(torch.equal(a, want_stats[k]) for k, a in stats_of(view, ids).items()), name
        got_rows, got = loss_grad(view, ids)
        assert torch.equal(got_rows, want_rows) and torch.equal(got, want), name
        rows_in_place, _ = loss_grad(view, ids, out=view)
        assert torch.equal(rows_in_place, want_rows) and torch.equal(view, want), name


def test_offsets_beyond_two_to_the_31():
    """Two rows 2^31 + 5 elements apart, in memory that is mapped but for those rows never touched."""
    v, stride = 1000, 2**31 + 5
    buffer = torch.empty(stride + v, dtype=torch.bfloat16)
    far = buffer.as_strided((2, v), (stride, 1))
    values, ids = rows(2, v, torch.bfloat16, "plain")
    far.copy_(values)
    assert torch.equal(stats_of(far, ids)["logp"], stats_of(values, ids)["logp"])
    _, want = loss_grad(values, ids)
    loss_grad(far, ids, out=far)
    assert torch.equal(far, want)


def test_expanded_logits_are_read_but_never_written():
    z, ids = rows(1, 50, torch.float32, "plain")
    wide = z.expand(4, 50)
    assert (stats_of(wide, ids.expand(4).contiguous())["logp"] == stats_of(z, ids)["logp"]).all()
    with pytest.raises(InvalidCall, match="overwrite each other"):
        loss_grad(wide, ids.expand(4).contiguous(), out=wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(level, dtype, threads):
    """Bitwise: alone, anywhere in a batch, with any number of threads, in place or not, whatever statistics are asked for."""
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
    assert torch.equal(want_rows[0], want_stats["logp"]), "one pass and the statistics must agree: the on-policy ratio is exactly 1"
    for names in (("logp",), ("logp", "entropy"), ("lse", "logp")):
        for name, value in stats_of(z[7:8], ids[7:8], names, temperature=t[7:8]).items():
            assert torch.equal(value, want_stats[name][7:8])


def test_several_threads_at_once(threads):
    """The GIL is released, so calls from Python threads overlap; each has to come out as if alone."""
    threads(2)
    batches = [rows(40, 5003, torch.bfloat16, "plain", seed=k) for k in range(4)]
    want = [loss_grad(z, ids) for z, ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for (got_rows, got), (want_rows, want_grad) in zip(pool.map(lambda b: loss_grad(*b), batches), want, strict=True):
                assert torch.equal(got_rows, want_rows) and torch.equal(got, want_grad)


def test_large_outputs_of_their_own_are_the_same_bits(level):
    """From 8 MiB on, a new gradient is streamed past the caches; aligned or not, it holds the same as one written in place."""
    z, ids = rows(40, 65600, torch.float32, "plain")
    assert z.numel() * 4 > 8 << 20
    for columns in (65600, 65599):
        inside = z[:, :columns].clone()
        ids = ids.clamp(max=columns - 1)
        for program in (CLIP, BONUS):
            _, fresh = loss_grad(z[:, :columns], ids, program=program, out=torch.full((40, columns), math.nan))
            own = inside.clone()
            loss_grad(own, ids, program=program, out=own)
            assert torch.equal(fresh, own)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 10)])
def test_no_rows(shape):
    z, ids = torch.empty(shape), torch.empty(math.prod(shape[:-1]), dtype=torch.int64)
    assert cpu.token_stats(z, ids, ONE, Head(10), ("logp",)).shape == (1, 0)
    assert loss_grad(z, ids)[0].shape == (6, 0)


def test_gradients_keep_their_sign_and_order():
    """A check that needs no oracle: gradients of logp sum to 0 over a row, and only the target's is positive."""
    z, ids = rows(9, 4000, torch.float32, "plain")
    out = torch.empty_like(z)
    cpu.token_grad(z, ids, ONE, Head(4000), stats_of(z, ids), {"logp": torch.ones(9)}, out)
    assert out.sum(1).abs().max() < 1e-5
    assert (out.argmax(1) == ids).all() and ((out > 0).sum(1) == 1).all()
    truth = gradient(z.double(), ids, torch.ones(9, dtype=torch.float64), {"logp": torch.ones(9)})
    assert torch.equal(out.argsort(1)[:, :5], truth.argsort(1)[:, :5])


def request(verb="token_stats", device="cpu", dtype=torch.float32, program=None):
    return Request(verb, torch.device(device), dtype, program)


def test_what_the_backend_does_not_serve():
    reason = cpu.BACKEND.unsupported_reason
    assert reason(request()) is None and reason(request("token_loss_grad", program=CLIP[0])) is None
    assert "fp32, bf16 or fp16" in reason(request(dtype=torch.float64))
    assert "CPU" in reason(request(device="cuda"))
    assert "at most 4 terms" in reason(request("token_loss_grad", program=Program(("clip",) * 5)))

    @rw.rule
    class OnlyInThisTest(rw.Rule):
        def loss(self, xp, t):
            return -t.logp

    try:
        assert "not compiled in" in reason(request("token_loss_grad", program=Program(("only_in_this_test",))))
    finally:
        del rw.rules.RULES["only_in_this_test"]


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
        "vocab_size is 61": lambda: stats_of(z, ids, head=Head(61)),
        "logits is": lambda: stats_of(z.double(), ids),
        "out is": lambda: loss_grad(z, ids, out=torch.empty(4, 61)),
        "out is ": lambda: loss_grad(z, ids, out=torch.empty(4, 60, dtype=torch.bfloat16)),
        "overlaps": lambda: overlap(ids),
        "coefficient logp": lambda: cpu.token_grad(z, ids, ONE, Head(60), good, {"logp": torch.ones(3)}, torch.empty_like(z)),
        "'entropy' is needed": lambda: cpu.token_grad(
            z, ids, ONE, Head(60), {"logp": good["logp"], "lse": good["lse"]}, {**one, "entropy": one["logp"]}, z
        ),
        "params is": lambda: loss_grad(z, ids, program=(CLIP[0], CLIP[1][:-1])),
        "adv is": lambda: cpu.token_loss_grad(
            z, ids, ONE, Head(60), RowInputs(torch.ones(1, 4), None, torch.ones(5)), *CLIP, torch.empty_like(z)
        ),
        "row weights are": lambda: cpu.token_loss_grad(z, ids, ONE, Head(60), RowInputs(torch.ones(2, 4)), *CLIP, torch.empty_like(z)),
    }
    for message, call in cases.items():
        with pytest.raises(InvalidCall, match=message.strip()):
            call()


def overlap(ids):
    buffer = torch.randn(5, 60)
    return loss_grad(buffer[:4], ids, out=buffer[1:])


def test_levels():
    info = _C.build_info()
    assert set(info["supported_levels"]) <= set(info["levels"]) and _C.level() == info["supported_levels"][-1]
    with pytest.raises(ValueError, match="not built"):
        _C.set_level("v9")
    missing = [name for name in info["levels"] if name not in info["supported_levels"]]
    if missing:
        with pytest.raises(ValueError, match="lacks"):
            _C.set_level(missing[0])
    assert info["version"] == rw.__version__ and info["compiler"] and info["flags"]
