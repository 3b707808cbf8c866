"""The rules of reweight_ops/_core/backends/base.py, as checks of three primitives.

All compiled backends share these checks. Each backend says with which instruction sets,
dtypes, threads or schedules it runs them. ``primitives`` has ``token_stats``,
``token_grad`` and ``token_loss_grad`` on CPU tensors.
"""

from __future__ import annotations

import math

import torch
from criterion import assert_gradient, assert_values
from kernel_oracle import STATS, clip_loss, gradient, rows, statistics

from reweight_ops._core.backends.base import DERIVATIVES, RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX

ONE = torch.ones(1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: (temperature, softcap). None as temperature means one per row.
SOFTMAXES = {
    "plain": (1.0, math.inf),
    "cold": (0.7, math.inf),
    "per_row": (None, math.inf),
    "softcap": (1.3, 15.0),
}
#: Kinds of rows of :func:`kernel_oracle.rows`, with heads.
KINDS = (
    [("plain", softmax) for softmax in SOFTMAXES]
    + [(kind, softmax) for kind in ("peaked", "shifted") for softmax in ("plain", "cold")]
    + [("low", "plain")]
)
CLIP = Program.of(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])
BONUS = (
    Program.of(("clip", "entropy_bonus")),
    torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf, 0.05]),
)


def temperature_of(value, n):
    return torch.linspace(0.5, 2.0, n) if value is None else torch.full((1,), value)


def stats_of(primitives, z, ids, names=(*STATS, "lse_low"), softmax=None, temperature=ONE):
    return dict(
        zip(
            names,
            primitives.token_stats(
                z, ids, temperature, softmax or SoftmaxParams(z.size(-1)), names
            ),
            strict=True,
        )
    )


def grad_of(primitives, z, ids, stats, derivatives, softmax=None, temperature=ONE, out=None):
    out = torch.full_like(z, math.nan) if out is None else out
    primitives.token_grad(
        z, ids, temperature, softmax or SoftmaxParams(z.size(-1)), stats, dict(derivatives), out
    )
    return out


def loss_grad(primitives, z, ids, out=None, program=BONUS, softmax=None, temperature=ONE, seed=0):
    """(rows, gradient) of a clipped loss with an entropy bonus."""
    n = ids.numel()
    inputs = RowInputs(
        torch.ones(len(program[0].terms), n),
        None,
        torch.randn(n, generator=torch.Generator().manual_seed(seed)),
    )
    out = torch.full_like(z, math.nan) if out is None else out
    return primitives.token_loss_grad(
        z, ids, temperature, softmax or SoftmaxParams(z.size(-1)), inputs, *program, out
    ), out


# --- accuracy, by the package's criterion ---------------------------------------------


def check_statistics_and_gradient(primitives, dtype, n, v, softmax, kind):
    value, softcap = SOFTMAXES[softmax]
    z, ids = rows(n, v, dtype, kind, seed=v)
    t = temperature_of(value, n)
    each, softmax = t.expand(n), SoftmaxParams(v, softcap)
    exact = statistics(z.double(), ids, each.double(), softcap)
    single = statistics(z.float(), ids, each, softcap)
    got = stats_of(primitives, z, ids, softmax=softmax, temperature=t)
    for name in STATS:
        assert_values(got[name], single[name], exact[name], f"{name} at V = {v}")
    # the two numbers of the log-sum-exp are as exact as its distance from the largest
    # logit
    if softcap == math.inf:
        largest = z.double().amax(-1) / each.double()
        assert_values(
            largest - got["lse"].double() - got["lse_low"].double(),
            single["max_logp"],
            exact["max_logp"],
            f"lse_low at V = {v}",
        )
    g = torch.Generator().manual_seed(v)
    for names in (("logp",), ("logp", "entropy"), DERIVATIVES):
        derivatives = {name: torch.randn(n, generator=g) for name in names}
        out = grad_of(primitives, z, ids, got, derivatives, softmax, t)
        truth = gradient(z.double(), ids, each.double(), derivatives, softcap)
        base = gradient(z.float(), ids, each, derivatives, softcap)
        assert_gradient(
            out, base, truth, sum(c.abs() for c in derivatives.values()) * 2 / each, ids
        )


def check_token_loss_grad(primitives, dtype, n, v, softmax, bonus):
    value, softcap = SOFTMAXES[softmax]
    z, ids = rows(n, v, dtype, "plain", seed=v)
    t = temperature_of(value, n)
    g = torch.Generator().manual_seed(v)
    exact = statistics(z.double(), ids, t.expand(n).double(), softcap)
    old = (exact["logp"] + torch.randn(n, generator=g) * 0.4).float()
    adv, weight = torch.randn(n, generator=g), torch.rand(n, generator=g)
    program = Program.of(("clip", "entropy_bonus") if bonus else ("clip",))
    params = torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf] + ([bonus] if bonus else []))
    out = torch.full_like(z, math.nan)
    inputs = RowInputs(weight.expand(len(program.terms), n), old, adv)
    got = primitives.token_loss_grad(
        z, ids, t, SoftmaxParams(v, softcap), inputs, program, params, out
    )

    def run(dtype):
        stats = statistics(z.to(dtype), ids, t.expand(n).to(dtype), softcap)
        leaves = {k: s.detach().requires_grad_() for k, s in stats.items()}
        total = clip_loss(leaves, old.to(dtype), adv.to(dtype), weight.to(dtype), 0.2, bonus)
        by = torch.autograd.grad(
            total.sum(), (leaves["logp"], leaves["entropy"]), allow_unused=True
        )
        derivatives = {
            "logp": by[0],
            "entropy": torch.zeros_like(total) if by[1] is None else by[1],
        }
        return (
            stats,
            total.detach(),
            derivatives,
            gradient(z.to(dtype), ids, t.expand(n).to(dtype), derivatives, softcap),
        )

    stats, total, derivatives, truth = run(torch.float64)
    stats32, total32, derivatives32, grad32 = run(torch.float32)
    if v > 100:
        assert (derivatives["logp"] == 0).any() and (derivatives["logp"] != 0).any(), (
            "the clip is on one side only"
        )
    for k, name in enumerate(("logp", "entropy")):
        assert_values(got[k], stats32[name], stats[name], f"{name} at V = {v}")
        assert_values(
            got[4 + k], derivatives32[name], derivatives[name], f"coefficient {name} at V = {v}"
        )
    assert_values(got[2], total32, total, "weighted loss")
    assert_values(got[3], total32 / weight, total / weight, "loss")
    assert_gradient(
        out,
        grad32,
        truth,
        (derivatives["logp"].abs() + derivatives["entropy"].abs()) / t.expand(n),
        ids,
    )


# --- infinities, NaN, and ignored rows ------------------------------------------------


def check_minus_infinity(primitives, dtype, softcap):
    """Check that -inf has no mass and no gradient: in single columns, whole tiles, the
    first tiles, and all but a few columns.
    """
    v = 3 * 2048 + 70
    z, _ = rows(4, v, dtype, "plain")
    masked = torch.zeros(4, v, dtype=torch.bool)
    masked[0, ::3] = masked[1, :4096] = masked[2, 2048:6144] = masked[3, 5:] = True
    ids = torch.tensor([1, 5000, 7, 2])
    z[masked] = -math.inf
    softmax = SoftmaxParams(v, softcap)
    got = stats_of(primitives, z, ids, softmax=softmax)
    for i in range(4):
        unmasked = ~masked[i]
        column = unmasked.cumsum(0)[ids[i]] - 1
        truth = statistics(z[i : i + 1, unmasked].double(), column.view(1), ONE.double(), softcap)
        for name in STATS:
            torch.testing.assert_close(
                got[name][i].double(), truth[name][0], rtol=2e-6, atol=2e-6, msg=f"{name}, row {i}"
            )
    _, grad = loss_grad(primitives, z, ids, softmax=softmax)
    assert (grad[masked] == 0).all() and grad.isfinite().all() and (grad != 0).any(1).all()
    grad = grad_of(primitives, z, ids, got, {name: torch.ones(4) for name in DERIVATIVES}, softmax)
    assert (grad[masked] == 0).all() and grad.isfinite().all()


def check_masked_by_a_number(primitives, dtype, low):
    """A mask by a number far below all others, even the lowest finite one, gives the
    results of -inf.
    """
    low = torch.finfo(dtype).min if low == "lowest" else max(low, torch.finfo(dtype).min)
    v = 9001
    z, _ = rows(3, v, dtype, "plain")
    masked = torch.ones(v, dtype=torch.bool)
    masked[[7, 5000, 8999]] = False  # most threads see nothing else, and some slices
    z[:, masked] = -math.inf
    ids = torch.tensor([7, 5000, 8999])
    want_stats, (want_rows, want) = stats_of(primitives, z, ids), loss_grad(primitives, z, ids)
    assert want_rows.isfinite().all() and want.isfinite().all() and (want != 0).any(1).all()
    z[:, masked] = low
    got_rows, got = loss_grad(primitives, z, ids)
    assert all(
        torch.equal(value, want_stats[name]) for name, value in stats_of(primitives, z, ids).items()
    )
    assert torch.equal(got_rows, want_rows) and torch.equal(got, want)
    out = grad_of(primitives, z, ids, want_stats, {name: torch.ones(3) for name in DERIVATIVES})
    assert (out[:, masked] == 0).all() and out.isfinite().all()


def check_a_masked_target(primitives):
    """Check a masked target. Its logp is -inf, and the loss follows by formula. The
    other columns get their gradient, and the target's gradient is 0.
    """
    z, ids = rows(1, 300, torch.float32, "plain")
    z[0, ids[0]] = -math.inf
    got, grad = loss_grad(
        primitives, z, ids, program=(Program.of(("reinforce",)), torch.tensor([-20.0, 20.0, 1.0]))
    )
    assert got[0] == -math.inf and got[3].isinf() and grad[0, ids[0]] == 0 and grad.isfinite().all()
    torch.testing.assert_close(
        grad.double(), -got[4, 0].double() * torch.softmax(z.double(), -1), rtol=1e-5, atol=1e-9
    )


def check_a_sure_row(primitives):
    """Check that every statistic but lse is 0, and that none is -0."""
    z = torch.full((2, 50), -math.inf)
    z[1] = -200.0
    z[:, 3] = 100.0
    for name, value in stats_of(primitives, z, torch.tensor([3, 3])).items():
        truth = torch.zeros(2) if name != "lse" else torch.full((2,), 100.0)
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-12, msg=name)
        assert not value[value == 0].signbit().any(), f"{name} is -0"


def check_a_bad_row(primitives, dtype, softcap, at):
    """NaN or +inf in column ``at``, or only -inf, gives NaN in that row alone.

    ``lse_low`` is -inf in a row of only -inf, and in no other row.
    """
    z, ids = rows(6, 5003, dtype, "plain")
    softmax = SoftmaxParams(5003, softcap)
    clean_stats, clean = (
        stats_of(primitives, z, ids, softmax=softmax),
        loss_grad(primitives, z, ids, softmax=softmax),
    )
    z[1, at] = math.nan
    z[3, at] = math.inf
    z[4] = -math.inf
    z[5] = -math.inf
    z[5, at] = math.nan
    good, bad = [0, 2], [1, 3, 4, 5]
    stats = stats_of(primitives, z, ids, softmax=softmax)
    for name, value in stats.items():
        assert torch.equal(value[good], clean_stats[name][good]), name
        assert value[[1, 3, 5]].isnan().all() and (
            value[4] == -math.inf if name == "lse_low" else value[4].isnan()
        ), name
    got, grad = loss_grad(primitives, z, ids, softmax=softmax)
    assert torch.equal(grad[good], clean[1][good]) and torch.equal(got[:, good], clean[0][:, good])
    assert grad[bad].isnan().all() and got[:, bad].isnan().all()
    grad = grad_of(primitives, z, ids, stats, {"logp": torch.ones(6)}, softmax)
    assert grad[bad].isnan().all() and grad[good].isfinite().all()


def check_ignored_rows_or_invalid(primitives, dtype):
    """Check that ignored rows, and rows with an invalid id, are never read."""
    z, ids = rows(5, 777, dtype, "plain")
    clean = loss_grad(primitives, z, ids)
    z[[1, 3]] = math.nan
    ids[1] = IGNORE_INDEX
    for bad in (-1, 777, 2**40, -(2**62)):
        ids[3] = bad
        stats = stats_of(primitives, z, ids)
        assert all(value[1] == 0 and value[3].isnan() for value in stats.values())
        got, grad = loss_grad(primitives, z, ids)
        assert (got[:, 1] == 0).all() and got[:, 3].isnan().all() and (grad[[1, 3]] == 0).all()
        assert torch.equal(grad[[0, 2, 4]], clean[1][[0, 2, 4]]) and torch.equal(
            got[:, [0, 2, 4]], clean[0][:, [0, 2, 4]]
        )
        out = grad_of(primitives, z, ids, stats, {"logp": torch.ones(5)})
        assert (out[[1, 3]] == 0).all() and not out.isnan().any()


def check_zero_gradient_rows(primitives, dtype):
    """Check that a zero derivative gives exact zeros in both primitives, even where a
    sweep would find something to multiply.
    """
    z, ids = rows(4, 2500, dtype, "plain")
    stats = stats_of(primitives, z, ids)
    stats["lse"][2] = math.nan  # a sweep of row 2 would show
    out = grad_of(
        primitives, z, ids, stats, {"logp": torch.tensor([1.0, 0.0, 0.0, 1.0]), "entropy": None}
    )
    assert (out[1:3] == 0).all() and (out[[0, 3]] != 0).any(1).all()
    inputs = RowInputs(
        torch.tensor([[1.0, 0.0, 1.0, 1.0]]), stats["logp"] - 1, torch.tensor([1.0, 1.0, 1.0, -1.0])
    )
    got = primitives.token_loss_grad(z, ids, ONE, SoftmaxParams(2500), inputs, *CLIP, out)
    # Rows 0 and 2 have a ratio e > 1.2 and a positive advantage, so they are clipped.
    # Row 1 has no weight. Row 3 is not clipped.
    assert (
        (got[4, :3] == 0).all() and (out[:3] == 0).all() and got[4, 3] != 0 and (out[3] != 0).any()
    )


def check_no_rows(primitives, shape):
    z, ids = torch.empty(shape), torch.empty(math.prod(shape[:-1]), dtype=torch.int64)
    assert stats_of(primitives, z, ids, ("logp",))["logp"].shape == (0,)
    assert loss_grad(primitives, z, ids)[0].shape == (6, 0)


# --- layouts --------------------------------------------------------------------------


def check_padding_and_shards(primitives, dtype):
    v, start, total = 700, 500, 2000
    z, _ = rows(4, v + 437, dtype, "plain")
    z[:, v:] = math.nan  # padding is not in the softmax
    ids = torch.tensor([500, 1199, 1200, 3])  # the first two are here
    softmax = SoftmaxParams(v, vocab_start=start, vocab_total=total)
    got = stats_of(primitives, z, ids, softmax=softmax)
    truth = statistics(
        z[:, :v].double(), (ids - start).clamp(0, v - 1), torch.ones(4, dtype=torch.float64)
    )
    for name in STATS:
        here = slice(0, 2) if name == "logp" else slice(0, 4)
        torch.testing.assert_close(
            got[name][here].double(), truth[name][here], rtol=2e-6, atol=2e-6
        )
    assert (got["logp"][2:] == -math.inf).all()
    out = grad_of(primitives, z, ids, got, {"logp": torch.ones(4)}, softmax)
    expected = -torch.softmax(z[:, :v].double(), -1)
    expected[[0, 1], [0, 699]] += 1
    unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(out[:, :v].double(), expected, rtol=1.01 * unit, atol=2.0**-22)
    assert (out[:, v:] == 0).all()


def _layouts(dtype, n, v):
    """Views with different strides. They are padded, unaligned, batched and sliced, or
    transposed.
    """
    flat, ids = rows(n, v, dtype, "plain")
    yield (
        "unaligned",
        torch.empty(n * (v + 3) + 1, dtype=dtype)[1:].view(n, v + 3)[:, :v],
        flat,
        ids,
    )
    yield "every second row", torch.empty(2 * n, v, dtype=dtype)[::2], flat, ids
    yield (
        "last position dropped",
        torch.empty(2, n // 2 + 1, v, dtype=dtype)[:, :-1],
        flat.view(2, n // 2, v),
        ids,
    )
    yield (
        "transposed batch",
        torch.empty(n // 2, 2, v + 1, dtype=dtype)[..., 1:].transpose(0, 1),
        flat.view(2, n // 2, v),
        ids,
    )


def check_layouts(primitives, dtype, v):
    """Check that every layout gives the bits of rows aligned to 16 bytes."""
    for name, view, values, ids in _layouts(dtype, 6, v):
        view.copy_(values)
        aligned = torch.empty(*values.shape[:-1], v + 15 & ~15, dtype=dtype)[..., :v]
        aligned.copy_(values)
        assert aligned.data_ptr() % 16 == 0
        want_rows, want = loss_grad(primitives, aligned, ids)
        want_stats = stats_of(primitives, aligned, ids)
        assert all(
            torch.equal(a, want_stats[k]) for k, a in stats_of(primitives, view, ids).items()
        ), name
        got_rows, got = loss_grad(primitives, view, ids)
        assert torch.equal(got_rows, want_rows) and torch.equal(got, want), name
        rows_in_place, _ = loss_grad(primitives, view, ids, out=view)
        assert torch.equal(rows_in_place, want_rows) and torch.equal(view, want), name


def check_addresses(primitives, dtype, v):
    """Check the gradient of logits that start at any element of a vector.

    It is written to any other and has the same bits. Nothing around it is written.
    """
    n, of_vector = 2, 16 // dtype.itemsize
    values, ids = rows(n, v, dtype, "plain", seed=v)
    want_rows, want = loss_grad(primitives, values, ids)
    stats = stats_of(primitives, values, ids)
    derivatives = {"logp": torch.tensor([1.0, -2.0])}
    want_grad = grad_of(primitives, values, ids, stats, derivatives)
    # Rows start at two elements of a vector.
    stride = (v // of_vector + 3) * of_vector + 1
    logits, written = (torch.empty(n, stride, dtype=dtype) for _ in range(2))
    for x_start in range(of_vector):
        view = logits[:, x_start : x_start + v]
        view.copy_(values)
        for start in range(of_vector):
            at = x_start, start
            out, around = (
                written[:, start : start + v],
                (written[:, :start], written[:, start + v :]),
            )
            written.fill_(7.0)
            assert torch.equal(loss_grad(primitives, view, ids, out=out)[0], want_rows), at
            assert torch.equal(out, want), at
            grad_of(primitives, view, ids, stats, derivatives, out=out)
            assert torch.equal(out, want_grad), at
            assert all((part == 7).all() for part in around), at


def check_nothing_is_written_around_rows(primitives, dtype):
    n, v = 3, 2563
    values, ids = rows(n, v, dtype, "plain")
    for offset in (0, 1):
        buffer = torch.full((n, v + 64), 7.0, dtype=dtype)
        view = buffer[:, offset + 8 : offset + 8 + v]
        view.copy_(values)
        loss_grad(primitives, view, ids, out=view)
        assert (buffer[:, : offset + 8] == 7).all() and (buffer[:, offset + 8 + v :] == 7).all()


def check_offsets_beyond_two_to_the_31(primitives):
    """Check two rows that are 2^31 + 5 elements apart. Their memory is mapped, and it
    is never touched outside of those rows.
    """
    v, stride = 1000, 2**31 + 5
    far = torch.empty(stride + v, dtype=torch.bfloat16).as_strided((2, v), (stride, 1))
    values, ids = rows(2, v, torch.bfloat16, "plain")
    far.copy_(values)
    assert torch.equal(
        stats_of(primitives, far, ids)["logp"], stats_of(primitives, values, ids)["logp"]
    )
    _, want = loss_grad(primitives, values, ids)
    loss_grad(primitives, far, ids, out=far)
    assert torch.equal(far, want)


# --- numbers that a criterion of maxima would not see ---------------------------------


def check_the_target_of_a_sure_row(primitives):
    """Check that the target's gradient uses 1 - p of the given log-prob to the
    precision of fp32. The difference from a rounded p would keep one or two digits.
    """
    v, n = 100, 5
    z = torch.zeros(n, v)
    z[:, 7] = torch.linspace(12, 18, n)
    ids = torch.full((n,), 7)
    stats = stats_of(primitives, z, ids)
    out = grad_of(primitives, z, ids, stats, {"logp": torch.ones(n)})
    truth = -torch.expm1(stats["logp"].double())
    assert ((truth > 0) & (truth < 1e-3)).all()
    torch.testing.assert_close(out[:, 7].double(), truth, rtol=1e-6, atol=0)


def check_signs_and_order(primitives):
    """Check what needs no oracle. The gradients of logp sum to 0 over a row, and only
    the target's is positive.
    """
    z, ids = rows(9, 4000, torch.float32, "plain")
    out = grad_of(primitives, z, ids, stats_of(primitives, z, ids), {"logp": torch.ones(9)})
    assert out.sum(1).abs().max() < 1e-5
    assert (out.argmax(1) == ids).all() and ((out > 0).sum(1) == 1).all()
    truth = gradient(z.double(), ids, torch.ones(9, dtype=torch.float64), {"logp": torch.ones(9)})
    assert torch.equal(out.argsort(1)[:, :5], truth.argsort(1)[:, :5])
