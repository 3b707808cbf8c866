"""Scaling of finished gradients in Triton: in the interpreter, or on a GPU if there is
one.
"""

import pytest
import torch

pytest.importorskip("triton")

from scale_rows import (
    DTYPES,
    FACTORS,
    check_scaling,
    check_untouched_at_one,
    check_what_no_kernel_takes,
)
from triton_oracle import DEVICE

from reweight_ops._core.backends import triton_scale as backend


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles per row, and fewer programs than tiles, at sizes that suit the
    interpreter.
    """
    for name, value in (("_THREADS", 32), ("_VECTORS", 2), ("_PROGRAMS", 3)):
        monkeypatch.setattr(backend, name, value)


@pytest.mark.parametrize("columns", [1, 7, 64, 1031])
def test_every_layout_and_factor(dtype, columns, small_tiles):
    check_scaling(backend.scale, dtype, columns, DEVICE, FACTORS if columns == 7 else [1 / 3])


def test_as_launched(dtype):
    check_scaling(backend.scale, dtype, 5000, DEVICE, [1.0, 1 / 3])


def test_nothing_is_written_at_one(dtype):
    check_untouched_at_one(backend.scale, dtype, DEVICE)


def test_what_no_kernel_takes():
    check_what_no_kernel_takes(backend.scale, DEVICE)


def test_a_factor_beside_one_is_one(dtype):
    """1 + 2⁻⁵³ is 1 in fp32, the kernel's type."""
    grad = torch.ones(9, dtype=dtype, device=DEVICE)
    backend.scale(grad, torch.tensor(1 + 2.0**-52, dtype=torch.float64, device=DEVICE))
    assert torch.equal(grad, torch.ones_like(grad))
