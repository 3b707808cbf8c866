"""Gradients in every layout that the ops return, and the checks of scaling them.

They serve the kernels' tests in the emulation, in the interpreter and on a GPU.
"""

import math

import pytest
import torch

from reweight_ops._core.backends.scale import spans_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
#: Exactly 1, a number next to it, and numbers that underflow, overflow or give NaN.
FACTORS = [1.0, 1.0 + 2.0**-23, 2.0, 1 / 3, -0.7, 0.0, 1e-30, 3e38, math.inf, -math.inf, math.nan]
GUARD = -77.0


def layouts(columns: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]:
    """``(shape, strides, offset)`` of each layout, in elements."""
    c = columns
    return {
        "whole": ((2, 3, c), (3 * c, c, 1), 0),
        "whole, off by one": ((2, 3, c), (3 * c, c, 1), 1),
        "one row": ((c,), (1,), 3),
        "padded rows": ((5, c), (c + 16, 1), 0),
        "rows anywhere": ((5, c), (c + 1, 1), 1),
        "last position left out": ((2, 2, c), (3 * c, c, 1), 0),
        "batches inside": ((2, 3, c), (c, 2 * c + 5, 1), 0),
    }


def gradient(
    layout: tuple[tuple[int, ...], tuple[int, ...], int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(view, memory)``: memory between and around the rows is GUARD.

    One row is zero, like a masked token's, and some values overflow.
    """
    shape, strides, offset = layout
    size = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    memory = torch.full((size + 64,), GUARD, dtype=dtype)
    view = memory.as_strided(shape, strides, offset)
    generator = torch.Generator().manual_seed(size)
    view.copy_(torch.randn(shape, generator=generator))
    rows = view if view.dim() > 1 else view[None]
    rows[..., -1, : view.size(-1) // 2] = 0.0
    if view.size(-1) > 2:
        rows[..., 0, :3] = torch.tensor([3e4, math.inf, math.nan])
    memory = memory.to(device)
    return memory.as_strided(shape, strides, offset), memory


def check_scaling(
    scale, dtype: torch.dtype, columns: int, device: str = "cpu", factors=FACTORS
) -> None:
    """Check that the result is bitwise the fp32 product rounded once, and that nothing
    between rows is touched.

    Two factors run in every layout, and all factors in one layout.
    """
    for name, layout in layouts(columns).items():
        for factor in factors if name == "rows anywhere" else [1.0, 1 / 3]:
            view, memory = gradient(layout, dtype, device)
            assert spans_of(view) is not None, name
            f = torch.tensor(factor, dtype=torch.float32, device=device)
            want = memory.clone()
            want.as_strided(*layout).copy_((view.float() * f).to(dtype))
            scale(view, f)
            torch.testing.assert_close(
                memory,
                want,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda m, where=f"{name}, {factor}": f"{where}: {m}",
            )


def check_untouched_at_one(scale, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check that a factor of 1 writes nothing, not even a NaN's payload."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    pattern = torch.full(
        (64,),
        {torch.bfloat16: 0x7F81, torch.float16: 0x7C01, torch.float32: 0x7F800001}[dtype],
        dtype=bits,
        device=device,
    )
    grad = pattern.clone().view(dtype)
    scale(grad, torch.ones((), device=device))
    assert torch.equal(grad.view(bits), pattern)


def check_what_no_kernel_takes(scale, device: str = "cpu") -> None:
    for grad in (
        torch.randn(4, 6, device=device).t(),
        torch.randn(2, 2, 2, 9, device=device)[..., :8],
        torch.randn(3, 5, device=device).double(),
    ):
        want = grad * 2.5
        scale(grad, torch.tensor(2.5, device=device))
        torch.testing.assert_close(grad, want, rtol=0, atol=0)
    for shape in ((0,), (0, 7), (3, 0), (2, 0, 7)):
        scale(torch.zeros(shape, device=device), torch.tensor(2.0, device=device))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        scale(torch.zeros(1, 5, device=device).expand(3, 5), torch.tensor(2.0, device=device))
