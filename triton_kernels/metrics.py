"""The metrics of a policy loss: sums over each sequence's rows, then over the
sequences.
"""

import triton.language as tl

from . import math
from .kernels import kernel
from .rows import own, span

#: Numbers that :func:`sums_kernel` stores of a sequence, and that
#: :func:`metrics_kernel` reads.
SUMS = tl.constexpr(10)


@kernel
def sums_kernel(
    LOGP,
    OLD,
    REF,
    SAMPLING,
    ADV,
    H,
    LOG_P_SQ,
    RATIO,
    D_LOGP,
    D_H,
    FACTOR,
    W,
    w_stride: tl.int64,
    KEEP,
    OFFSETS,
    INDEX,
    PARAMS,
    OUT,
    length: tl.int64,
    total: tl.int64,
    RUNS: tl.constexpr,
    PROGRAM: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [SUMS, S]``: sums over the rows of each sequence, and the largest
    ratio.

    The sums are entropy, kl, clipped below, clipped above, clipped, ratio, ``old -
    logp``, factor, and rows without a gradient. PROGRAM says which rows are clipped and
    computes the kl, with parameters of rows in W. GIVEN says that the ratio is stored.
    """
    s = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.float32)
    entropies, kls, lows, highs, clips, ratios, drifts, factors, skipped = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    largest = zero - float("inf")
    begin, end = span(OFFSETS, s, length, total, RUNS)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = tl.minimum(row, total - 1)
        keep = tl.load(KEEP + at, mask=own(INDEX, row, end, s, RUNS), other=0) != 0
        logp, old, ref, sampling = (
            tl.load(LOGP + at),
            tl.load(OLD + at),
            tl.load(REF + at),
            tl.load(SAMPLING + at),
        )
        adv, entropy, log_sum_p_sq = tl.load(ADV + at), tl.load(H + at), tl.load(LOG_P_SQ + at)
        if GIVEN:
            log_ratio = tl.load(RATIO + at)
        else:
            raw, lower, upper = logp - old, tl.load(PARAMS), tl.load(PARAMS + 1)
            log_ratio = tl.where(raw < lower, lower, tl.where(raw > upper, upper, raw))
        low, high, kl = PROGRAM(
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
            log_ratio,
        )
        ratio = math.exp(log_ratio)
        entropies += tl.where(keep, entropy, 0.0)
        kls += tl.where(keep, kl, 0.0)
        lows += tl.where(keep, low, 0.0)
        highs += tl.where(keep, high, 0.0)
        clips += tl.where(keep, tl.maximum(low, high), 0.0)
        ratios += tl.where(keep, ratio, 0.0)
        drifts += tl.where(keep, old - logp, 0.0)
        factors += tl.where(keep, tl.load(FACTOR + at), 0.0)
        skipped += tl.where(
            keep & (tl.load(D_LOGP + at) == 0.0) & (tl.load(D_H + at) == 0.0), 1.0, 0.0
        )
        largest = tl.maximum(largest, tl.where(keep, ratio, float("-inf")))
    P = OUT + s
    n = tl.num_programs(0).to(tl.int64)
    tl.store(P, tl.sum(entropies, 0))
    tl.store(P + n, tl.sum(kls, 0))
    tl.store(P + 2 * n, tl.sum(lows, 0))
    tl.store(P + 3 * n, tl.sum(highs, 0))
    tl.store(P + 4 * n, tl.sum(clips, 0))
    tl.store(P + 5 * n, tl.sum(ratios, 0))
    tl.store(P + 6 * n, tl.sum(drifts, 0))
    tl.store(P + 7 * n, tl.sum(factors, 0))
    tl.store(P + 8 * n, tl.sum(skipped, 0))
    tl.store(P + 9 * n, tl.max(largest, 0))


@kernel
def metrics_kernel(
    PARTS,
    LENGTHS,
    TRUST,
    SUMS_OUT,
    VALUES,
    sequences: tl.int64,
    metrics: tl.int64,
    HAS_TRUST: tl.constexpr,
    AT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``SUMS_OUT [metrics, 2]``, numerators and denominators, and ``VALUES``,
    their quotients.

    AT is the place of each metric, -1 for none. The order is: the nine sums over rows
    (the last one is not divided), the largest ratio, rows, sequences, the smallest
    share that a sequence clips below, the largest share above, and the mean shares of
    sequences below, above and in total.
    """
    zero = tl.zeros((BLOCK,), tl.float32)
    count, there = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    a, b, c, d, e, f, g, h, i = zero, zero, zero, zero, zero, zero, zero, zero, zero
    shares_low, shares_high, shares = zero, zero, zero
    largest, low_min, high_max = zero - float("inf"), zero + float("inf"), zero - float("inf")
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < sequences
        rows = tl.load(LENGTHS + s, mask=inside, other=0)
        some = rows > 0
        count += rows.to(tl.int64)
        there += some.to(tl.int64)
        P = PARTS + s
        low, high = (
            tl.load(P + 2 * sequences, mask=inside, other=0.0),
            tl.load(P + 3 * sequences, mask=inside, other=0.0),
        )
        clipped = tl.load(P + 4 * sequences, mask=inside, other=0.0)
        a += tl.load(P, mask=inside, other=0.0)
        b += tl.load(P + sequences, mask=inside, other=0.0)
        c += low
        d += high
        e += clipped
        f += tl.load(P + 5 * sequences, mask=inside, other=0.0)
        g += tl.load(P + 6 * sequences, mask=inside, other=0.0)
        h += tl.load(P + 7 * sequences, mask=inside, other=0.0)
        i += tl.load(P + 8 * sequences, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(P + 9 * sequences, mask=inside, other=float("-inf")))
        length = tl.where(some, rows, 1).to(tl.float32)
        share_low, share_high = tl.div_rn(low, length), tl.div_rn(high, length)
        shares_low += share_low
        shares_high += share_high
        shares += tl.div_rn(clipped, length)
        low_min = tl.minimum(low_min, tl.where(some, share_low, float("inf")))
        high_max = tl.maximum(high_max, tl.where(some, share_high, float("-inf")))
    rows, some, nan = tl.sum(count, 0).to(tl.float32), tl.sum(there, 0).to(tl.float32), float("nan")
    one, all_sequences = rows * 0.0 + 1.0, rows * 0.0 + sequences
    ratios = tl.sum(f, 0)
    # A maximum may ignore a NaN, but the sum shows it: ratios are positive.
    top = tl.where((rows == 0.0) | (ratios != ratios), nan, tl.max(largest, 0))
    low, high = (
        tl.where(rows == 0.0, nan, tl.min(low_min, 0)),
        tl.where(rows == 0.0, nan, tl.max(high_max, 0)),
    )
    found = (
        tl.sum(a, 0),
        tl.sum(b, 0),
        tl.sum(c, 0),
        tl.sum(d, 0),
        tl.sum(e, 0),
        ratios,
        tl.sum(g, 0),
        tl.sum(h, 0),
        tl.sum(i, 0),
        top,
        rows,
        some,
        low,
        high,
        tl.sum(shares_low, 0),
        tl.sum(shares_high, 0),
        tl.sum(shares, 0),
    )
    trust = tl.load(TRUST) if HAS_TRUST else 0.0
    for k in tl.static_range(17):
        if AT[k] >= 0:
            divisor = rows if k < 8 else (all_sequences if k > 13 else one)
            value = found[k] + trust
            tl.store(SUMS_OUT + 2 * AT[k], value)
            tl.store(SUMS_OUT + 2 * AT[k] + 1, divisor)
            tl.store(VALUES + AT[k], tl.div_rn(value, tl.maximum(divisor, 1e-30)))
