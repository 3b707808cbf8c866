"""Reductions that couple tokens: the contributions of rows, and the slopes of their sum
by the rows' weighted losses.

These are the formulas of ``_core/spec/coupled.py``, whose derivatives are written out
here; tests compare them with what autograd makes of those. One launch sums the rows of
each sequence, one compares the sequences of each prompt, and one writes the rows. All
numbers of sequences are in fp64.
"""

import triton
import triton.language as tl

from .kernels import kernel
from .rows import own, span

# What a reduction makes of a term.
LINEAR = tl.constexpr(0)
HINGE = tl.constexpr(1)
CONTRAST = tl.constexpr(2)
CLASSIFICATION = tl.constexpr(3)

# What a contrast prefers among the positives of a prompt.
NOTHING = tl.constexpr(0)
SHORT = tl.constexpr(1)
ADVANTAGES = tl.constexpr(2)

#: The numbers of a term. Before those of the first stands the scale.
NUMBERS_OF_TERM = tl.constexpr(3)


@triton.jit
def _number(NUMBERS, k, which: tl.constexpr):
    """Return a number of term ``k``: its coefficient, or one of its coupling."""
    return tl.load(NUMBERS + 1 + NUMBERS_OF_TERM * k + which).to(tl.float64)


@kernel
def sequence_sums_kernel(
    EVALUATED,
    ADV,
    KEEP,
    OFFSETS,
    INDEX,
    SUMS,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    first: tl.int64,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``SUMS [1 + K, S]``: the sums over each sequence of the rows of ``EVALUATED
    [1 + K, N]``, from row ``first`` on, but of the kept advantages in row 0.
    """
    p = tl.program_id(0).to(tl.int64) + first * sequences
    s, k = p % sequences, p // sequences
    begin, end = span(OFFSETS, s, length, total, RUNS)
    found = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = own(INDEX, row, end, s, RUNS)
        if k == 0:
            keep = tl.load(KEEP + row, mask=mine, other=0) != 0
            found += tl.load(ADV + row, mask=keep, other=0.0).to(tl.float64)
        else:
            found += tl.load(EVALUATED + k * total + row, mask=mine, other=0.0).to(tl.float64)
    tl.store(SUMS + p, tl.sum(found, 0))


@triton.jit
def _sides(SUMS, LENGTHS, PROMPTS, at, end, p, sequences, AT, BY_INDEX: tl.constexpr):
    """Return numbers of the sequences of prompt ``p`` among ``at``: which they are,
    their lengths, advantages and scores, and which are positive and negative.
    """
    mine = at < end
    if BY_INDEX:
        mine &= tl.load(PROMPTS + at, mask=mine, other=-1) == p
    length = tl.load(LENGTHS + at, mask=mine, other=0)
    adv = tl.load(SUMS + at, mask=mine, other=0.0)
    score = -tl.load(SUMS + (1 + AT) * sequences + at, mask=mine, other=0.0)
    present = length > 0
    positive = present & (adv > 0)
    return mine, length, adv, score, positive, present & (positive == 0)


@triton.jit
def _exponents(
    length,
    adv,
    score,
    by,
    prefers_by,
    KIND: tl.constexpr,
    PREFERS: tl.constexpr,
    HARD: tl.constexpr,
):
    """Return of which numbers a sequence has an exponential, on the side of the
    positives and on that of the negatives.
    """
    zero = tl.zeros(score.shape, tl.float64)
    down = zero if HARD else score / by
    if KIND == CLASSIFICATION:
        return -down, down
    if PREFERS == SHORT:
        return -length.to(tl.float64) / prefers_by, down
    if PREFERS == ADVANTAGES:
        return adv / tl.maximum(length, 1).to(tl.float64) / prefers_by, down
    return zero, down


@triton.jit
def _compare(
    SUMS,
    LENGTHS,
    PROMPTS,
    NUMBERS,
    SHARES,
    PRESENT,
    begin,
    end,
    p,
    prompts,
    sequences,
    AT: tl.constexpr,
    KIND: tl.constexpr,
    PREFERS: tl.constexpr,
    HARD: tl.constexpr,
    BY_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do for prompt ``p`` what :func:`join_kernel` says."""
    by, prefers_by = _number(NUMBERS, AT, 1), _number(NUMBERS, AT, 2)
    none, zero = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    positives, negatives, unknown, scores = none, none, none, zero
    # log(1 + ...) has an exponential of 0 among the others
    highest = zero if KIND == CLASSIFICATION else zero - float("inf")
    highest_up, highest_down = highest, highest
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, length, adv, score, positive, negative = _sides(
            SUMS, LENGTHS, PROMPTS, at, end, p, sequences, AT, BY_INDEX
        )
        up, down = _exponents(length, adv, score, by, prefers_by, KIND, PREFERS, HARD)
        positives += positive.to(tl.int32)
        negatives += negative.to(tl.int32)
        unknown += (adv != adv).to(tl.int32)  # they are negative
        scores += tl.where(negative, score, 0.0)
        highest_up = tl.maximum(highest_up, tl.where(positive, up, float("-inf")))
        highest_down = tl.maximum(highest_down, tl.where(negative, down, float("-inf")))
    ups, downs = tl.sum(positives, 0), tl.sum(negatives, 0)
    both = (ups > 0) & (downs > 0) & (p < prompts)
    # Where one of them is NaN, so is the sum below, whatever is subtracted.
    top_up, top_down = tl.max(highest_up, 0), tl.max(highest_down, 0)
    top_up = tl.where(top_up > float("-inf"), top_up, 0.0)
    top_down = tl.where(top_down > float("-inf"), top_down, 0.0)
    sum_up, sum_down = zero, zero
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, length, adv, score, positive, negative = _sides(
            SUMS, LENGTHS, PROMPTS, at, end, p, sequences, AT, BY_INDEX
        )
        up, down = _exponents(length, adv, score, by, prefers_by, KIND, PREFERS, HARD)
        sum_up += tl.where(positive, tl.exp(up - top_up), 0.0)
        sum_down += tl.where(negative, tl.exp(down - top_down), 0.0)
    total_up, total_down = tl.sum(sum_up, 0), tl.sum(sum_down, 0)
    count = ups + downs if KIND == CLASSIFICATION else downs
    count = tl.maximum(count, 1).to(tl.float64)
    # A sequence whose advantage is unknown adds NaN, and no slope to the others.
    known = (count - tl.sum(unknown, 0).to(tl.float64)) / count
    if KIND == CLASSIFICATION:
        total_up += tl.exp(-top_up)
        total_down += tl.exp(-top_down)
        value = top_up + tl.log(total_up) + top_down + tl.log(total_down)
    elif HARD:
        value = tl.sum(scores, 0) / count
    else:
        value = by * (top_down + tl.log(total_down / count))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine, length, adv, score, positive, negative = _sides(
            SUMS, LENGTHS, PROMPTS, at, end, p, sequences, AT, BY_INDEX
        )
        up, down = _exponents(length, adv, score, by, prefers_by, KIND, PREFERS, HARD)
        slope_up = tl.exp(up - top_up) / total_up
        slope_down = -tl.exp(down - top_down) / total_down * known
        of_prompt = value / count
        if KIND == CLASSIFICATION:
            slope_up, slope_down = slope_up * known / by, slope_down / by
            share = zero + of_prompt
        else:
            share = tl.where(positive, -slope_up * score, of_prompt)
        share = tl.where(both & (positive | negative), share, 0.0)
        share = tl.where(adv != adv, adv, share)
        slope = tl.where(positive, slope_up, tl.where(negative, slope_down, 0.0))
        tl.store(SHARES + at, share / tl.maximum(length, 1).to(tl.float64), mask=mine)
        tl.store(SHARES + sequences + at, tl.where(both, slope, 0.0), mask=mine)
    if p < prompts:
        tl.store(PRESENT + p, (ups + downs > 0).to(tl.int32))


@triton.jit
def _hinge(SUMS, NUMBERS, FACTORS, sequences, k, is_own, BLOCK: tl.constexpr):
    """Write the factor of term ``k`` if it is the program's own."""
    if is_own:
        found = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, sequences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            found += tl.load(SUMS + (1 + k) * sequences + s, mask=s < sequences, other=0.0)
        over = tl.sum(found, 0) - _number(NUMBERS, k, 2)
        over = tl.where(over < 0, 0.0, over)  # keeps NaN
        tl.store(FACTORS + k, _number(NUMBERS, k, 1) * over)


@kernel
def join_kernel(
    SUMS,
    LENGTHS,
    PROMPTS,
    NUMBERS,
    SHARES,
    PRESENT,
    FACTORS,
    size: tl.int64,
    sequences: tl.int64,
    prompts: tl.int64,
    KINDS: tl.constexpr,
    AT: tl.constexpr,
    PREFERS: tl.constexpr,
    HARD: tl.constexpr,
    BY_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what reductions make of the sums of sequences, but for the scale and the
    number of prompts.

    Term AT compares sequences. ``SHARES [2, S]`` has the contribution of each row of a
    sequence, and the slope. PRESENT says which prompts have a row. A prompt has
    ``size`` consecutive sequences, or PROMPTS ``[S]`` has the prompt of each, and
    ``prompts`` for none, which is one more program. FACTORS ``[K]`` are those of the
    hinges, from a further program each.
    """
    p = tl.program_id(0).to(tl.int64)
    programs = prompts + (1 if BY_INDEX else 0)
    if p < programs:
        begin, end = p * 0, p * 0 + sequences
        if not BY_INDEX:
            begin, end = p * size, (p + 1) * size
        if AT >= 0:
            _compare(
                SUMS,
                LENGTHS,
                PROMPTS,
                NUMBERS,
                SHARES,
                PRESENT,
                begin,
                end,
                p,
                prompts,
                sequences,
                AT,
                KINDS[AT],
                PREFERS,
                HARD,
                BY_INDEX,
                BLOCK,
            )
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == HINGE:
            _hinge(SUMS, NUMBERS, FACTORS, sequences, k, p == programs + k, BLOCK)


@triton.jit
def _of_row(
    SHARES, FACTORS, x, s, k: tl.constexpr, keep, per_prompt, scale, sequences, KIND: tl.constexpr
):
    """Return a row's contribution to term ``k`` and the slope by its weighted loss."""
    if KIND == LINEAR:
        return x, tl.full(x.shape, 1.0, tl.float64)
    if KIND == HINGE:
        factor = tl.load(FACTORS + k) * scale
        return x * factor, tl.zeros(x.shape, tl.float64) + factor
    there = keep & (s < sequences)
    share = tl.load(SHARES + s, mask=there, other=0.0) * per_prompt
    return share, tl.load(SHARES + sequences + s, mask=there, other=0.0) * per_prompt


@kernel
def contributions_kernel(
    EVALUATED,
    W,
    w_stride: tl.int64,
    KEEP,
    INDEX,
    LOGP,
    TRUST,
    NUMBERS,
    SHARES,
    PRESENT,
    FACTORS,
    OUT_W,
    OUT,
    UNKNOWN,
    length: tl.int64,
    total: tl.int64,
    sequences: tl.int64,
    prompts: tl.int64,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    HAS_TRUST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``OUT [2, N]``, the weighted loss and the loss, ``OUT_W [ROWS, N]``, the
    rows of W times the slopes of their terms, and UNKNOWN.

    A row of which something is NaN is unknown. Its weighted loss is NaN, and with
    HAS_LOGP the slope of a term that is NaN at a known log-prob. Otherwise all of its
    OUT_W are. Every program counts the prompts, and takes BLOCK rows.
    """
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, prompts, BLOCK):
        q = start + tl.arange(0, BLOCK)
        count += tl.load(PRESENT + q, mask=q < prompts, other=0)
    scale = tl.load(NUMBERS).to(tl.float64)
    if HAS_TRUST:
        scale += tl.load(TRUST).to(tl.float64)
    per_prompt = scale / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    keep = tl.load(KEEP + row, mask=inside, other=0) != 0
    s = tl.load(INDEX + row, mask=keep, other=0) if PACKED else row // length
    loss = tl.load(EVALUATED + row, mask=inside, other=0.0)
    unknown, weighted = loss != loss, tl.zeros((BLOCK,), tl.float64)
    for k in tl.static_range(len(KINDS)):
        x = tl.load(EVALUATED + (k + 1) * total + row, mask=inside, other=0.0).to(tl.float64)
        share, _ = _of_row(SHARES, FACTORS, x, s, k, keep, per_prompt, scale, sequences, KINDS[k])
        unknown |= x != x
        weighted += _number(NUMBERS, k, 0) * share
    unknown |= weighted != weighted
    weighted = tl.where(unknown, float("nan"), weighted)
    tl.store(OUT + row, weighted.to(tl.float32), mask=inside)
    tl.store(OUT + total + row, loss, mask=inside)
    tl.store(UNKNOWN + row, unknown & keep, mask=inside)
    for k in tl.static_range(ROWS):
        w = tl.load(W + k * w_stride + row, mask=inside, other=0.0)
        if k < len(KINDS):
            x = tl.load(EVALUATED + (k + 1) * total + row, mask=inside, other=0.0)
            x = x.to(tl.float64)
            _, slope = _of_row(
                SHARES, FACTORS, x, s, k, keep, per_prompt, scale, sequences, KINDS[k]
            )
            if HAS_LOGP and KINDS[k] != LINEAR:
                logp = tl.load(LOGP + row, mask=inside, other=0.0)
                slope = tl.where((x != x) & (logp == logp), float("nan"), slope)
            w = (w * slope).to(tl.float32)
        if not HAS_LOGP:
            w = tl.where(unknown, float("nan"), w)
        tl.store(OUT_W + k * total + row, w, mask=inside)
