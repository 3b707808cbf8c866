"""The CPU kernels against fp64 at every instruction-set level and dtype, by the accuracy criterion of the package (no tolerance of our own)."""

import math

import pytest
import torch
from criterion import assert_gradient, assert_values, gradient_from
from kernel_oracle import STATS, clip_loss, gradient, rows, statistics

from reweight_ops.backends.base import Head, Program, RowInputs

cpu = pytest.importorskip("reweight_ops.backends.cpu", exc_type=ImportError)
_C = cpu._C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = [1, 2, 33, 2049, 4099]
HEADS = {"plain": (1.0, math.inf), "cold": (0.7, math.inf), "per_row": (None, math.inf), "softcap": (1.3, 15.0)}


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


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
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradient(level, dtype, head, kind):
    value, softcap = HEADS[head]
    for v in WIDTHS:
        n = 12
        z, ids = rows(n, v, DTYPES[dtype], kind, seed=v)
        t = temperature_of(value, n)
        each = t.expand(n)
        exact = statistics(z.double(), ids, each.double(), softcap)
        single = statistics(z.float(), ids, each, softcap)
        got = cpu.token_stats(z, ids, t, Head(v, softcap), STATS)
        for name, ours in zip(STATS, got, strict=True):
            assert_values(ours, single[name], exact[name], f"{name} at V = {v}")

        g = torch.Generator().manual_seed(v)
        for names in (("logp",), ("logp", "entropy"), ("logp", "entropy", "lse", "log_sum_p_sq")):
            coefs = {name: torch.randn(n, generator=g) for name in names}
            out = torch.full_like(z, math.nan)
            cpu.token_grad(z, ids, t, Head(v, softcap), dict(zip(STATS, got, strict=True)), dict(coefs), out)
            truth = gradient(z.double(), ids, each.double(), coefs, softcap)
            # The op is given fp32 statistics; so is the baseline, whose own pass has better ones where the offset is large.
            base = gradient_from(z.float(), ids, each, Head(v, softcap), dict(zip(STATS, got, strict=True)), coefs)
            assert_gradient(out, base, truth, sum(c.abs() for c in coefs.values()) * 2 / each, ids)


@pytest.mark.parametrize("bonus", [0.0, 0.05])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_loss_grad(level, dtype, head, bonus):
    value, softcap = HEADS[head]
    for v in WIDTHS:
        n = 24
        z, ids = rows(n, v, DTYPES[dtype], "plain", seed=v)
        t = temperature_of(value, n)
        g = torch.Generator().manual_seed(v)
        exact = statistics(z.double(), ids, t.expand(n).double(), softcap)
        old = (exact["logp"] + torch.randn(n, generator=g) * 0.4).float()
        adv, weight = torch.randn(n, generator=g), torch.rand(n, generator=g)
        program = Program(("clip", "entropy_bonus") if bonus else ("clip",))
        params = torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf] + ([bonus] if bonus else []))
        out = torch.full_like(z, math.nan)
        got = cpu.token_loss_grad(
            z, ids, t, Head(v, softcap), RowInputs(weight.expand(len(program.terms), n), old, adv), program, params, out
        )  # fmt: skip

        def run(dtype, z=z, ids=ids, t=t, softcap=softcap, old=old, adv=adv, weight=weight, n=n):
            x = z.to(dtype).requires_grad_()
            stats = statistics(x, ids, t.expand(n).to(dtype), softcap)
            leaves = {k: s.detach().requires_grad_() for k, s in stats.items()}
            total = clip_loss(leaves, old.to(dtype), adv.to(dtype), weight.to(dtype), 0.2, bonus)
            by = torch.autograd.grad(total.sum(), (leaves["logp"], leaves["entropy"]), allow_unused=True)
            coefs = {"logp": by[0], "entropy": torch.zeros_like(total) if by[1] is None else by[1]}
            return stats, total, coefs, gradient(z.to(dtype), ids, t.expand(n).to(dtype), coefs, softcap)

        stats, total, coefs, truth = run(torch.float64)
        stats32, total32, coefs32, grad32 = run(torch.float32)
        if v > 100:
            assert (coefs["logp"] == 0).any() and (coefs["logp"] != 0).any(), "the clip is on one side only"
        for k, name in enumerate(("logp", "entropy")):
            assert_values(got[k], stats32[name].detach(), stats[name].detach(), f"{name} at V = {v}")
            assert_values(got[4 + k], coefs32[name], coefs[name], f"coefficient {name} at V = {v}")
        assert_values(got[2], total32.detach(), total.detach(), "weighted loss")
        assert_values(got[3], (total32 / weight).detach(), (total / weight).detach(), "loss")
        assert_gradient(out, grad32, truth, (coefs["logp"].abs() + coefs["entropy"].abs()) / t.expand(n), ids)


def test_exponential_where_everything_is_in_range(level):
    """Two columns d apart: log-probs are -log(1 + e^d), for d over the whole range of fp32's exponential."""
    d = torch.cat([torch.linspace(-110, 0, 5001), -torch.logspace(-7, 0, 500)])
    z = torch.stack([torch.zeros_like(d), d], 1)
    got = cpu.token_stats(z, torch.ones(len(d), dtype=torch.int64), torch.ones(1), Head(2), ("logp", "max_logp"))
    truth = torch.log_softmax(z.double(), -1)
    error = (got.T.double() - truth.flip(1)).abs() / (2.0**-24 * (1 + truth.flip(1).abs()))
    assert error.max() <= 4, f"{error.max():.2f} roundings at d = {d[error.max(1).values.argmax()]}"


def test_half_precision_is_converted_exactly(level):
    """Every finite bf16 and fp16 number, read and written: with V = 1 column, +inf softness aside, lse is the logit itself."""
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        z = z[z.isfinite() & (z.abs().float() < 1e4) & ((z == 0) | (z.abs().float() >= 2.0**-24))]
        wide = z[:, None].expand(-1, 70).contiguous()
        got = cpu.token_stats(wide, torch.zeros(len(z), dtype=torch.int64), torch.ones(1), Head(70), ("lse",))[0]
        truth = z.double() + math.log(70)
        assert ((got.double() - truth).abs() <= 4 * 2.0**-24 * (5 + truth.abs())).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_rounding_of_the_gradient(level, dtype):
    """16-bit gradients are the fp64 ones rounded once, within an eighth of a unit: ties and near-ties may fall either way."""
    z, ids = rows(8, 4099, DTYPES[dtype], "plain")
    stats = cpu.token_stats(z, ids, torch.ones(1), Head(4099), STATS)
    coef = torch.full((8,), 0.75)
    out = torch.empty_like(z)
    cpu.token_grad(z, ids, torch.ones(1), Head(4099), dict(zip(STATS, stats, strict=True)), {"logp": coef}, out)
    truth = gradient(z.double(), ids, torch.ones(8, dtype=torch.float64), {"logp": coef})
    mantissa = 8 if dtype == "bf16" else 11
    smallest = torch.finfo(DTYPES[dtype]).smallest_normal
    ulp = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=smallest))) + 1 - mantissa)
    assert ((out.double() - truth).abs() <= 0.625 * ulp + 2.0**-22 * 0.75).all()
