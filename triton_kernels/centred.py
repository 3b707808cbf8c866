"""The centred ratio: each drift less the mean of the call's drifts, by a factor.

One launch finds the moments of blocks of rows, and one writes the ratios. Both count in
fp64, and a block's squares are about its own mean, so that nothing cancels.
"""

import triton.language as tl

from .kernels import kernel
from .ratios import drift_of


@kernel
def moments_kernel(
    LOGP,
    OLD,
    KEEP,
    PARTS,
    total: tl.int64,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``PARTS [3, P]`` of P blocks of rows: how many are kept, the mean of their
    drifts, and the sum of the squares about it.
    """
    p = tl.program_id(0).to(tl.int64)
    row = p * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(KEEP + row, mask=row < total, other=0) != 0
    drift = drift_of(LOGP, OLD, row, keep, HAS_OLD).to(tl.float64)
    count = tl.sum(keep.to(tl.int32), 0).to(tl.float64)
    mean = tl.sum(drift, 0) / tl.maximum(count, 1.0)
    off = tl.where(keep, drift - mean, 0.0)
    parts = tl.num_programs(0).to(tl.int64)
    tl.store(PARTS + p, count)
    tl.store(PARTS + parts + p, mean)
    tl.store(PARTS + 2 * parts + p, tl.sum(off * off, 0))


@kernel
def centre_kernel(
    LOGP,
    OLD,
    KEEP,
    PARTS,
    PARAMS,
    RATIO,
    CENTRE,
    total: tl.int64,
    parts: tl.int64,
    HAS_OLD: tl.constexpr,
    BY_DEVIATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``RATIO [N]``: ``factor·(drift - mean)``, clamped to the bounds that begin
    PARAMS, and mean and factor to ``CENTRE [2]``. An ignored row has a drift of 0.

    The factor is the third of PARAMS, or with BY_DEVIATION one over the standard
    deviation, which is at least that number. Every program finds both, and writes BLOCK
    rows.
    """
    zero = tl.zeros((BLOCK,), tl.float64)
    count, sums, squares = zero, zero, zero
    for start in range(0, parts, BLOCK):
        p = start + tl.arange(0, BLOCK)
        n = tl.load(PARTS + p, mask=p < parts, other=0.0)
        count += n
        sums += n * tl.load(PARTS + parts + p, mask=p < parts, other=0.0)
    kept = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(sums, 0) / kept
    factor = tl.load(PARAMS + 2)
    if BY_DEVIATION:
        for start in range(0, parts, BLOCK):
            p = start + tl.arange(0, BLOCK)
            n = tl.load(PARTS + p, mask=p < parts, other=0.0)
            off = tl.load(PARTS + parts + p, mask=p < parts, other=0.0) - mean
            squares += tl.load(PARTS + 2 * parts + p, mask=p < parts, other=0.0) + n * off * off
        deviation = tl.sqrt(tl.sum(squares, 0) / kept)
        least = factor.to(tl.float64)
        factor = (1.0 / tl.where(deviation < least, least, deviation)).to(tl.float32)  # keeps NaN
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(KEEP + row, mask=row < total, other=0) != 0
    low, high = tl.load(PARAMS), tl.load(PARAMS + 1)
    found = factor * (drift_of(LOGP, OLD, row, keep, HAS_OLD) - mean.to(tl.float32))
    clamped = tl.where(found < low, low, tl.where(found > high, high, found))  # keeps NaN
    tl.store(RATIO + row, clamped, mask=row < total)
    if tl.program_id(0) == 0:
        tl.store(CENTRE, mean.to(tl.float32))
        tl.store(CENTRE + 1, factor)


@kernel
def centre_adjoint_kernel(
    LOGP,
    OLD,
    D_RATIO,
    D_LOGP,
    KEEP,
    PARAMS,
    CENTRE,
    total: tl.int64,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the derivatives by the ratio, through :func:`centre_kernel`, to ``D_LOGP``.

    Mean and factor are given. A row has no gradient where its ratio is outside of the
    bounds; a NaN is inside of infinite bounds only. A factor of NaN is every row's.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(KEEP + row, mask=row < total, other=0) != 0
    mean, factor = tl.load(CENTRE), tl.load(CENTRE + 1)
    found = factor * (drift_of(LOGP, OLD, row, keep, HAS_OLD) - mean)
    zero = tl.zeros((BLOCK,), tl.float32)
    low, high = zero + tl.load(PARAMS), zero + tl.load(PARAMS + 1)
    unbounded = (low == float("-inf")) & (high == float("inf"))
    moves = ((found >= low) & (found <= high)) | unbounded
    by = tl.load(D_LOGP + row, mask=keep, other=0.0)
    part = tl.load(D_RATIO + row, mask=keep, other=0.0)
    tl.store(D_LOGP + row, by + factor * tl.where(moves, part, 0.0), mask=keep)
