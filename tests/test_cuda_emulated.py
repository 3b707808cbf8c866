"""The CUDA kernels, run thread by thread on the CPU: accuracy by the package's criterion, the rules of backends/base.py, every schedule."""

import math

import pytest
import torch
from criterion import assert_gradient, assert_values, gradient_from
from cuda_emulation.fixtures import SCHEDULES, emulated
from kernel_oracle import STATS, clip_loss, gradient, rows, statistics

from reweight_ops.backends import reference
from reweight_ops.backends.base import COEFS, OUT, Head, Program, RowInputs
from reweight_ops.codegen.printer import own_rules, own_weights
from reweight_ops.errors import InvalidCall

ONE = torch.ones(1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = {"plain": (1.0, math.inf), "cold": (0.7, math.inf), "per_row": (None, math.inf), "softcap": (1.3, 15.0)}
CLIP = Program(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])
BONUS = Program(("clip", "entropy_bonus")), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf, 0.05])
#: One step of a thread is 4 vectors, one of a block 320 x 4: from a single column to more than two steps.
WIDTHS = [1, 9, 2563, 11001]


@pytest.fixture(scope="module")
def kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the oracle's tensors are small
    yield emulated()
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(kernels):
    module, native = kernels
    module.set_schedule("random", 1)
    return native


@pytest.fixture(params=SCHEDULES)
def schedule(request, kernels):
    def set_seed(seed):
        kernels[0].set_schedule(request.param, seed)

    set_seed(0)
    return set_seed


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def stats_of(cuda, z, ids, names=STATS, head=None, temperature=ONE):
    return dict(zip(names, cuda.token_stats(z, ids, temperature, head or Head(z.size(-1)), names), strict=True))


def loss_grad(cuda, z, ids, out=None, program=BONUS, head=None, temperature=ONE, seed=0):
    """(rows, gradient) of a clipped loss with an entropy bonus."""
    n = ids.numel()
    inputs = RowInputs(torch.ones(len(program[0].terms), n), None, torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    out = torch.full_like(z, math.nan) if out is None else out
    return cuda.token_loss_grad(z, ids, temperature, head or Head(z.size(-1)), inputs, *program, out), out


def temperature_of(value, n):
    return torch.linspace(0.5, 2.0, n) if value is None else torch.full((1,), value)


KINDS = [("plain", head) for head in HEADS] + [
    ("peaked", "plain"),
    ("peaked", "cold"),
    ("shifted", "plain"),
    ("shifted", "cold"),
    ("low", "plain"),
]


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_statistics_and_gradient(cuda, dtype, head, kind):
    value, softcap = HEADS[head]
    for v in WIDTHS:
        n = 6
        z, ids = rows(n, v, dtype, kind, seed=v)
        t = temperature_of(value, n)
        each = t.expand(n)
        exact = statistics(z.double(), ids, each.double(), softcap)
        single = statistics(z.float(), ids, each, softcap)
        got = stats_of(cuda, z, ids, head=Head(v, softcap), temperature=t)
        for name, ours in got.items():
            assert_values(ours, single[name], exact[name], f"{name} at V = {v}")
        g = torch.Generator().manual_seed(v)
        for names in (("logp",), ("logp", "entropy"), COEFS):
            coefs = {name: torch.randn(n, generator=g) for name in names}
            out = torch.full_like(z, math.nan)
            cuda.token_grad(z, ids, t, Head(v, softcap), got, dict(coefs), out)
            truth = gradient(z.double(), ids, each.double(), coefs, softcap)
            base = gradient_from(z.float(), ids, each, Head(v, softcap), got, coefs)
            assert_gradient(out, base, truth, sum(c.abs() for c in coefs.values()) * 2 / each, ids)


@pytest.mark.parametrize("bonus", [0.0, 0.05])
@pytest.mark.parametrize("head", HEADS)
def test_token_loss_grad(cuda, dtype, head, bonus):
    value, softcap = HEADS[head]
    for v in WIDTHS:
        n = 12
        z, ids = rows(n, v, dtype, "plain", seed=v)
        t = temperature_of(value, n)
        g = torch.Generator().manual_seed(v)
        exact = statistics(z.double(), ids, t.expand(n).double(), softcap)
        old = (exact["logp"] + torch.randn(n, generator=g) * 0.4).float()
        adv, weight = torch.randn(n, generator=g), torch.rand(n, generator=g)
        program = Program(("clip", "entropy_bonus") if bonus else ("clip",))
        params = torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf] + ([bonus] if bonus else []))
        out = torch.full_like(z, math.nan)
        inputs = RowInputs(weight.expand(len(program.terms), n), old, adv)
        got = cuda.token_loss_grad(z, ids, t, Head(v, softcap), inputs, program, params, out)

        def run(dtype, z=z, ids=ids, t=t, softcap=softcap, old=old, adv=adv, weight=weight, n=n):
            stats = statistics(z.to(dtype), ids, t.expand(n).to(dtype), softcap)
            leaves = {k: s.detach().requires_grad_() for k, s in stats.items()}
            total = clip_loss(leaves, old.to(dtype), adv.to(dtype), weight.to(dtype), 0.2, bonus)
            by = torch.autograd.grad(total.sum(), (leaves["logp"], leaves["entropy"]), allow_unused=True)
            coefs = {"logp": by[0], "entropy": torch.zeros_like(total) if by[1] is None else by[1]}
            return stats, total.detach(), coefs, gradient(z.to(dtype), ids, t.expand(n).to(dtype), coefs, softcap)

        stats, total, coefs, truth = run(torch.float64)
        stats32, total32, coefs32, grad32 = run(torch.float32)
        if v > 100:
            assert (coefs["logp"] == 0).any() and (coefs["logp"] != 0).any(), "the clip is on one side only"
        for k, name in enumerate(("logp", "entropy")):
            assert_values(got[k], stats32[name], stats[name], f"{name} at V = {v}")
            assert_values(got[4 + k], coefs32[name], coefs[name], f"coefficient {name} at V = {v}")
        assert_values(got[2], total32, total, "weighted loss")
        assert_values(got[3], total32 / weight, total / weight, "loss")
        assert_gradient(out, grad32, truth, (coefs["logp"].abs() + coefs["entropy"].abs()) / t.expand(n), ids)


PROGRAMS = [(Program((name, "k3"), ((weight, "all"),))) for name, weight in zip(own_rules(), [*own_weights()] * 3, strict=False)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.encode())
def test_every_rule_and_weight(cuda, program):
    """Against the reference's fp32: rows, and gradients of the same coefficients."""
    n, v = 8, 700
    z, ids = rows(n, v, torch.float32, "plain")
    g = torch.Generator().manual_seed(1)
    logp = statistics(z, ids, torch.ones(n))["logp"]
    old, ref, sampling = (logp + 0.3 * torch.randn(n, generator=g) for _ in range(3))
    inputs = RowInputs(torch.rand(2, n, generator=g), old, torch.randn(n, generator=g), ref, sampling)
    rule, weight = own_rules()[program.terms[0]], own_weights()[program.weights[0][0]]

    def values(cls):
        made = cls() if cls.name != "probability_band" else None
        return [0.01, 2.0] if made is None else [float(x) for x in made.parameters().values()]

    try:
        params = torch.tensor([-20.0, 20.0, 1.0, *values(rule), 0.1, 20.0, 10.0, *values(weight)])
    except TypeError:  # a hyper-parameter without default
        params = torch.tensor(
            [-20.0, 20.0, 1.0, *[0.5] * len(rule.parameter_names()), 0.1, 20.0, 10.0, *[0.5] * len(weight.parameter_names())]
        )
    out, want_out = torch.full_like(z, math.nan), torch.full_like(z, math.nan)
    got = cuda.token_loss_grad(z, ids, ONE, Head(v), inputs, program, params, out)
    want = reference.token_loss_grad(z, ids, ONE, Head(v), inputs, program, params, want_out)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(out, want_out, rtol=2e-5, atol=2e-6)
    assert (out != 0).any()


@pytest.mark.parametrize("softcap", [math.inf, 20.0])
def test_minus_infinity_has_no_mass_and_no_gradient(cuda, dtype, softcap):
    v = 3 * 2048 + 70
    z, _ = rows(4, v, dtype, "plain")
    dead = torch.zeros(4, v, dtype=torch.bool)
    dead[0, ::3] = True  # columns
    dead[1, :4096] = True  # all that the first threads see
    dead[2, 2048:6144] = True
    dead[3, 5:] = True  # all but a few
    ids = torch.tensor([1, 5000, 7, 2])
    z[dead] = -math.inf
    head = Head(v, softcap)
    got = stats_of(cuda, z, ids, head=head)
    for i in range(4):
        live = ~dead[i]
        column = live.cumsum(0)[ids[i]] - 1
        truth = statistics(z[i : i + 1, live].double(), column.view(1), ONE.double(), softcap)
        for name in STATS:
            torch.testing.assert_close(got[name][i].double(), truth[name][0], rtol=2e-6, atol=2e-6, msg=f"{name}, row {i}")
    _, grad = loss_grad(cuda, z, ids, head=head)
    assert (grad[dead] == 0).all() and grad.isfinite().all() and (grad != 0).any(1).all()
    out = torch.full_like(z, math.nan)
    cuda.token_grad(z, ids, ONE, head, got, {name: torch.ones(4) for name in COEFS}, out)
    assert (out[dead] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("low", [-1e4, -1e10, -1e30, "lowest"])
def test_masked_by_a_number(cuda, dtype, low):
    """Whoever masks by a number far below all others, even the lowest that there is, gets what -inf gives."""
    low = torch.finfo(dtype).min if low == "lowest" else max(low, torch.finfo(dtype).min)
    v = 9001
    z, _ = rows(3, v, dtype, "plain")
    masked = torch.ones(v, dtype=torch.bool)
    masked[[7, 5000, 8999]] = False  # most threads see nothing else, and some slices
    z[:, masked] = -math.inf
    ids = torch.tensor([7, 5000, 8999])
    want_stats, (want_rows, want) = stats_of(cuda, z, ids), loss_grad(cuda, z, ids)
    assert want_rows.isfinite().all() and want.isfinite().all() and (want != 0).any(1).all()
    z[:, masked] = low
    got_rows, got = loss_grad(cuda, z, ids)
    assert all(torch.equal(value, want_stats[name]) for name, value in stats_of(cuda, z, ids).items())
    assert torch.equal(got_rows, want_rows) and torch.equal(got, want)
    out = torch.full_like(z, math.nan)
    cuda.token_grad(z, ids, ONE, Head(v), want_stats, {name: torch.ones(3) for name in COEFS}, out)
    assert (out[:, masked] == 0).all() and out.isfinite().all()


def test_a_dead_target(cuda):
    """logp is -inf, the loss follows by formula, the other columns get their gradient and the target's is 0."""
    z, ids = rows(1, 300, torch.float32, "plain")
    z[0, ids[0]] = -math.inf
    got, grad = loss_grad(cuda, z, ids, program=(Program(("reinforce",)), torch.tensor([-20.0, 20.0, 1.0])))
    assert got[0] == -math.inf and got[3].isinf() and grad[0, ids[0]] == 0 and grad.isfinite().all()
    torch.testing.assert_close(grad.double(), -got[4, 0].double() * torch.softmax(z.double(), -1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("softcap", [math.inf, 20.0])
@pytest.mark.parametrize("at", [0, 2100, 5002])
def test_a_bad_row_is_nan_and_stays_alone(cuda, dtype, softcap, at):
    z, ids = rows(6, 5003, dtype, "plain")
    head = Head(5003, softcap)
    clean_stats, clean = stats_of(cuda, z, ids, head=head), loss_grad(cuda, z, ids, head=head)
    z[1, at] = math.nan
    z[3, at] = math.inf
    z[4] = -math.inf
    z[5] = -math.inf
    z[5, at] = math.nan
    good, bad = [0, 2], [1, 3, 4, 5]
    stats = stats_of(cuda, z, ids, head=head)
    for name, value in stats.items():
        assert torch.equal(value[good], clean_stats[name][good]) and value[bad].isnan().all(), name
    got, grad = loss_grad(cuda, z, ids, head=head)
    assert torch.equal(grad[good], clean[1][good]) and torch.equal(got[:, good], clean[0][:, good])
    assert grad[bad].isnan().all() and got[0, bad].isnan().all()
    cuda.token_grad(z, ids, ONE, head, stats, {"logp": torch.ones(6)}, grad)
    assert grad[bad].isnan().all() and grad[good].isfinite().all()


def test_rows_that_are_out_or_invalid_are_never_read(cuda, dtype):
    z, ids = rows(5, 777, dtype, "plain")
    clean = loss_grad(cuda, z, ids)
    z[[1, 3]] = math.nan
    ids[1] = OUT
    for bad in (-1, 777, 2**40, -(2**62)):
        ids[3] = bad
        stats = stats_of(cuda, z, ids)
        assert all(value[1] == 0 and value[3].isnan() for value in stats.values())
        got, grad = loss_grad(cuda, z, ids)
        assert (got[:, 1] == 0).all() and got[:, 3].isnan().all() and (grad[[1, 3]] == 0).all()
        assert torch.equal(grad[[0, 2, 4]], clean[1][[0, 2, 4]])
        out = torch.full_like(z, math.nan)
        cuda.token_grad(z, ids, ONE, Head(777), stats, {"logp": torch.ones(5)}, out)
        assert (out[[1, 3]] == 0).all() and not out.isnan().any()


def test_inert_rows_get_exact_zeros(cuda, dtype):
    z, ids = rows(4, 2500, dtype, "plain")
    stats = stats_of(cuda, z, ids)
    out = torch.full_like(z, math.nan)
    stats["lse"][2] = math.nan  # a sweep of row 2 would show
    cuda.token_grad(z, ids, ONE, Head(2500), stats, {"logp": torch.tensor([1.0, 0.0, 0.0, 1.0]), "entropy": None}, out)
    assert (out[1:3] == 0).all() and (out[[0, 3]] != 0).any(1).all()
    inputs = RowInputs(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), stats["logp"] - 1, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    got = cuda.token_loss_grad(z, ids, ONE, Head(2500), inputs, *CLIP, out)
    assert (got[4, :3] == 0).all() and (out[:3] == 0).all() and got[4, 3] != 0 and (out[3] != 0).any()


def test_padding_and_shards(cuda, dtype):
    v, start, total = 700, 500, 2000
    z, _ = rows(4, v + 437, dtype, "plain")
    z[:, v:] = math.nan  # padding is not in the softmax
    ids = torch.tensor([500, 1199, 1200, 3])  # the first two are here
    head = Head(v, vocab_start=start, vocab_total=total)
    got = stats_of(cuda, z, ids, head=head)
    truth = statistics(z[:, :v].double(), (ids - start).clamp(0, v - 1), torch.ones(4, dtype=torch.float64))
    for name in STATS:
        here = slice(0, 2) if name == "logp" else slice(0, 4)
        torch.testing.assert_close(got[name][here].double(), truth[name][here], rtol=2e-6, atol=2e-6)
    assert (got["logp"][2:] == -math.inf).all()
    out = torch.full_like(z, math.nan)
    cuda.token_grad(z, ids, ONE, head, got, {"logp": torch.ones(4)}, out)
    expected = -torch.softmax(z[:, :v].double(), -1)
    expected[[0, 1], [0, 699]] += 1
    unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(out[:, :v].double(), expected, rtol=1.01 * unit, atol=2.0**-22)
    assert (out[:, v:] == 0).all()


def layouts(dtype, n, v):
    """Views with rows of their own strides: padded, unaligned, batched and sliced, transposed, with expanded rows."""
    flat, ids = rows(n, v, dtype, "plain")
    yield "unaligned", torch.empty(n * (v + 3) + 1, dtype=dtype)[1:].view(n, v + 3)[:, :v], flat, ids
    yield "every second row", torch.empty(2 * n, v, dtype=dtype)[::2], flat, ids
    yield "last position dropped", torch.empty(2, n // 2 + 1, v, dtype=dtype)[:, :-1], flat.view(2, n // 2, v), ids
    yield "transposed batch", torch.empty(n // 2, 2, v + 1, dtype=dtype)[..., 1:].transpose(0, 1), flat.view(2, n // 2, v), ids


@pytest.mark.parametrize("v", [1031, 6144])
def test_any_layout_gives_the_same_bits(cuda, dtype, v):
    for name, view, values, ids in layouts(dtype, 6, v):
        view.copy_(values)
        aligned = (
            torch.empty(6, v + 15 & ~15, dtype=dtype)[:, :v].view_as(values)
            if values.dim() == 2
            else torch.empty(*values.shape[:-1], v + 15 & ~15, dtype=dtype)[..., :v]
        )
        aligned.copy_(values)
        assert aligned.data_ptr() % 16 == 0
        want_rows, want = loss_grad(cuda, aligned, ids)
        want_stats = stats_of(cuda, aligned, ids)
        assert all(torch.equal(a, want_stats[k]) for k, a in stats_of(cuda, view, ids).items()), name
        got_rows, got = loss_grad(cuda, view, ids)
        assert torch.equal(got_rows, want_rows) and torch.equal(got, want), name
        rows_in_place, _ = loss_grad(cuda, view, ids, out=view)
        assert torch.equal(rows_in_place, want_rows) and torch.equal(view, want), name


def test_nothing_is_written_around_rows(cuda, dtype):
    n, v = 3, 2563
    values, ids = rows(n, v, dtype, "plain")
    for offset in (0, 1):
        buffer = torch.full((n, v + 64), 7.0, dtype=dtype)
        view = buffer[:, offset + 8 : offset + 8 + v]
        view.copy_(values)
        loss_grad(cuda, view, ids, out=view)
        assert (buffer[:, : offset + 8] == 7).all() and (buffer[:, offset + 8 + v :] == 7).all()


def test_offsets_beyond_two_to_the_31(cuda):
    """Two rows 2^31 + 5 elements apart, in memory that is mapped but for those rows never touched."""
    v, stride = 1000, 2**31 + 5
    far = torch.empty(stride + v, dtype=torch.bfloat16).as_strided((2, v), (stride, 1))
    values, ids = rows(2, v, torch.bfloat16, "plain")
    far.copy_(values)
    assert torch.equal(stats_of(cuda, far, ids)["logp"], stats_of(cuda, values, ids)["logp"])
    _, want = loss_grad(cuda, values, ids)
    loss_grad(cuda, far, ids, out=far)
    assert torch.equal(far, want)


def test_a_row_depends_on_itself_alone(cuda, schedule, dtype):
    """Bitwise: alone, anywhere in a batch, under every schedule, in place or not, whatever statistics are asked for."""
    n, v = 9, 2563  # four or five rows a block
    z, ids = rows(n, v, dtype, "plain")
    t = torch.linspace(0.5, 1.5, n)
    ids[4] = OUT
    want_rows, want = loss_grad(cuda, z, ids, temperature=t)
    want_stats = stats_of(cuda, z, ids, temperature=t)
    assert torch.equal(want_rows[0], want_stats["logp"]), "one pass and the statistics must agree: the on-policy ratio is exactly 1"
    assert torch.equal(want_rows[1], want_stats["entropy"])
    truth = statistics(z.double(), ids.clamp(min=0), t.double())["logp"]
    assert ((want_stats["logp"] - truth).abs() < 1e-4)[ids != OUT].all()
    for seed in range(3):
        schedule(seed)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for name, value in stats_of(cuda, z[order], ids[order], temperature=t[order]).items():
            assert torch.equal(value, want_stats[name][order])
        clone = z.clone()
        got_rows, _ = loss_grad(cuda, clone, ids, out=clone, temperature=t)
        assert torch.equal(clone, want) and torch.equal(got_rows, want_rows)
        out = torch.full_like(z, math.nan)
        coef = {"logp": want_rows[4], "entropy": want_rows[5]}
        cuda.token_grad(z, ids, t, Head(v), want_stats, coef, out)
        again = z[order].clone()
        cuda.token_grad(
            again,
            ids[order],
            t[order],
            Head(v),
            {k: s[order] for k, s in want_stats.items()},
            {k: c[order] for k, c in coef.items()},
            again,
        )
        assert torch.equal(again, out[order]) and not out.isnan().any()
    for names in (("logp",), ("logp", "entropy"), ("lse", "logp")):
        for name, value in stats_of(cuda, z[7:8], ids[7:8], names, temperature=t[7:8]).items():
            assert torch.equal(value, want_stats[name][7:8])


def test_the_target_of_a_sure_row(cuda):
    """1 - p of the given log-prob to the precision of fp32, where the difference from a rounded p would keep a digit or two."""
    v, n = 100, 5
    z = torch.zeros(n, v)
    z[:, 7] = torch.linspace(12, 18, n)
    ids = torch.full((n,), 7)
    stats = stats_of(cuda, z, ids)
    out = torch.empty_like(z)
    cuda.token_grad(z, ids, ONE, Head(v), stats, {"logp": torch.ones(n)}, out)
    truth = -torch.expm1(stats["logp"].double())
    assert ((truth > 0) & (truth < 1e-3)).all()
    torch.testing.assert_close(out[:, 7].double(), truth, rtol=1e-6, atol=0)


def test_no_bias_from_the_rounded_scale(cuda):
    """log2(e)/T in fp32 sharpens every row by the same factor. The mean error of many rows shows what the rounding of each would hide."""
    n, v = 64, 2563
    z, ids = rows(n, v, torch.float32, "plain")
    t = max(
        (torch.tensor([1.0 + k / 64]) for k in range(64)),
        key=lambda t: abs(float(torch.tensor(1.44269504) / t) * float(t) / math.log2(math.e) - 1),
    )
    got = stats_of(cuda, z, ids, temperature=t)
    truth = statistics(z.double(), ids, t.double().expand(n))
    for name in ("logp", "lse"):
        error = got[name].double() - truth[name]
        assert error.mean().abs() <= 4 * error.std() / math.sqrt(n), f"{name}: {error.mean():.3g} ± {error.std() / math.sqrt(n):.3g}"


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 10)])
def test_no_rows(cuda, shape):
    z, ids = torch.empty(shape), torch.empty(math.prod(shape[:-1]), dtype=torch.int64)
    assert stats_of(cuda, z, ids, ("logp",))["logp"].shape == (0,)
    assert loss_grad(cuda, z, ids)[0].shape == (6, 0)


def test_a_long_row(cuda):
    """Qwen's vocabulary, by the criterion."""
    z, ids = rows(2, 151936, torch.bfloat16, "plain")
    exact, single = (statistics(z.to(d), ids, torch.ones(2, dtype=d)) for d in (torch.float64, torch.float32))
    got = stats_of(cuda, z, ids)
    for name in STATS:
        assert_values(got[name], single[name], exact[name], name)


def test_a_status_reaches_the_caller(kernels):
    module, native = kernels
    z, ids = rows(2, 10, torch.float32, "plain")
    module.set_status(700)
    try:
        with pytest.raises(AssertionError, match="status 700"):
            stats_of(native, z, ids)
    finally:
        module.set_status(0)


def test_bad_arguments_do_not_reach_the_kernel(cuda):
    z, ids = rows(4, 60, torch.float32, "plain")
    for message, call in {
        "the last dimension": lambda: stats_of(cuda, z.T, torch.zeros(60, dtype=torch.int64)),
        "ids is": lambda: stats_of(cuda, z, ids[:3]),
        "vocab_size is 61": lambda: stats_of(cuda, z, ids, head=Head(61)),
        "overwrite each other": lambda: loss_grad(cuda, z[:1].expand(4, 60), ids, out=z[:1].expand(4, 60)),
    }.items():
        with pytest.raises(InvalidCall, match=message):
            call()
