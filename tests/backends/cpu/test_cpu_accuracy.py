"""The CPU kernels against fp64 at every instruction-set level and dtype, by the
package's accuracy criterion alone.
"""

import math

import contract
import pytest
import torch
from contract import DTYPES
from kernel_oracle import STATS, gradient, rows

from reweight_ops._core.backends.base import SoftmaxParams

cpu = pytest.importorskip("reweight_ops._core.backends.cpu", exc_type=ImportError)
_C, cpu = cpu._C, cpu.BACKEND

WIDTHS = [1, 2, 33, 2049, 4099]


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


@pytest.mark.parametrize(
    ("kind", "softmax"),
    [
        *contract.KINDS,
        *((kind, softmax) for kind in ("wide", "far") for softmax in ("plain", "cold")),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradient(level, dtype, softmax, kind):
    for v in WIDTHS:
        contract.check_statistics_and_gradient(cpu, DTYPES[dtype], 12, v, softmax, kind)


@pytest.mark.parametrize("bonus", [0.0, 0.05])
@pytest.mark.parametrize("softmax", contract.SOFTMAXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_loss_grad(level, dtype, softmax, bonus):
    for v in WIDTHS:
        contract.check_token_loss_grad(cpu, DTYPES[dtype], 24, v, softmax, bonus)


def test_the_target_of_a_sure_row(level):
    contract.check_the_target_of_a_sure_row(cpu)


def test_gradients_keep_their_sign_and_order(level):
    contract.check_signs_and_order(cpu)


def test_exponential_where_everything_is_in_range(level):
    """Two columns d apart: log-probs are -log(1 + e^d), for d over the whole range of
    fp32's exponential.
    """
    d = torch.cat([torch.linspace(-110, 0, 5001), -torch.logspace(-7, 0, 500)])
    z = torch.stack([torch.zeros_like(d), d], 1)
    got = cpu.token_stats(
        z,
        torch.ones(len(d), dtype=torch.int64),
        torch.ones(1),
        SoftmaxParams(2),
        ("logp", "max_logp"),
    )
    truth = torch.log_softmax(z.double(), -1)
    error = (got.T.double() - truth.flip(1)).abs() / (2.0**-24 * (1 + truth.flip(1).abs()))
    assert error.max() <= 4, f"{error.max():.2f} roundings at d = {d[error.max(1).values.argmax()]}"


def test_half_precision_is_converted_exactly(level):
    """Every finite bf16 and fp16 number is read and written: with V = 1, lse is the
    logit itself.
    """
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        z = z[z.isfinite() & (z.abs().float() < 1e4) & ((z == 0) | (z.abs().float() >= 2.0**-24))]
        wide = z[:, None].expand(-1, 70).contiguous()
        got = cpu.token_stats(
            wide, torch.zeros(len(z), dtype=torch.int64), torch.ones(1), SoftmaxParams(70), ("lse",)
        )[0]
        truth = z.double() + math.log(70)
        assert ((got.double() - truth).abs() <= 4 * 2.0**-24 * (5 + truth.abs())).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_rounding_of_the_gradient(level, dtype):
    """16-bit gradients are the fp64 ones rounded once, within an eighth of a unit: ties
    and near-ties may fall either way.
    """
    z, ids = rows(8, 4099, DTYPES[dtype], "plain")
    stats = cpu.token_stats(z, ids, torch.ones(1), SoftmaxParams(4099), STATS)
    d_logp = torch.full((8,), 0.75)
    out = torch.empty_like(z)
    cpu.token_grad(
        z,
        ids,
        torch.ones(1),
        SoftmaxParams(4099),
        dict(zip(STATS, stats, strict=True)),
        {"logp": d_logp},
        out,
    )
    truth = gradient(z.double(), ids, torch.ones(8, dtype=torch.float64), {"logp": d_logp})
    mantissa = 8 if dtype == "bf16" else 11
    smallest = torch.finfo(DTYPES[dtype]).smallest_normal
    ulp = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=smallest))) + 1 - mantissa)
    assert ((out.double() - truth).abs() <= 0.625 * ulp + 2.0**-22 * 0.75).all()
