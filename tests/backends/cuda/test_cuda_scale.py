"""Scaling of finished gradients by the CUDA kernel, run thread by thread on the CPU."""

import pytest
import torch
from cuda_emulation.fixtures import SCHEDULES, emulated
from scale_rows import (
    DTYPES,
    FACTORS,
    check_scaling,
    check_untouched_at_one,
    check_what_no_kernel_takes,
)

from reweight_ops.errors import InvalidCall

#: A tile is 1024 vectors: 4096 or 8192 columns.
WIDTHS = [1, 7, 64, 1031, 17001]


@pytest.fixture(scope="module")
def kernels():
    return emulated()


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("columns", WIDTHS)
def test_every_layout_and_factor(kernels, dtype, columns):
    module, native = kernels
    for schedule in SCHEDULES if columns < 2000 else SCHEDULES[:1]:
        module.set_schedule(schedule, 1)
        check_scaling(native.scale, dtype, columns, factors=[*FACTORS, 1e-38])


def test_nothing_is_written_at_one(kernels, dtype):
    check_untouched_at_one(kernels[1].scale, dtype)


def test_what_no_kernel_takes(kernels):
    check_what_no_kernel_takes(kernels[1].scale)


def test_rows_beyond_two_to_the_31(kernels):
    """Two rows so far apart that 32 bits cannot hold the distance, in memory that the
    system allocates only where it is touched.
    """
    far = 2**31 + 8
    grad = torch.empty(far + 9, dtype=torch.bfloat16).as_strided((2, 9), (far, 1))
    grad.fill_(2.0)
    kernels[1].scale(grad, torch.tensor(0.5))
    assert torch.equal(grad, torch.ones_like(grad))


def test_the_factor_is_where_the_gradient_is_and_a_scalar(kernels):
    with pytest.raises(InvalidCall, match="factor is"):
        kernels[1].scale(torch.ones(4), torch.ones(2))


def test_a_launch_that_fails_is_not_silent(kernels):
    module, native = kernels
    module.set_status(700)
    try:
        with pytest.raises(AssertionError, match="status 700"):
            native.scale(torch.ones(4), torch.tensor(2.0))
    finally:
        module.set_status(0)
