"""Sums along each sequence: discounted sums of values, and the ratio of the sequence up
to each token.

A program takes the rows of a sequence in blocks, and carries the sum from block to
block. It sums in fp64, so that a sum is rounded once.
"""

import triton
import triton.language as tl

from .kernels import kernel
from .ratios import drift_of
from .rows import own, span_or_rest


@triton.jit
def _carried(decay, x):
    """Return ``decay * x`` of a sum that an earlier row has.

    Where a power of the decay is 0 or inf, so that the product could be 0·inf, a sum of
    0 stays 0, and an infinite one infinite.
    """
    return tl.where((decay + decay == decay) & (x + x == x), x, decay * x)


@triton.jit
def _after(decay, x, next_decay, next_x):
    """Join two stretches of rows, the second after the first. Each has the product of
    its decays and the sum at its end.
    """
    return decay * next_decay, next_x + _carried(next_decay, x)


@kernel
def along_kernel(
    VALUES,
    DECAY,
    KEEP,
    OFFSETS,
    INDEX,
    OUT,
    value,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    RUNS: tl.constexpr,
    GIVEN: tl.constexpr,
    DECAYS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [N]``: the sum of the values of a sequence's kept rows up to each
    row, or with REVERSE from each row on.

    Each is multiplied by DECAY (without DECAYS by 1) for every kept row after it.

    An ignored row gets 0. One more program writes the packed rows of no sequence.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = span_or_rest(OFFSETS, s, length, total, sequences, RUNS)
    lane, zero = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float64)
    carry = tl.full((), 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + lane
        if REVERSE:
            row = tl.where(row < end, begin + end - 1 - row, end)
        mine = own(INDEX, row, end, s, RUNS)
        keep = tl.load(KEEP + row, mask=mine, other=0) != 0
        if GIVEN:
            x = tl.load(VALUES + row, mask=keep, other=0.0).to(tl.float64)
        else:
            x = zero + value
        x = tl.where(keep, x, 0.0)
        if DECAYS:
            # an ignored row lets the sum pass
            decay = tl.where(keep, tl.load(DECAY).to(tl.float64), 1.0)
            x += tl.where(lane == 0, _carried(decay, zero + carry), 0.0)
            _, found = tl.associative_scan((decay, x), 0, _after)
        else:
            found = tl.cumsum(x, 0) + carry
        tl.store(OUT + row, tl.where(keep, found, 0.0).to(tl.float32), mask=mine)
        carry = tl.sum(tl.where(lane == BLOCK - 1, found, 0.0), 0)


@kernel
def prefix_kernel(
    LOGP,
    OLD,
    KEEP,
    OFFSETS,
    INDEX,
    PARAMS,
    RATIO,
    SUMS,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    RUNS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of ``logp - old`` up to each row of its sequence to ``SUMS [N]``,
    and clamped to the bounds that begin PARAMS to ``RATIO [N]``.

    The sum is 0 in an ignored row, and in a packed row of no sequence.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = span_or_rest(OFFSETS, s, length, total, sequences, RUNS)
    low, high = tl.load(PARAMS), tl.load(PARAMS + 1)
    carry = tl.full((), 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        keep = tl.load(KEEP + row, mask=mine, other=0) != 0
        drift = drift_of(LOGP, OLD, row, keep, HAS_OLD).to(tl.float64)
        found = tl.where(keep, tl.cumsum(drift, 0) + carry, 0.0).to(tl.float32)
        clamped = tl.where(found < low, low, tl.where(found > high, high, found))  # keeps NaN
        tl.store(SUMS + row, found, mask=mine)
        tl.store(RATIO + row, clamped, mask=mine)
        carry += tl.sum(drift, 0)


@kernel
def prefix_adjoint_kernel(
    LOGP,
    D_RATIO,
    D_LOGP,
    KEEP,
    PARAMS,
    SUMS,
    total: tl.int64,
    BLOCK: tl.constexpr,
):
    """Add the derivatives by the ratio, through :func:`prefix_kernel`, to ``D_LOGP``.

    Each row gets its own. It has none where its sum is outside of the bounds, or its
    log-prob not finite. A NaN is inside of infinite bounds only.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(KEEP + row, mask=row < total, other=0) != 0
    logp = tl.load(LOGP + row, mask=keep, other=0.0)
    found = tl.load(SUMS + row, mask=keep, other=0.0)
    zero = tl.zeros((BLOCK,), tl.float32)
    low, high = zero + tl.load(PARAMS), zero + tl.load(PARAMS + 1)
    unbounded = (low == float("-inf")) & (high == float("inf"))
    moves = (logp - logp == 0.0) & (((found >= low) & (found <= high)) | unbounded)
    by = tl.load(D_LOGP + row, mask=keep, other=0.0)
    part = tl.load(D_RATIO + row, mask=keep, other=0.0)
    tl.store(D_LOGP + row, by + tl.where(moves, part, 0.0), mask=keep)
