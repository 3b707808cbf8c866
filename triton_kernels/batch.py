"""A sum, mean or extremum of values over the kept rows of each sequence, or of the
call, and a quantile of the call.

Sums are found in fp64, so that the mean of equal numbers is exactly that number.
"""

import triton
import triton.language as tl

from .kernels import kernel
from .rows import own, span_or_rest

# What is found of the values.
SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
LARGEST = tl.constexpr(2)
LEAST = tl.constexpr(3)  # the largest of the negatives


@triton.jit
def _empty(STATISTIC: tl.constexpr, BLOCK: tl.constexpr):
    """Return what is found of no rows, and their number."""
    found = tl.zeros((BLOCK,), tl.float64)
    if STATISTIC >= LARGEST:
        found += float("-inf")
    return found, tl.zeros((BLOCK,), tl.int32)


@triton.jit
def _joined(found, x, STATISTIC: tl.constexpr):
    if STATISTIC >= LARGEST:
        return tl.where((x > found) | (x != x), x, found)  # keeps NaN
    return found + x


@triton.jit
def _of_all(found, STATISTIC: tl.constexpr):
    """Return what is found of a block, as one number."""
    if STATISTIC >= LARGEST:
        # A maximum may ignore a NaN.
        nan = found != found
        largest = tl.max(tl.where(nan, float("-inf"), found), 0)
        return largest + tl.sum(tl.where(nan, found, 0.0), 0)
    return tl.sum(found, 0)


@triton.jit
def _finished(found, count, STATISTIC: tl.constexpr):
    if STATISTIC == MEAN:
        return found / tl.maximum(count, 1).to(tl.float64)
    return -found if STATISTIC == LEAST else found


@triton.jit
def _seen(VALUES, value, row, keep, found, count, STATISTIC: tl.constexpr, GIVEN: tl.constexpr):
    """Return ``found`` and ``count`` with the kept rows of one more block."""
    if GIVEN:
        x = tl.load(VALUES + row, mask=keep, other=0.0).to(tl.float64)
    else:
        x = tl.zeros(found.shape, tl.float64) + value
    if STATISTIC == LEAST:
        x = -x
    if STATISTIC >= LARGEST:
        x = tl.where(keep, x, float("-inf"))
    else:
        x = tl.where(keep, x, 0.0)
    return _joined(found, x, STATISTIC), count + keep.to(tl.int32)


@kernel
def sequence_total_kernel(
    VALUES,
    KEEP,
    OFFSETS,
    INDEX,
    OUT,
    value,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    RUNS: tl.constexpr,
    STATISTIC: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [N]``: each row gets the STATISTIC of its sequence. An extremum is 0
    in an ignored row. Packed rows of no sequence get 0 from one more program.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = span_or_rest(OFFSETS, s, length, total, sequences, RUNS)
    found, count = _empty(STATISTIC, BLOCK)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        keep = tl.load(KEEP + row, mask=mine, other=0) != 0
        found, count = _seen(VALUES, value, row, keep, found, count, STATISTIC, GIVEN)
    result = _finished(_of_all(found, STATISTIC), tl.sum(count, 0), STATISTIC).to(tl.float32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        shown = mine
        if STATISTIC >= LARGEST:
            shown = tl.load(KEEP + row, mask=mine, other=0) != 0
        tl.store(OUT + row, tl.where(shown, result, 0.0), mask=mine)


@kernel
def parts_kernel(
    VALUES,
    KEEP,
    PARTS,
    value,
    total: tl.int64,
    STATISTIC: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``PARTS [2, P]``: what each of P blocks of the call's rows has, and how
    many of its rows are kept.
    """
    p = tl.program_id(0).to(tl.int64)
    row = p * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(KEEP + row, mask=row < total, other=0) != 0
    found, count = _empty(STATISTIC, BLOCK)
    found, count = _seen(VALUES, value, row, keep, found, count, STATISTIC, GIVEN)
    tl.store(PARTS + p, _of_all(found, STATISTIC))
    tl.store(PARTS + tl.num_programs(0) + p, tl.sum(count, 0).to(tl.float64))


@kernel
def total_kernel(
    PARTS,
    OUT,
    total: tl.int64,
    parts: tl.int64,
    STATISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [N]``: each row gets the STATISTIC of all PARTS.

    Every program finds it, and writes BLOCK rows.
    """
    found, count = _empty(STATISTIC, BLOCK)
    for start in range(0, parts, BLOCK):
        p = start + tl.arange(0, BLOCK)
        other = _empty(STATISTIC, BLOCK)[0]
        found = _joined(found, tl.load(PARTS + p, mask=p < parts, other=other), STATISTIC)
        count += tl.load(PARTS + parts + p, mask=p < parts, other=0.0).to(tl.int32)
    result = _finished(_of_all(found, STATISTIC), tl.sum(count, 0), STATISTIC).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + row, tl.zeros((BLOCK,), tl.float32) + result, mask=row < total)


@kernel
def quantile_kernel(
    ORDERED,
    LENGTHS,
    OUT,
    q,
    total: tl.int64,
    sequences: tl.int64,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [N]``: each row gets the quantile ``q`` of the call's kept rows.
    ORDERED begins with their values.

    It is between two order statistics, or the nearest of them, of which a half rounds
    to the even one. Every program finds it, and writes BLOCK rows.
    """
    kept = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        kept += tl.load(LENGTHS + s, mask=s < sequences, other=0).to(tl.int64)
    at = q * tl.maximum(tl.sum(kept, 0) - 1, 0).to(tl.float32)
    first = at.to(tl.int64)  # at is not negative
    share = at - first.to(tl.float32)
    if NEAREST:
        upper = (share > 0.5) | ((share == 0.5) & (first % 2 == 1))
        result = tl.load(ORDERED + first + upper.to(tl.int64))
    else:
        below = tl.load(ORDERED + first)
        above = tl.load(ORDERED + first + (share > 0).to(tl.int64))
        gap = tl.where(tl.abs(below) == float("inf"), 0.0, above - below)  # not inf - inf
        result = below + share * gap
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + row, tl.zeros((BLOCK,), tl.float32) + result, mask=row < total)
