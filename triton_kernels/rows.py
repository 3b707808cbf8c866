"""Work on rows instead of logits: masks, row weights, sequence ratios, and a loss on
stored rows.

A program takes one sequence of ``length`` consecutive rows. Rows without sequences are
cut into runs, of which the last may be short (``total`` is the number of all rows).
"""

import triton
import triton.language as tl

from .kernels import OUT_OF_LOSS, kernel

# The divisor with which a row weight begins.
UNDIVIDED = tl.constexpr(0)
BY_VALUE = tl.constexpr(1)
BY_TENSOR = tl.constexpr(2)
BY_ROWS = tl.constexpr(3)  # rows that count in the denominator
BY_SEQUENCES = tl.constexpr(4)  # sequences that have such a row


@kernel
def mask_kernel(
    IDS,
    MASK,
    DENOMINATOR,
    OUT_IDS,
    KEEP,
    COUNTED,
    LENGTHS,
    length: tl.int64,
    total: tl.int64,
    ids_stride: tl.int64,
    ids_step: tl.int64,
    mask_stride: tl.int64,
    mask_step: tl.int64,
    den_stride: tl.int64,
    den_step: tl.int64,
    HAS_MASK: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT_IDS``, ``KEEP`` and ``LENGTHS [2, S]``.

    OUT_IDS are the ids, -100 where the mask is 0. KEEP marks the rows of the loss.
    LENGTHS counts each sequence's rows in the loss and in the denominator.
    """
    s = tl.program_id(0).to(tl.int64)
    kept, counted = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = (t < length) & (s * length + t < total)
        y = tl.load(IDS + s * ids_stride + t * ids_step, mask=inside, other=OUT_OF_LOSS).to(
            tl.int64
        )
        if HAS_MASK:
            m = tl.load(MASK + s * mask_stride + t * mask_step, mask=inside, other=0)
            y = tl.where(m != 0, y, OUT_OF_LOSS)
        keep = y != OUT_OF_LOSS
        tl.store(OUT_IDS + s * length + t, y, mask=inside)
        tl.store(KEEP + s * length + t, keep, mask=inside)
        kept += keep.to(tl.int32)
        if HAS_DENOMINATOR:
            d = tl.load(DENOMINATOR + s * den_stride + t * den_step, mask=inside, other=0) != 0
            tl.store(COUNTED + s * length + t, d, mask=inside)
            counted += d.to(tl.int32)
    rows = tl.sum(kept, 0)
    tl.store(LENGTHS + s, rows)
    tl.store(LENGTHS + tl.num_programs(0) + s, tl.sum(counted, 0) if HAS_DENOMINATOR else rows)


@triton.jit
def _divisor(LENGTHS, sequences, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """The number of rows, or of sequences with a row; at least 1."""
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        n = tl.load(LENGTHS + sequences + s, mask=s < sequences, other=0)
        found += ((n > 0) if SEQUENCES else n).to(tl.int64)
    return tl.maximum(tl.sum(found, 0), 1).to(tl.float32)


@kernel
def weigh_kernel(
    KEEP,
    LENGTHS,
    DIVISOR,
    SCALE,
    FACTOR,
    W,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    divisor,
    horizon,
    scale,
    DIVIDE: tl.constexpr,
    PER_LENGTH: tl.constexpr,
    HORIZON: tl.constexpr,
    SCALE_BY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``W [TERMS, N]``: ``1 / divisor / (the sequence's length | horizon) *
    scale``.

    Term 0 is also multiplied by FACTOR. W is 0 where a row is ignored.
    """
    s = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, tl.float32)
    w = zero + 1.0
    if DIVIDE == BY_VALUE:
        w = tl.div_rn(w, zero + divisor)
    elif DIVIDE == BY_TENSOR:
        w = tl.div_rn(w, tl.load(DIVISOR).to(tl.float32))
    elif DIVIDE != UNDIVIDED:
        w = tl.div_rn(w, _divisor(LENGTHS, sequences, DIVIDE == BY_SEQUENCES, BLOCK))
    if PER_LENGTH:
        w = tl.div_rn(w, tl.maximum(tl.load(LENGTHS + sequences + s), 1).to(tl.float32))
    if HORIZON:
        w = tl.div_rn(w, zero + horizon)
    if SCALE_BY == BY_VALUE:
        w *= scale
    elif SCALE_BY == BY_TENSOR:
        w *= tl.load(SCALE).to(tl.float32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        row = s * length + t
        inside = (t < length) & (row < total)
        keep = tl.load(KEEP + row, mask=inside, other=0) != 0
        for k in tl.static_range(TERMS):
            own = w + tl.zeros((BLOCK,), tl.float32)
            if HAS_FACTOR and k == 0:
                own *= tl.load(FACTOR + row, mask=inside, other=0.0)
            tl.store(W + k * total + row, tl.where(keep, own, 0.0), mask=inside)


@kernel
def ratio_kernel(
    LOGP,
    OLD,
    KEEP,
    LENGTHS,
    PARAMS,
    RATIO,
    MEANS,
    length: tl.int64,
    HAS_OLD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each sequence's mean (or sum) of ``logp - old`` to ``MEANS`` and ``RATIO``.

    RATIO has it in every row of the sequence, clamped to the bounds that begin PARAMS.
    """
    s = tl.program_id(0).to(tl.int64)
    drift = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        keep = tl.load(KEEP + s * length + t, mask=t < length, other=0) != 0
        logp = tl.load(LOGP + s * length + t, mask=keep, other=0.0)
        old = tl.load(OLD + s * length + t, mask=keep, other=0.0) if HAS_OLD else logp
        drift += tl.where(keep, logp - old, 0.0)
    mean = tl.sum(drift, 0)
    if NORMALIZE:
        mean = tl.div_rn(mean, tl.maximum(tl.load(LENGTHS + s), 1).to(tl.float32))
    tl.store(MEANS + s, mean)
    low, high = tl.load(PARAMS), tl.load(PARAMS + 1)
    clamped = tl.where(mean < low, low, tl.where(mean > high, high, mean))  # keeps NaN
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tl.store(RATIO + s * length + t, clamped + tl.zeros((BLOCK,), tl.float32), mask=t < length)


@kernel
def adjoint_kernel(
    D_RATIO,
    D_LOGP,
    KEEP,
    LENGTHS,
    PARAMS,
    MEANS,
    length: tl.int64,
    NORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the derivatives by the ratio, through :func:`ratio_kernel`, to ``D_LOGP``.

    With SHARED every token of the sequence gets their sum; otherwise each gets its own.
    """
    s = tl.program_id(0).to(tl.int64)
    mean = tl.load(MEANS + s)
    if (mean >= tl.load(PARAMS)) & (mean <= tl.load(PARAMS + 1)):
        found = tl.zeros((BLOCK,), tl.float32)
        if SHARED:
            for start in range(0, length, BLOCK):
                t = start + tl.arange(0, BLOCK)
                found += tl.load(D_RATIO + s * length + t, mask=t < length, other=0.0)
        share = tl.sum(found, 0)
        if NORMALIZE and SHARED:
            share = tl.div_rn(share, tl.maximum(tl.load(LENGTHS + s), 1).to(tl.float32))
        for start in range(0, length, BLOCK):
            t = start + tl.arange(0, BLOCK)
            keep = tl.load(KEEP + s * length + t, mask=t < length, other=0) != 0
            by = tl.load(D_LOGP + s * length + t, mask=keep, other=0.0)
            own = share if SHARED else tl.load(D_RATIO + s * length + t, mask=keep, other=0.0)
            tl.store(D_LOGP + s * length + t, by + own, mask=keep)


@kernel
def evaluate_kernel(
    LOGP,
    OLD,
    REF,
    SAMPLING,
    ADV,
    H,
    LOG_P_SQ,
    RATIO,
    W,
    w_stride: tl.int64,
    PARAMS,
    KEEP,
    OUT,
    n: tl.int64,
    PROGRAM: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [OUTPUTS, n]``: the outputs of PROGRAM on stored rows, 0 where KEEP
    is false.

    GIVEN says that the ratio is stored too.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    at = tl.minimum(row, n - 1)  # the program's own loads are unmasked
    logp, old, ref, sampling = (
        tl.load(LOGP + at),
        tl.load(OLD + at),
        tl.load(REF + at),
        tl.load(SAMPLING + at),
    )
    adv, entropy, log_sum_p_sq = tl.load(ADV + at), tl.load(H + at), tl.load(LOG_P_SQ + at)
    if GIVEN:
        found = PROGRAM(
            PARAMS,
            W + at,
            w_stride,
            logp,
            old,
            ref,
            sampling,
            adv,
            entropy,
            log_sum_p_sq,
            tl.load(RATIO + at),
        )
    else:
        found = PROGRAM(
            PARAMS, W + at, w_stride, logp, old, ref, sampling, adv, entropy, log_sum_p_sq
        )
    keep = tl.load(KEEP + at) != 0 if HAS_KEEP else inside
    for k in tl.static_range(OUTPUTS):
        tl.store(OUT + k * n + row, tl.where(keep, found[k], 0.0), mask=inside)
