"""Multiply a gradient by a factor that only the device knows.

It does nothing if the factor is exactly 1, and otherwise reads and writes once.
"""

import triton.language as tl

from .kernels import kernel
from .sweep import row_offset
from .words import round_to


@kernel
def scale_kernel(
    X,
    FACTOR,
    rows: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Compute ``X *= FACTOR`` in tiles of BLOCK elements of SIZE bytes.

    Tiles begin at multiples of 16 bytes, wherever a row begins. FLAT says that there is
    one row, so that no division is needed to find it.
    """
    factor = tl.load(FACTOR)
    if factor != 1.0:
        for tile in range(tl.program_id(0).to(tl.int64), rows * tiles, tl.num_programs(0)):
            row = tile * 0 if FLAT else tile // tiles
            P = X if FLAT else X + row_offset(row, per_batch, batch_stride, row_stride)
            before = (P.to(tl.int64) % 16) // SIZE
            first = (tile - row * tiles) * BLOCK
            P = tl.multiple_of(P - before + first, 16)
            if (first >= before) & (first + BLOCK <= before + columns):
                cols = tl.arange(0, BLOCK)
                x = tl.load(P + cols, eviction_policy="evict_first").to(tl.float32) * factor
                tl.store(
                    P + cols,
                    round_to(x, X.dtype.element_ty, EMULATE),
                    eviction_policy="evict_first",
                )
            else:
                for part in range(0, BLOCK, BLOCK // 4):  # masks take registers
                    at = part + tl.arange(0, BLOCK // 4)
                    inside = (first + at >= before) & (first + at < before + columns)
                    x = tl.load(P + at, mask=inside, other=0.0).to(tl.float32) * factor
                    tl.store(P + at, round_to(x, X.dtype.element_ty, EMULATE), mask=inside)
