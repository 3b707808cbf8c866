"""Work on rows instead of logits: masks, row weights, and a loss on stored rows.

Rows are cut into sequences in one of three ways, which RUNS says. Runs of ``length``
consecutive rows; rows without sequences are cut so too, and the last run may be short.
Packed sequences, which begin at OFFSETS. Sequences whose rows may lie anywhere: INDEX
has the sequence of each row, and a program looks for its rows among all. In a packed
row of no sequence INDEX is the number of sequences.
"""

import triton
import triton.language as tl

from .kernels import OUT_OF_LOSS, kernel

# How rows are cut into sequences.
EQUAL = tl.constexpr(0)
BY_OFFSETS = tl.constexpr(1)
BY_INDEX = tl.constexpr(2)

# The divisor with which a row weight begins.
UNDIVIDED = tl.constexpr(0)
BY_VALUE = tl.constexpr(1)
BY_TENSOR = tl.constexpr(2)
BY_ROWS = tl.constexpr(3)  # rows that count in the denominator
BY_SEQUENCES = tl.constexpr(4)  # sequences that have such a row


@triton.jit
def span(OFFSETS, s, length, total, RUNS: tl.constexpr):
    """Return the first row of a sequence and the row after its last, or of all rows
    among which its own lie.

    They are in bounds whatever OFFSETS say.
    """
    if RUNS == EQUAL:
        return s * length, tl.minimum((s + 1) * length, total)
    if RUNS == BY_OFFSETS:
        begin = tl.maximum(tl.load(OFFSETS + s).to(tl.int64), 0)
        return begin, tl.minimum(tl.load(OFFSETS + s + 1).to(tl.int64), total)
    return s * 0, s * 0 + total


@triton.jit
def span_or_rest(OFFSETS, s, length, total, sequences, RUNS: tl.constexpr):
    """Do what :func:`span` does, where packed rows of no sequence are one more sequence
    after the last.
    """
    if RUNS == BY_OFFSETS:
        begin = tl.maximum(tl.load(OFFSETS + s).to(tl.int64), 0)
        end = tl.load(OFFSETS + s + 1, mask=s < sequences, other=0).to(tl.int64)
        return begin, tl.where(s < sequences, tl.minimum(end, total), total)
    return span(OFFSETS, s, length, total, RUNS)


@triton.jit
def own(INDEX, row, end, s, RUNS: tl.constexpr):
    """Return which rows before ``end`` are those of sequence ``s``."""
    inside = row < end
    if RUNS == BY_INDEX:
        inside &= tl.load(INDEX + row, mask=inside, other=-1) == s
    return inside


@kernel
def mask_kernel(
    IDS,
    MASK,
    DENOMINATOR,
    VALUES,
    OUT_IDS,
    KEEP,
    COUNTED,
    OUT_VALUES,
    LENGTHS,
    length: tl.int64,
    total: tl.int64,
    ids_stride: tl.int64,
    ids_step: tl.int64,
    mask_stride: tl.int64,
    mask_step: tl.int64,
    den_stride: tl.int64,
    den_step: tl.int64,
    values_stride: tl.int64,
    values_step: tl.int64,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT_IDS``, ``KEEP`` and ``LENGTHS [2, S]`` of runs of ``length`` rows.

    OUT_IDS are the ids, -100 where the mask is 0. KEEP marks the rows of the loss.
    LENGTHS counts each sequence's rows in the loss and in the denominator. OUT_VALUES
    are VALUES in fp32.
    """
    s = tl.program_id(0).to(tl.int64)
    kept, counted = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = (t < length) & (s * length + t < total)
        keep = inside
        if HAS_MASK:
            keep &= tl.load(MASK + s * mask_stride + t * mask_step, mask=inside, other=0) != 0
        if HAS_IDS:
            y = tl.load(IDS + s * ids_stride + t * ids_step, mask=keep, other=OUT_OF_LOSS).to(
                tl.int64
            )
            keep &= y != OUT_OF_LOSS
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
    if HAS_VALUES:  # in the loop above, the addresses of one more tensor would spill
        for start in range(0, length, BLOCK):
            t = start + tl.arange(0, BLOCK)
            inside = (t < length) & (s * length + t < total)
            x = tl.load(VALUES + s * values_stride + t * values_step, mask=inside, other=0.0)
            tl.store(OUT_VALUES + s * length + t, x.to(tl.float32), mask=inside)


@triton.jit
def _in_loss(
    IDS, MASK, row, inside, ids_step, mask_step, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Return which rows the caller's ids and mask keep."""
    keep = inside
    if HAS_MASK:
        keep &= tl.load(MASK + row * mask_step, mask=inside, other=0) != 0
    if HAS_IDS:
        keep &= tl.load(IDS + row * ids_step, mask=keep, other=OUT_OF_LOSS) != OUT_OF_LOSS
    return keep


@kernel
def pack_kernel(
    IDS,
    MASK,
    DENOMINATOR,
    WHERE,
    OUT_IDS,
    KEEP,
    COUNTED,
    INDEX,
    LENGTHS,
    TRUST,
    total: tl.int64,
    sequences: tl.int64,
    ids_step: tl.int64,
    mask_step: tl.int64,
    den_step: tl.int64,
    searches: tl.int32,
    RUNS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do what :func:`mask_kernel` does for packed rows, and write ``INDEX`` and
    ``TRUST``.

    WHERE has the offsets or the caller's index. TRUST is 0, or NaN if they are
    malformed. A row of no sequence is ignored. The first programs count the rows of one
    sequence each. The next ones take BLOCK rows each, and find their sequences among
    the offsets by ``searches`` halvings. The last one checks WHERE.
    """
    p = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.int32)
    blocks = tl.cdiv(total, BLOCK)
    if p < sequences:
        begin, end = span(WHERE, p, 0, total, RUNS)
        kept, counted = zero, zero
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            inside = row < end
            if RUNS == BY_INDEX:
                inside &= tl.load(WHERE + row, mask=inside, other=-1) == p
            keep = _in_loss(IDS, MASK, row, inside, ids_step, mask_step, HAS_IDS, HAS_MASK)
            kept += keep.to(tl.int32)
            if HAS_DENOMINATOR:
                d = tl.load(DENOMINATOR + row * den_step, mask=inside, other=0) != 0
                counted += d.to(tl.int32)
        rows = tl.sum(kept, 0)
        tl.store(LENGTHS + p, rows)
        tl.store(LENGTHS + sequences + p, tl.sum(counted, 0) if HAS_DENOMINATOR else rows)
    elif p < sequences + blocks:
        row = (p - sequences) * BLOCK + tl.arange(0, BLOCK)
        inside = row < total
        if RUNS == BY_INDEX:
            s = tl.load(WHERE + row, mask=inside, other=-1).to(tl.int64)
            s = tl.where((s >= 0) & (s < sequences), s, sequences)
        else:
            # the number of sequences that end at or before the row
            s, after = zero.to(tl.int64), zero.to(tl.int64) + sequences
            for _ in range(searches):
                middle, searching = (s + after) // 2, s < after
                end = tl.load(WHERE + middle + 1, mask=inside & searching, other=0)
                is_before = searching & (end.to(tl.int64) <= row)
                s, after = tl.where(is_before, middle + 1, s), tl.where(is_before, after, middle)
        there = inside & (s < sequences)
        keep = _in_loss(IDS, MASK, row, there, ids_step, mask_step, HAS_IDS, HAS_MASK)
        if HAS_IDS:
            y = tl.load(IDS + row * ids_step, mask=keep, other=OUT_OF_LOSS).to(tl.int64)
            tl.store(OUT_IDS + row, y, mask=inside)
        tl.store(KEEP + row, keep, mask=inside)
        tl.store(INDEX + row, s, mask=inside)
        if HAS_DENOMINATOR:
            d = tl.load(DENOMINATOR + row * den_step, mask=there, other=0) != 0
            tl.store(COUNTED + row, d, mask=inside)
    else:
        bad = zero
        if RUNS == BY_INDEX:
            for start in range(0, total, BLOCK):
                row = start + tl.arange(0, BLOCK)
                keep = _in_loss(IDS, MASK, row, row < total, ids_step, mask_step, HAS_IDS, HAS_MASK)
                s = tl.load(WHERE + row, mask=keep, other=0).to(tl.int64)
                bad |= ((s < 0) | (s >= sequences)).to(tl.int32)
        else:
            for start in range(0, sequences, BLOCK):
                i = start + tl.arange(0, BLOCK)
                inside = i < sequences
                begin = tl.load(WHERE + i, mask=inside, other=0).to(tl.int64)
                end = tl.load(WHERE + i + 1, mask=inside, other=0).to(tl.int64)
                bad |= ((end < begin) | (end > total) | ((i == 0) & (begin != 0))).to(tl.int32)
        tl.store(TRUST, tl.where(tl.max(bad, 0) > 0, float("nan"), 0.0))


@kernel
def regroup_kernel(
    IDS,
    INDEX,
    LENGTHS,
    TRUST,
    OUT_PROMPTS,
    OUT_INDEX,
    OUT_LENGTHS,
    OUT_TRUST,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    prompts: tl.int64,
    step: tl.int64,
    PACKED: tl.constexpr,
    HAS_TRUST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows of prompts, which are the sequences with the same id in IDS.

    OUT_PROMPTS ``[S]`` and OUT_INDEX ``[N]`` have the prompt of each sequence and row,
    ``prompts`` for none. OUT_LENGTHS ``[2, prompts]`` sums LENGTHS. OUT_TRUST is TRUST,
    or NaN for an id out of range. The first programs sum the lengths of one prompt
    each, the next ones take BLOCK rows each, and the last one takes the sequences.
    """
    p = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(total, BLOCK)
    zero = tl.zeros((BLOCK,), tl.int32)
    if p < prompts:
        kept, counted = zero, zero
        for start in range(0, sequences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            mine = tl.load(IDS + s * step, mask=s < sequences, other=-1) == p
            kept += tl.load(LENGTHS + s, mask=mine, other=0)
            counted += tl.load(LENGTHS + sequences + s, mask=mine, other=0)
        tl.store(OUT_LENGTHS + p, tl.sum(kept, 0))
        tl.store(OUT_LENGTHS + prompts + p, tl.sum(counted, 0))
    elif p < prompts + blocks:
        row = (p - prompts) * BLOCK + tl.arange(0, BLOCK)
        inside = row < total
        s = tl.load(INDEX + row, mask=inside, other=0) if PACKED else row // length
        g = tl.load(IDS + s * step, mask=inside & (s < sequences), other=-1).to(tl.int64)
        g = tl.where((g >= 0) & (g < prompts), g, prompts)
        tl.store(OUT_INDEX + row, g, mask=inside)
    else:
        bad = zero
        for start in range(0, sequences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            g = tl.load(IDS + s * step, mask=s < sequences, other=0).to(tl.int64)
            is_known = (g >= 0) & (g < prompts)
            tl.store(OUT_PROMPTS + s, tl.where(is_known, g, prompts), mask=s < sequences)
            bad |= ((s < sequences) & (is_known == 0)).to(tl.int32)
        trust = tl.where(tl.max(bad, 0) > 0, float("nan"), 0.0)
        if HAS_TRUST:
            trust += tl.load(TRUST)
        tl.store(OUT_TRUST, trust)


@kernel
def measure_kernel(
    WEIGHTS,
    KEEP,
    OFFSETS,
    INDEX,
    SUMS,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each sequence's sums of ``WEIGHTS [M, N]`` over the rows in KEEP to
    ``SUMS [M, S]``, one a program.

    A sum is in fp64, because it costs nothing beside the loads, and then no divisor
    depends on how rows are cut into blocks.
    """
    p = tl.program_id(0).to(tl.int64)
    weight = p // sequences
    s = p - weight * sequences
    begin, end = span(OFFSETS, s, length, total, RUNS)
    found = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        keep = tl.load(KEEP + row, mask=mine, other=0) != 0
        found += tl.load(WEIGHTS + weight * total + row, mask=keep, other=0.0).to(tl.float64)
    tl.store(SUMS + p, tl.sum(found, 0).to(tl.float32))


@triton.jit
def _divisor(LENGTHS, sequences, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the lengths, or the number of positive ones; at least 1."""
    found = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        n = tl.load(LENGTHS + s, mask=s < sequences, other=0)
        found += ((n > 0) if SEQUENCES else n).to(tl.float64)
    sum = tl.sum(found, 0)
    return tl.where(sum < 1, 1.0, sum).to(tl.float32)  # keeps NaN


@kernel
def weigh_kernel(
    KEEP,
    LENGTHS,
    INDEX,
    TRUST,
    WEIGHTS,
    SUMS,
    DIVISOR,
    SCALE,
    FACTOR,
    W,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    divisors,
    horizons,
    scale,
    DIVIDE: tl.constexpr,
    PER_LENGTH: tl.constexpr,
    HORIZON: tl.constexpr,
    WEIGHT: tl.constexpr,
    OF: tl.constexpr,
    SCALE_BY: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TRUST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``W [terms, N]``: ``(a row of WEIGHTS | 1) / divisor / (the sequence's
    length | horizon) * scale``.

    The tuples have what differs between weighings. OF has the weighing of each term,
    -1 for a term that is not written. WEIGHT has the row of ``WEIGHTS [M, N]``, -1 for
    none. Lengths are then of ``SUMS [M, S]``, and else the second row of
    ``LENGTHS [2, S]``. Term 0 is also multiplied by FACTOR. W is 0 where a row is
    ignored. A program takes BLOCK rows, whatever their sequences.
    """
    zero = tl.full((), 0.0, tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    keep = tl.load(KEEP + row, mask=inside, other=0) != 0
    for j in tl.static_range(len(DIVIDE)):
        if WEIGHT[j] < 0:
            rows, lengths = tl.zeros((BLOCK,), tl.float32) + 1.0, LENGTHS + sequences
        else:
            rows = tl.load(WEIGHTS + WEIGHT[j] * total + row, mask=keep, other=0.0)
            lengths = SUMS + WEIGHT[j] * sequences
        if DIVIDE[j] == BY_VALUE:
            rows = tl.div_rn(rows, zero + divisors[j])
        elif DIVIDE[j] == BY_TENSOR:
            rows = tl.div_rn(rows, tl.load(DIVISOR).to(tl.float32))
        elif DIVIDE[j] != UNDIVIDED:
            rows = tl.div_rn(rows, _divisor(lengths, sequences, DIVIDE[j] == BY_SEQUENCES, BLOCK))
        if PER_LENGTH[j]:
            s = tl.load(INDEX + row, mask=keep, other=0) if PACKED else row // length
            # a kept row of no prompt has the number after the last
            n = tl.load(lengths + s, mask=keep & (s < sequences), other=1)
            rows = tl.div_rn(rows, tl.where(n > 0, n, 1).to(tl.float32))
        if HORIZON[j]:
            rows = tl.div_rn(rows, zero + horizons[j])
        if SCALE_BY == BY_VALUE:
            rows *= scale
        elif SCALE_BY == BY_TENSOR:
            rows *= tl.load(SCALE).to(tl.float32)
        if HAS_TRUST:
            rows += tl.load(TRUST)
        for k in tl.static_range(len(OF)):
            if OF[k] == j:
                found = rows
                if HAS_FACTOR and k == 0:
                    found *= tl.load(FACTOR + row, mask=inside, other=0.0)
                tl.store(W + k * total + row, tl.where(keep, found, 0.0), mask=inside)


@kernel
def spread_kernel(
    VALUES,
    INDEX,
    TRUST,
    OUT,
    total: tl.int64,
    sequences: tl.int64,
    step: tl.int64,
    HAS_TRUST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [N]``: the value of each row's sequence, 0 in a row of none."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    s = tl.load(INDEX + row, mask=inside, other=0)
    found = tl.load(VALUES + s * step, mask=inside & (s < sequences), other=0).to(tl.float32)
    if HAS_TRUST:
        found += tl.load(TRUST)
    tl.store(OUT + row, found, mask=inside)


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
