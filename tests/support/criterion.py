"""Asserts the package's accuracy criterion (reweight_ops/testing/criterion.py) for the
results of kernels.

All backends share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reweight_ops.testing import ERROR_FLOOR, gradient_errors, value_error


def assert_values(
    got: Tensor, fp32: Tensor, truth: Tensor, what: str, scale: Tensor | None = None
) -> None:
    """Assert at most 1.5 times the error of fp32 PyTorch, plus four fp32 roundings.

    The roundings are relative to ``scale``, by default 1 + |value|, and not to the
    largest value.
    """
    assert got.isfinite().all(), f"{what}: {(~got.isfinite()).sum()} values are not finite"
    if got.numel():
        error = value_error(got, fp32, truth, 1 + truth.abs() if scale is None else scale)
        assert error <= 1, f"{what}: {error:.2f} times the error that is allowed"


def assert_gradient(
    got: Tensor, fp32: Tensor, truth: Tensor, size: Tensor, columns: Tensor
) -> None:
    """The same for gradients ``[N, V]``, by maximum and rms, for the target
    (``columns``) and the other columns apart.

    ``size`` is the sum of |coefficients| / T of each row. ``fp32`` is rounded once to
    the dtype.
    """
    assert got.isfinite().all(), f"gradient: {(~got.isfinite()).sum()} values are not finite"
    is_target = torch.arange(truth.size(1)) == columns[:, None]
    floor = (ERROR_FLOOR * size.double() + 1e-300)[:, None]
    parts, worst = gradient_errors(got, fp32, truth, floor, is_target)
    assert max(max(part) for part in parts.values()) <= 1, (
        f"gradient: times what is allowed, (maximum, rms): {parts}; worst {worst}"
    )
