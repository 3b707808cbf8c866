"""The ratio of each sequence, from the mean of its drifts, and its adjoint.

The ratio up to each token is in :mod:`.along`, and that of the call in :mod:`.centred`.
"""

import triton
import triton.language as tl

from .kernels import kernel
from .rows import own, span


@triton.jit
def drift_of(LOGP, OLD, row, keep, HAS_OLD: tl.constexpr):
    """Return ``logp - old`` of the kept rows, and 0 of all others."""
    logp = tl.load(LOGP + row, mask=keep, other=0.0)
    return logp - (tl.load(OLD + row, mask=keep, other=0.0) if HAS_OLD else logp)


@triton.jit
def _drift(LOGP, OLD, ADV, PARAMS, row, keep, HAS_OLD: tl.constexpr, CLIPPED: tl.constexpr):
    """Return :func:`drift_of`, and its derivative by ``logp``.

    CLIPPED: it is at most PARAMS[3] where ADV is positive, else at least -PARAMS[2].
    """
    drift = drift_of(LOGP, OLD, row, keep, HAS_OLD)
    moves = tl.full(drift.shape, 1.0, tl.float32)
    if CLIPPED:
        rises = tl.load(ADV + row, mask=keep, other=0.0) > 0
        bound = tl.where(rises, tl.load(PARAMS + 3), -tl.load(PARAMS + 2))
        beyond = tl.where(rises, drift > bound, drift < bound)  # false for a NaN
        moves = tl.where(beyond, 0.0, tl.where(drift == bound, 0.5, 1.0))
        drift = tl.where(beyond | (bound != bound), bound, drift)
    return tl.where(keep, drift, 0.0), moves


@kernel
def ratio_kernel(
    LOGP,
    OLD,
    ADV,
    KEEP,
    LENGTHS,
    OFFSETS,
    INDEX,
    PARAMS,
    RATIO,
    MEANS,
    length: tl.int64,
    total: tl.int64,
    RUNS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    CLIPPED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each sequence's mean (or sum) of its drifts to ``MEANS`` and ``RATIO``.

    RATIO has it in every row of the sequence, clamped to the bounds that begin PARAMS.
    It is not written in a row of no sequence.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = span(OFFSETS, s, length, total, RUNS)
    total_drift = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        keep = tl.load(KEEP + row, mask=mine, other=0) != 0
        drift, _ = _drift(LOGP, OLD, ADV, PARAMS, row, keep, HAS_OLD, CLIPPED)
        total_drift += drift
    mean = tl.sum(total_drift, 0)
    if NORMALIZE:
        mean = tl.div_rn(mean, tl.maximum(tl.load(LENGTHS + s), 1).to(tl.float32))
    tl.store(MEANS + s, mean)
    low, high = tl.load(PARAMS), tl.load(PARAMS + 1)
    clamped = tl.where(mean < low, low, tl.where(mean > high, high, mean))  # keeps NaN
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        tl.store(RATIO + row, clamped + tl.zeros((BLOCK,), tl.float32), mask=mine)


@kernel
def adjoint_kernel(
    LOGP,
    OLD,
    ADV,
    D_RATIO,
    D_LOGP,
    KEEP,
    LENGTHS,
    OFFSETS,
    INDEX,
    PARAMS,
    MEANS,
    length: tl.int64,
    total: tl.int64,
    RUNS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    CLIPPED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the derivatives by the ratio, through :func:`ratio_kernel`, to ``D_LOGP``.

    With SHARED every token of the sequence that is not clipped gets their sum;
    otherwise each gets its own.
    """
    s = tl.program_id(0).to(tl.int64)
    mean = tl.load(MEANS + s)
    begin, end = span(OFFSETS, s, length, total, RUNS)
    if (mean >= tl.load(PARAMS)) & (mean <= tl.load(PARAMS + 1)):
        found = tl.zeros((BLOCK,), tl.float32)
        if SHARED:
            for start in range(begin, end, BLOCK):
                row = start + tl.arange(0, BLOCK)
                mine = own(INDEX, row, end, s, RUNS)
                found += tl.load(D_RATIO + row, mask=mine, other=0.0)
        share = tl.sum(found, 0)
        if NORMALIZE and SHARED:
            share = tl.div_rn(share, tl.maximum(tl.load(LENGTHS + s), 1).to(tl.float32))
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            mine = own(INDEX, row, end, s, RUNS)
            keep = tl.load(KEEP + row, mask=mine, other=0) != 0
            by = tl.load(D_LOGP + row, mask=keep, other=0.0)
            part = share if SHARED else tl.load(D_RATIO + row, mask=keep, other=0.0)
            if SHARED and CLIPPED:
                _, moves = _drift(LOGP, OLD, ADV, PARAMS, row, keep, HAS_OLD, CLIPPED)
                part = tl.where(moves == 0.0, 0.0, share * moves)  # a share may be infinite
            tl.store(D_LOGP + row, by + part, mask=keep)
