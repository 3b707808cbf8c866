"""The kernels that the backend launches.

A program is a row. Scalars compute what a row needs once, before and between its
sweeps.

Every kernel takes the strides of the rows (``per_batch, batch_stride, row_stride``),
the ``V`` columns of the softmax, the shard (``vocab_start``) and the size of the whole
vocabulary (``vocab_total``). None of these, nor ``N``, nor an address, causes a
recompilation. ``ALIGN`` is the alignment of all rows of logits in bytes, by class: 16,
4, or the element's size. ``PEEL`` says that not all rows of the gradient begin at a
multiple of 16 bytes. Its whole vectors begin at the first one of each row, where
``GRAD_ALIGN`` is the alignment of the logits.
"""

import inspect

import triton
import triton.language as tl

from . import math
from .gradient import gradient_sweep, load_last_tiles, own_column, peeled, zero_sweep
from .sweep import (
    LN2,
    base2_scale,
    capped,
    first_tiles,
    merged_row,
    row_offset,
    segment_slots,
    store_slots,
    swept_row,
)

OUT_OF_LOSS = tl.constexpr(-100)


def kernel(fn):
    """``triton.jit`` that specializes only on types and constants.

    No value and no address of an argument causes a compilation.
    """
    return triton.jit(
        fn,
        do_not_specialize=[
            name
            for name, kind in inspect.signature(fn).parameters.items()
            if kind.annotation is not tl.constexpr
        ],
    )


@triton.jit
def _target(IDS, row, vocab_start, vocab_total, V):
    """``(y, keep, bad, inside)`` of a row.

    y is the id as a column of this shard. keep: the row is in the loss. bad: the id is
    outside the vocabulary. inside: the id is in this shard.
    """
    y = tl.load(IDS + row)
    keep = y != OUT_OF_LOSS
    bad = keep & ((y < 0) | (y >= vocab_total))
    local = y - vocab_start
    return local, keep, bad, keep & (bad == 0) & (local >= 0) & (local < V)


@triton.jit
def _target_logit(X, y, inside):
    """The target's logit in fp32; -inf if another shard has the target (``inside`` is
    false).
    """
    return tl.load(X + tl.where(inside, y, 0), mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _split_row(PARTIAL, row, V, SEGMENT: tl.constexpr, SLOTS: tl.constexpr):
    """Pointers to what is stored of a split row.

    They point to the slots of its segments, and to the row's state (4 numbers) and the
    target's logit.
    """
    size = tl.cdiv(V, SEGMENT) * (4 * SLOTS)
    P = PARTIAL + row.to(tl.int64) * (size + 5)
    return P, P + size


@triton.jit
def _columns(width, SPLIT: tl.constexpr, CHUNK: tl.constexpr):
    """``(row, start, stop)``: the columns whose gradient this program writes.

    These are all columns of a row or (SPLIT) CHUNK of them.
    """
    pid = tl.program_id(0)
    if SPLIT:
        chunks = tl.cdiv(width, CHUNK)
        start = (pid % chunks) * CHUNK
        return pid // chunks, start, tl.minimum(width, start + CHUNK)
    else:
        return pid, 0, width


@triton.jit
def _two_sum(a, b):
    """``a + b`` and its exact rounding error (Knuth); the error is 0 if the sum is not
    finite.
    """
    s = a + b
    v = s - a
    return s, tl.where(tl.abs(s) < float("inf"), (a - (s - v)) + (b - v), 0.0)


@triton.jit
def _finish(top, rest, dot, rest_sq, w_y, inside, T):
    """``(logp, entropy, lse, lse_low, log_sum_p_sq, max_logp)`` of a row from its
    state.
    """
    log_sum = math.log1p(rest)
    # (w_y - top)/T - log_sum, rounded once: its absolute error is the relative error of
    # a ratio and of a gradient.
    w, lost = _two_sum(w_y, -top)
    d = w / T
    lost += tl.where(tl.abs(d) < float("inf"), tl.fma(-d, T, w), 0.0)
    x, more = _two_sum(d, -log_sum)
    logp = tl.where(
        inside, x + (more + lost / T), tl.where(rest == rest, float("-inf"), float("nan"))
    )
    largest = top / T
    lse, lse_lost = _two_sum(largest, log_sum)
    lse_low = tl.where(
        lse == lse,
        lse_lost + tl.where(tl.abs(largest) < float("inf"), tl.fma(-largest, T, top), 0.0) / T,
        lse,
    )
    # merging the shards of a row needs this mark
    lse_low = tl.where(top == float("-inf"), top, lse_low)
    return (
        logp,
        log_sum - dot / (1.0 + rest) * LN2,
        lse,
        lse_low,
        math.log1p(rest_sq) - 2.0 * log_sum,
        0.0 - log_sum,
    )


@kernel
def partial_kernel(
    X,
    IDS,
    T,
    PARTIAL,
    t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    V: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Write the slots of each segment to PARTIAL, one program per segment.

    The first program also stores the target's logit, which the next launch may
    overwrite.
    """
    segments = tl.cdiv(V, SEGMENT)
    pid = tl.program_id(0)
    row = pid // segments
    start = (pid % segments) * SEGMENT
    y, keep, bad, inside = _target(IDS, row, vocab_start, vocab_total, V)
    if keep & (bad == 0):
        X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
        k = base2_scale(tl.load(T + row * t_stride))
        stop = tl.minimum(V, start + SEGMENT)
        tiles = first_tiles(X + start, stop - start, SLOTS, VECTORS, E, AHEAD, ALIGN, POLICY)
        top, sum, dot, sum_sq, _ = segment_slots(
            X,
            tiles,
            start,
            stop,
            stop,
            k,
            softcap,
            SLOTS,
            VECTORS,
            E,
            AHEAD,
            CAP,
            True,
            True,
            ALIGN,
            POLICY,
        )
        P, STATE = _split_row(PARTIAL, row, V, SEGMENT, SLOTS)
        store_slots(P + (pid % segments) * (4 * SLOTS), top, sum, dot, sum_sq, SLOTS)
        if start == 0:
            tl.store(STATE + 4, _target_logit(X, y, inside))


@kernel
def merge_kernel(
    X,
    IDS,
    T,
    PARTIAL,
    t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    V: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Compute the states of split rows from their segments.

    It runs before anything overwrites the columns that it may have to read again.
    """
    row = tl.program_id(0)
    _, keep, bad, _ = _target(IDS, row, vocab_start, vocab_total, V)
    if keep & (bad == 0):
        X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
        k = base2_scale(tl.load(T + row * t_stride))
        P, STATE = _split_row(PARTIAL, row, V, SEGMENT, SLOTS)
        top, rest, dot, rest_sq = merged_row(
            P, X, V, k, softcap, SEGMENT, SLOTS, E, CAP, True, True
        )
        tl.store(STATE, top)
        tl.store(STATE + 1, rest)
        tl.store(STATE + 2, dot)
        tl.store(STATE + 3, rest_sq)


@kernel
def stats_kernel(
    X,
    IDS,
    T,
    PARTIAL,
    OUT,
    N: tl.int64,
    t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    V: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    STATS: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Write ``OUT[STATS[name], row]``.

    STATS is the row of each of (logp, entropy, lse, lse_low, log_sum_p_sq, max_logp),
    or -1 for a statistic that is not requested.
    """
    row = tl.program_id(0)
    y, keep, bad, inside = _target(IDS, row, vocab_start, vocab_total, V)
    zero = tl.full((), 0.0, tl.float32)
    logp, entropy, lse, lse_low, log_p_sq, max_logp = zero, zero, zero, zero, zero, zero
    if keep & (bad == 0):
        X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
        t = tl.load(T + row * t_stride)
        w_y, _ = capped(_target_logit(X, y, inside), softcap, CAP)
        k = base2_scale(t)
        if SPLIT:
            P, _ = _split_row(PARTIAL, row, V, SEGMENT, SLOTS)
            top, rest, dot, rest_sq = merged_row(
                P, X, V, k, softcap, SEGMENT, SLOTS, E, CAP, STATS[1] >= 0, STATS[4] >= 0
            )
        else:
            top, rest, dot, rest_sq = swept_row(
                X,
                V,
                k,
                softcap,
                SEGMENT,
                SLOTS,
                VECTORS,
                E,
                AHEAD,
                CAP,
                STATS[1] >= 0,
                STATS[4] >= 0,
                ALIGN,
                "evict_first",
            )
        logp, entropy, lse, lse_low, log_p_sq, max_logp = _finish(
            top, rest, dot, rest_sq, w_y, inside, t
        )
    result = (logp, entropy, lse, lse_low, log_p_sq, max_logp)
    for i in tl.static_range(6):
        if STATS[i] >= 0:
            tl.store(OUT + STATS[i] * N + row, tl.where(bad, float("nan"), result[i]))


@triton.jit
def _reference_point(w, r, low, T, k):
    """``(c, b)`` with ``log2 p = (w_v - c)·k + b``, given ``lse = w/T + r + low``.

    ``low`` is what rounding lost. c is ``T·lse``, and b is the small rest of its
    rounding (exact, by two-sum): near c, where p is large, the difference then has no
    error of the size of lse.
    """
    c = tl.fma(T, r, w)
    s, lost = _two_sum(w, -c)
    return c, tl.fma(T, low, tl.fma(T, r, s) + lost) * -k


@triton.jit
def _gradient_row(
    logp,
    entropy,
    d_logp,
    d_entropy,
    d_lse,
    d_p_sq,
    log_sum_p_sq,
    w_y,
    slope,
    T,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
):
    """``(A, B, C, at_target)`` of :func:`.gradient.gradient_tile`, divided by T.

    The gradient is ``p·(d_lse - d_logp - d_entropy·(log p + H) + 2·d_p_sq·(p/Σp² -
    1))``, plus ``d_logp`` in the target's column. There ``1 - p`` comes from ``logp``:
    a rounded p would lose all its digits as p goes to 1.
    """
    A = d_lse - d_logp
    B = 0.0 * A
    C = 0.0 * A
    if ENTROPY:
        A -= tl.where(d_entropy == 0.0, 0.0, d_entropy * entropy)
        B = d_entropy * -LN2
    if P_SQ:
        A -= 2.0 * d_p_sq
        C = tl.where(d_p_sq == 0.0, 0.0, 2.0 * d_p_sq * math.exp(-log_sum_p_sq))
    p = math.exp(logp)
    rest = d_lse
    if ENTROPY:
        rest -= tl.where(d_entropy == 0.0, 0.0, d_entropy * (tl.maximum(logp, -200.0) + entropy))
    if P_SQ:
        rest += tl.where(d_p_sq == 0.0, 0.0, 2.0 * d_p_sq * math.expm1(logp - log_sum_p_sq))
    at_target = p * rest - d_logp * math.expm1(logp)
    masked = (w_y == float("-inf")) & (at_target == at_target)
    return A / T, B / T, C / T, tl.where(masked, 0.0, at_target * slope) / T


@kernel
def loss_grad_kernel(
    X,
    OUT,
    IDS,
    T,
    W,
    OLD,
    ADV,
    REF,
    SAMPLING,
    PARAMS,
    PARTIAL,
    ROWS,
    N: tl.int64,
    t_stride: tl.int32,
    w_stride: tl.int64,
    has_old: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    V: tl.int32,
    width: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    PROGRAM: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    READS_P_SQ: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    PEEL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Compute statistics, ``PROGRAM`` and gradient of a row in one program.

    With SPLIT, a program takes the state that merge_kernel found and writes CHUNK
    columns of the gradient. Every program of a split row evaluates ``PROGRAM``; the
    first one writes the row's outputs.
    """
    row, start, stop = _columns(width, SPLIT, CHUNK)
    y, keep, bad, inside = _target(IDS, row, vocab_start, vocab_total, V)
    X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
    OUT = OUT + row_offset(row, per_batch, out_batch_stride, out_row_stride)
    OUT = tl.multiple_of(OUT, 1 if PEEL else 16)
    G, OUT, head, stop, columns = peeled(X, OUT, start, stop, V, width, PEEL)
    zero = tl.full((), 0.0, tl.float32)
    logp, entropy, weighted, loss, d_logp, d_entropy = zero, zero, zero, zero, zero, zero
    has_gradient = y != y
    if keep & (bad == 0):
        t = tl.load(T + row * t_stride)
        k = base2_scale(t)
        if SPLIT:
            _, STATE = _split_row(PARTIAL, row, V, SEGMENT, SLOTS)
            top, rest, dot, rest_sq = (
                tl.load(STATE),
                tl.load(STATE + 1),
                tl.load(STATE + 2),
                tl.load(STATE + 3),
            )
            z_y = tl.load(STATE + 4)
        else:
            top, rest, dot, rest_sq = swept_row(
                X,
                V,
                k,
                softcap,
                SEGMENT,
                SLOTS,
                VECTORS,
                E,
                AHEAD,
                CAP,
                True,
                READS_P_SQ,
                ALIGN,
                "evict_last",
            )
            z_y = _target_logit(X, y, inside)
        tiles = load_last_tiles(G, start, stop, columns, SLOTS, VECTORS, E, GRAD_ALIGN)
        w_y, slope = capped(z_y, softcap, CAP)
        # every thread has it before one overwrites it with the gradient
        tl.debug_barrier()
        logp, entropy, _, _, log_sum_p_sq, _ = _finish(top, rest, dot, rest_sq, w_y, inside, t)
        old = tl.where(has_old != 0, tl.load(OLD + row), logp)
        adv, ref, sampling = tl.load(ADV + row), tl.load(REF + row), tl.load(SAMPLING + row)
        weighted, loss, d_logp, d_entropy, d_p_sq = PROGRAM(
            PARAMS, W + row, w_stride, logp, old, ref, sampling, adv, entropy, log_sum_p_sq
        )
        has_gradient = (d_logp != 0.0) | (d_entropy != 0.0) | (d_p_sq != 0.0)
        if has_gradient:
            A, B, C, at_target = _gradient_row(
                logp,
                entropy,
                d_logp,
                d_entropy,
                0.0,
                d_p_sq,
                log_sum_p_sq,
                w_y,
                slope,
                t,
                ENTROPY,
                P_SQ,
            )
            c, b = _reference_point(top, math.log1p(rest), zero, t, k)
            column = tl.where(inside, y, -1).to(tl.int32) - head
            gradient_sweep(
                G,
                OUT,
                tiles,
                head,
                start,
                stop,
                columns,
                column,
                at_target,
                c,
                k,
                b,
                A,
                B,
                C,
                softcap,
                SLOTS,
                VECTORS,
                E,
                CAP,
                ENTROPY,
                P_SQ,
                GRAD_ALIGN,
                PEEL,
                EMULATE,
            )
    if has_gradient == 0:
        zero_sweep(OUT, head, start, stop, SLOTS * VECTORS * E, E, PEEL)
    if start == 0:
        R = ROWS + row
        tl.store(R, tl.where(bad, float("nan"), logp))
        tl.store(R + N, tl.where(bad, float("nan"), entropy))
        tl.store(R + 2 * N, tl.where(bad, float("nan"), weighted))
        tl.store(R + 3 * N, tl.where(bad, float("nan"), loss))
        tl.store(R + 4 * N, tl.where(bad, float("nan"), d_logp))
        tl.store(R + 5 * N, tl.where(bad, float("nan"), d_entropy))


@kernel
def gradient_kernel(
    X,
    OUT,
    IDS,
    T,
    LOGP,
    LSE,
    LSE_LOW,
    H,
    LOG_P_SQ,
    D_LOGP,
    D_H,
    D_LSE,
    D_P_SQ,
    t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    V: tl.int32,
    width: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    GIVEN: tl.constexpr,
    LOW: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    PEEL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient from given statistics, one program per row or (SPLIT) per
    CHUNK columns.

    GIVEN says which of (logp, entropy, lse, log_sum_p_sq) have derivatives. LOW says
    that LSE_LOW holds what rounding lse lost. Only the program that overwrites the
    target's logit reads it.
    """
    row, start, stop = _columns(width, SPLIT, CHUNK)
    y, keep, bad, inside = _target(IDS, row, vocab_start, vocab_total, V)
    X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
    OUT = OUT + row_offset(row, per_batch, out_batch_stride, out_row_stride)
    OUT = tl.multiple_of(OUT, 1 if PEEL else 16)
    G, OUT, head, stop, V = peeled(X, OUT, start, stop, V, width, PEEL)
    column = tl.where(inside, y, -1).to(tl.int32) - head
    zero = tl.full((), 0.0, tl.float32)
    d_logp = tl.load(D_LOGP + row) if GIVEN[0] else zero
    d_entropy = tl.load(D_H + row) if GIVEN[1] else zero
    d_lse = tl.load(D_LSE + row) if GIVEN[2] else zero
    d_p_sq = tl.load(D_P_SQ + row) if GIVEN[3] else zero
    if (
        keep
        & (bad == 0)
        & ((d_logp != 0.0) | (d_entropy != 0.0) | (d_lse != 0.0) | (d_p_sq != 0.0))
    ):
        tiles = load_last_tiles(G, start, stop, V, SLOTS, VECTORS, E, GRAD_ALIGN)
        mine = inside & own_column(column, head, start, stop, PEEL)
        w_y, slope = capped(_target_logit(X, y, mine), softcap, CAP)
        # every thread has it before one overwrites it with the gradient
        tl.debug_barrier()
        t, logp, lse = tl.load(T + row * t_stride), tl.load(LOGP + row), tl.load(LSE + row)
        entropy = tl.load(H + row) if GIVEN[1] else zero
        log_p_sq = tl.load(LOG_P_SQ + row) if GIVEN[3] else zero
        k = base2_scale(t)
        A, B, C, at_target = _gradient_row(
            logp,
            entropy,
            d_logp,
            d_entropy,
            d_lse,
            d_p_sq,
            log_p_sq,
            w_y,
            slope,
            t,
            GIVEN[1],
            GIVEN[3],
        )
        c, b = _reference_point(zero, lse, tl.load(LSE_LOW + row) if LOW else zero, t, k)
        gradient_sweep(
            G,
            OUT,
            tiles,
            head,
            start,
            stop,
            V,
            column,
            at_target,
            c,
            k,
            b,
            A,
            B,
            C,
            softcap,
            SLOTS,
            VECTORS,
            E,
            CAP,
            GIVEN[1],
            GIVEN[3],
            GRAD_ALIGN,
            PEEL,
            EMULATE,
        )
    else:
        zero_sweep(OUT, head, start, stop, SLOTS * VECTORS * E, E, PEEL)
