"""Packed rows in Triton's interpreter: the criterion of rows of logits, and their bits
if the launch shapes are the same.
"""

import packed_rows
import pytest
import torch
from contract import DTYPES

pytest.importorskip("triton")

from triton_oracle import DEVICE

from reweight_ops._core.backends.select import load

if DEVICE == "cuda":
    pytest.skip("the interpreter's checks; a GPU's are in tests/gpu", allow_module_level=True)

triton = load("triton")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "softmax", "dtype", "v"),
    [
        ("plain", "per_row", "fp32", 1),
        ("plain", "per_row", "bf16", 33),
        ("peaked", "cold", "fp16", 33),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ("peaked", "cold", "fp16", 700),
                ("shifted", "plain", "fp32", 1100),
                ("low", "plain", "fp32", 33),
                ("plain", "softcap", "bf16", 700),
            )
        ),
    ],
)
def test_accuracy(kind, softmax, dtype, v):
    packed_rows.check_accuracy(triton, DTYPES[dtype], 12, v, softmax, kind)


@pytest.mark.parametrize(
    ("dtype", "longest"), [("fp32", 140), *(pytest.param(d, 1900, marks=slow) for d in DTYPES)]
)
def test_each_row_is_as_alone(dtype, longest):
    packed_rows.check_each_row_alone(triton, DTYPES[dtype], longest)


@slow
def test_corners():
    packed_rows.check_corners(triton, torch.float32)


@slow
def test_sure_rows():
    packed_rows.check_sure_rows(triton)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_derivatives_get_zeros(dtype):
    """From their first column on, wherever they begin."""
    rows = packed_rows.AsLogits(triton)
    z, ids = torch.randn(7, 33).to(DTYPES[dtype]), torch.arange(7)
    zero, out = torch.zeros(7), torch.full((7, 33), float("nan"), dtype=DTYPES[dtype])
    stats = dict.fromkeys(("logp", "lse", "entropy", "log_sum_p_sq"), zero)
    softmax = packed_rows.SoftmaxParams(33)
    rows.token_grad(z, ids, torch.ones(1), softmax, stats, {"logp": zero}, out)
    assert not out.any()
