"""The sweep over a row of logits for its statistics. The other sweep, for its gradient,
is in :mod:`.gradient`.

**Statistics.** ``w`` is the logit (with the softcap, if there is one), ``k = log2(e) /
T``, so ``p = 2^((w - top)·k) / Σ``. A state is ``(top, rest, dot, rest_sq)``: the
largest logit, and with ``x = (w - top)·k`` and ``e = 2^x`` the sums ``Σe - 1``,
``Σe·x`` and ``Σe² - 1``. The largest logit's own ``e`` is exactly 1 and is left out:
its log-prob, ``-log1p(rest)``, then has all its digits however close p is to 1.

A tile is ``VECTORS`` runs of ``[SLOTS, E]`` columns; ``E`` is the number of elements of
one 16-byte load (:mod:`.words`). A slot is one row of each run. It keeps its own
maximum and sums relative to it, so that the loop needs one exponential per element (and
one per slot and tile) and nothing from another thread. At the end of a row the slots
are added in 64-bit fixed point. Integer addition is associative: the result depends
neither on the compiler's layout of a tile over threads nor on the number of threads,
and hence not on the alignment of the row.

**Segments.** A long row is cut into segments of fixed width. A slot's sums of one
segment are merged with its sums of the next in order. One program may compute all
segments, or each segment may have its own program: the result is the same.

**Loads** of the next tile, or of the next two (AHEAD), are issued before the current
tile's arithmetic, also across segments.

The launch turns off contraction of ``a * b + c``, and the code writes ``tl.fma`` where
it is wanted: two kernels that share a sweep must round alike.
"""

import triton
import triton.language as tl

from . import math
from .words import load_elements, load_tile, numbers, tile_numbers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# start of a running maximum; it is finite so that -inf - m is -inf and not NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
#: 2^x is 0 below -150. No exponent goes below this one.
FLOOR = tl.constexpr(-200.0)
# 2⁴⁰: sums up to 2²³ fit in 63 bits, and 2⁻⁴⁰ is far below fp32's resolution at 1
_FIXED = tl.constexpr(1099511627776.0)
_UNFIXED = tl.constexpr(9.094947017729282e-13)
# an exponent is at most 200: sums that are 200 times as large still fit
_DOT = tl.constexpr(0.00390625)
#: A sum that includes the 1 of the largest logit is rounded to 2⁻²⁴ with each tile.
#: Below this rest, 160 tiles could cost the rest 1 %.
SURE = tl.constexpr(2.0**-10)


@triton.jit
def row_offset(row, per_batch, batch_stride, row_stride):
    """Offset of row ``row`` in elements, as int64.

    ``row`` is a 32-bit number, as all counts of rows are.
    """
    batch = row // per_batch
    return batch.to(tl.int64) * batch_stride + (row - batch * per_batch).to(tl.int64) * row_stride


@triton.jit
def base2_scale(T):
    """``log2(e) / T``."""
    return tl.full((), LOG2E, tl.float32) / T


@triton.jit
def exponent(d, k, b):
    """``d·k + b``, at least FLOOR.

    The exponent of p = 0 must not be -inf, because 0 * -inf is NaN.
    """
    # the interpreters of Triton 3.7 and 3.8 fail with the constant itself on the left
    floor = tl.full((), FLOOR, tl.float32)
    return tl.fma(math.maximum(d, (floor - b) / k), k, b)


@triton.jit
def capped(z, softcap, CAP: tl.constexpr):
    """``w = softcap·tanh(z / softcap)`` and its slope; -inf stays -inf, and +inf
    becomes NaN.

    Without a cap, +inf also makes the row NaN. With ``e = exp(-2|u|)``, ``tanh|u| = 1 -
    2e/(1+e)`` and its slope is ``4e/(1+e)²``. The slope comes from e and not from the
    tanh, because ``1 - tanh²`` would cancel all digits as the cap saturates. The
    quotient is corrected once: an ulp of w is an error of p for every column.
    """
    if CAP:
        u = z * (1.0 / softcap)
        size = tl.abs(u)
        e = tl.exp(-2.0 * size)
        q = 2.0 / (1.0 + e)
        q = tl.fma(tl.fma(-q, 1.0 + e, 2.0) * 0.5, q, q)
        t = tl.where(size < 0.625, math.tanh_of_small(size), 1.0 - e * q)
        w = softcap * tl.where(u < 0.0, -t, t)
        return tl.where(size < float("inf"), w, tl.where(u > 0.0, float("nan"), u)), e * q * q
    else:
        return z, 1.0


@triton.jit
def _halves(x, R: tl.constexpr, E: tl.constexpr):
    return tl.split(tl.reshape(x, [R, E // 2, 2]) if E > 2 else x)


@triton.jit
def slot_sum(x, R: tl.constexpr):
    """Sum of each slot, ``[R, 4]`` to ``[R]``, in an order that no layout
    can change."""
    a, b = _halves(x, R, 4)
    a, b = _halves(a + b, R, 2)
    return a + b


@triton.jit
def slot_dot(x, y, total, R: tl.constexpr):
    """``total`` plus the scalar product of each slot, in an order that no layout can
    change.
    """
    x1, x2 = _halves(x, R, 4)
    y1, y2 = _halves(y, R, 4)
    x11, x12 = _halves(x1, R, 2)
    y11, y12 = _halves(y1, R, 2)
    total = tl.fma(x12, y12, tl.fma(x11, y11, total))
    x21, x22 = _halves(x2, R, 2)
    y21, y22 = _halves(y2, R, 2)
    return tl.fma(x22, y22, tl.fma(x21, y21, total))


@triton.jit
def _logits(z, softcap, CAP: tl.constexpr):
    w, _ = capped(z[0], softcap, CAP)
    ws = (w,)
    for i in tl.static_range(1, len(z)):
        w, _ = capped(z[i], softcap, CAP)
        ws = ws + (w,)
    return ws


@triton.jit
def _tile(
    z,
    top,
    sum,
    dot,
    sum_sq,
    k,
    softcap,
    SLOTS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
):
    """Add one tile, ``z`` in fp32, to the slots.

    A slot holds its largest logit and its sums of ``e``, ``e·x`` and ``e²``.
    """
    ws = _logits(z, softcap, CAP)
    largest = ws[0]
    for i in tl.static_range(1, len(z)):
        largest = tl.maximum(largest, ws[i])
    before = top
    top = tl.maximum(top, tl.max(largest, 1))  # drops NaN; e keeps it
    shift = exponent(before - top, k, 0.0)
    scale = tl.exp2(shift)
    if ENTROPY:
        dot = scale * tl.fma(shift, sum, dot)
    if P_SQ:
        sum_sq = scale * scale * sum_sq
    more = tl.zeros([SLOTS, 4], tl.float32)
    for i in tl.static_range(len(z)):
        d = ws[i] - top[:, None]
        # without a dot, no product has an exponent of -inf
        x = exponent(d, k, 0.0) if ENTROPY else d * k
        e = tl.exp2(x)
        more = e if i == 0 else more + e
        if ENTROPY:
            dot = slot_dot(e, x, dot, SLOTS)
        if P_SQ:
            sum_sq = slot_dot(e, e, sum_sq, SLOTS)
    return top, tl.fma(scale, sum, slot_sum(more, SLOTS)), dot, sum_sq


@triton.jit
def _fixed(x):
    return (tl.where(x == x, x, 0.0) * _FIXED).to(tl.int64)


@triton.jit
def _unfixed(total):
    return total.to(tl.float32) * _UNFIXED


@triton.jit
def pack(high, low):
    """Pack two 32-bit numbers into one of 64 bits."""
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low.to(tl.int32, bitcast=True).to(
        tl.uint32, bitcast=True
    ).to(tl.int64)


@triton.jit
def high(pair):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def low(pair):
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _sum4(a, b, c, d):
    """Four sums of ``[SLOTS]`` by one reduction over the threads."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def rest_of_slot(
    X, V, slot, top, k, softcap, SLOTS: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr
):
    """``Σe`` of one slot's columns of a row, without the largest logit, which occurs
    there once.

    The sum is relatively exact. It reads a few hundred columns.
    """
    lane = tl.arange(0, SLOTS)
    second = tl.full([SLOTS], LOWEST, tl.float32)
    sum = tl.zeros([SLOTS], tl.float32)
    for first in range(0, tl.cdiv(V, SLOTS * E) * E, SLOTS):
        i = first + lane
        column = i // E * (SLOTS * E) + slot * E + i % E
        w, _ = capped(
            tl.load(X + column, mask=column < V, other=float("-inf")).to(tl.float32), softcap, CAP
        )
        w = tl.where(w == top, float("-inf"), w)
        larger = tl.maximum(second, w)
        sum = tl.fma(tl.exp2(exponent(second - larger, k, 0.0)), sum, tl.exp2((w - larger) * k))
        second = larger
    largest = tl.max(second, 0)
    total = _unfixed(tl.sum(_fixed(tl.exp2(exponent(second - largest, k, 0.0)) * sum), 0))
    return total * tl.exp2(exponent(largest - top, k, 0.0))


@triton.jit
def row_of_slots(
    X,
    V,
    k,
    softcap,
    top,
    sum,
    dot,
    sum_sq,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
):
    """The state of a row from those of its slots.

    It is NaN if no logit is above -inf; top is then -inf unless a logit is NaN. The
    slot with the largest logit leads. The others are added relative to (a power of 2
    near) the largest among them, because 2⁻⁴⁰ of the leader may be more than they have.
    Where the leader's sum rounds to 1, its columns other than the largest are lost;
    then they are read again.
    """
    largest, lead = tl.max(top, 0, return_indices=True, return_indices_tie_break_left=True)
    leads = tl.arange(0, SLOTS) == lead
    second = tl.max(tl.where(leads, LOWEST, top), 0)
    step = exponent(tl.where(leads, 0.0, top - largest), k, 0.0)
    lift = -tl.floor(
        exponent(second - largest, k, 0.0)
        # An integer: a power of 2 does not round. One rounding of all slots would not
        # average out.
    )
    to_top = tl.exp2(-lift)
    scale = tl.where(leads, 0.0, tl.exp2(step + lift))
    none = tl.zeros([SLOTS], tl.int32)
    is_nan = tl.where(sum == sum, none, 1)  # integers cannot hold a NaN
    S, U, of_leader, more = _sum4(
        _fixed(scale * sum),
        _fixed(scale * tl.fma(step, sum, dot) * _DOT) if ENTROPY else none.to(tl.int64),
        tl.where(leads, pack(sum, dot), none.to(tl.int64)),
        pack(tl.where(leads, sum_sq, 0.0), is_nan),
    )
    of_lead = high(of_leader) - 1.0
    # Round once where a log-prob shows it: the sum is rounded as an integer.
    together = _unfixed((S >> tl.minimum(lift, 15.0).to(tl.int64)) + _fixed(of_lead))
    rest = tl.where(lift < 15.0, together, tl.fma(to_top, _unfixed(S), of_lead))
    rest_dot = rest * 0.0
    rest_sq = rest * 0.0
    if ENTROPY:
        rest_dot = tl.fma(to_top, _unfixed(U) * (1.0 / _DOT), low(of_leader))
    if P_SQ:
        square = tl.where(leads, 0.0, tl.exp2(step))
        rest_sq = _unfixed(tl.sum(_fixed(square * square * sum_sq), 0)) + (high(more) - 1.0)
    if (rest < SURE) & (rest > -0.5):
        rest = tl.fma(
            to_top, _unfixed(S), rest_of_slot(X, V, lead, largest, k, softcap, SLOTS, E, CAP)
        )
        # a sum of squares is at most rest², too small to change Σp²
        rest_sq = tl.minimum(tl.maximum(rest_sq, 0.0), rest * rest)
    is_nan = (more.to(tl.int32) > 0) | (largest == float("inf"))
    empty = (rest <= -1.0) & (is_nan == 0)
    return (
        tl.where(empty, float("-inf"), largest),
        tl.where(is_nan | empty, float("nan"), rest),
        rest_dot,
        rest_sq,
    )


@triton.jit
def first_tiles(
    X,
    V,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    AHEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The first tiles of a sweep of ``V`` columns: one, or two if AHEAD is 2."""
    z = load_tile(X, V, SLOTS, VECTORS, E, ALIGN, POLICY)
    if AHEAD == 1:
        return (z,)
    else:
        BLOCK: tl.constexpr = SLOTS * VECTORS * E
        return z, load_tile(X + BLOCK, V - BLOCK, SLOTS, VECTORS, E, ALIGN, POLICY)


@triton.jit
def segment_slots(
    X,
    tiles,
    start,
    stop,
    limit,
    k,
    softcap,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    AHEAD: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    ALIGN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Slots of columns ``start`` to ``stop`` of the row at ``X``, and the AHEAD tiles
    after them.

    ``tiles`` are the first AHEAD tiles. Nothing is read at or after ``limit``.
    """
    BLOCK: tl.constexpr = SLOTS * VECTORS * E
    dtype: tl.constexpr = X.dtype.element_ty
    top, sum, dot, sum_sq = no_slots(SLOTS)
    full = start + (stop - start) // BLOCK * BLOCK
    # up to there, the loaded tile is whole
    whole = tl.maximum(start, tl.minimum(full, (limit // BLOCK - AHEAD) * BLOCK))
    for c in range(start, whole, BLOCK):
        ahead = load_tile(X + c + AHEAD * BLOCK, None, SLOTS, VECTORS, E, ALIGN, POLICY)
        w = tile_numbers(tiles[0], VECTORS, dtype, E)
        top, sum, dot, sum_sq = _tile(
            w, top, sum, dot, sum_sq, k, softcap, SLOTS, CAP, ENTROPY, P_SQ
        )
        tiles = (ahead,) if AHEAD == 1 else (tiles[1], ahead)
    for c in range(whole, full, BLOCK):
        there = limit - (c + AHEAD * BLOCK)
        ahead = load_tile(X + c + AHEAD * BLOCK, there, SLOTS, VECTORS, E, ALIGN, POLICY)
        w = tile_numbers(tiles[0], VECTORS, dtype, E)
        top, sum, dot, sum_sq = _tile(
            w, top, sum, dot, sum_sq, k, softcap, SLOTS, CAP, ENTROPY, P_SQ
        )
        tiles = (ahead,) if AHEAD == 1 else (tiles[1], ahead)
    for i in tl.static_range(VECTORS):
        if full + i * (SLOTS * E) < stop:  # the last tile of a row, run by run
            w = numbers(tiles[0][i], dtype, E)
            top, sum, dot, sum_sq = _tile(
                w, top, sum, dot, sum_sq, k, softcap, SLOTS, CAP, ENTROPY, P_SQ
            )
    if stop % E != 0:  # the rest of a vector, in its column's slot
        first = stop // (SLOTS * E) * (SLOTS * E)
        w = numbers(
            load_elements(X + first, stop // E * E - first, stop - first, SLOTS, E, POLICY),
            dtype,
            E,
        )
        top, sum, dot, sum_sq = _tile(
            w, top, sum, dot, sum_sq, k, softcap, SLOTS, CAP, ENTROPY, P_SQ
        )
    return top, sum, dot, sum_sq, tiles


@triton.jit
def no_slots(SLOTS: tl.constexpr):
    zero = tl.zeros([SLOTS], tl.float32)
    return tl.full([SLOTS], LOWEST, tl.float32), zero, zero, zero


@triton.jit
def merge_slots(top1, sum1, dot1, sq1, top2, sum2, dot2, sq2, k):
    """The slots of two segments, merged in this order."""
    top = tl.maximum(top1, top2)
    d1, d2 = exponent(top1 - top, k, 0.0), exponent(top2 - top, k, 0.0)
    a1, a2 = tl.exp2(d1), tl.exp2(d2)
    dot = tl.fma(a1, tl.fma(d1, sum1, dot1), a2 * tl.fma(d2, sum2, dot2))
    return top, tl.fma(a1, sum1, a2 * sum2), dot, tl.fma(a1 * a1, sq1, a2 * a2 * sq2)


@triton.jit
def swept_row(
    X,
    V,
    k,
    softcap,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    AHEAD: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    ALIGN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The state of a whole row."""
    top, sum, dot, sum_sq = no_slots(SLOTS)
    tiles = first_tiles(X, V, SLOTS, VECTORS, E, AHEAD, ALIGN, POLICY)
    for start in range(0, V, SEGMENT):
        stop = tl.minimum(V, start + SEGMENT)
        top2, sum2, dot2, sq2, tiles = segment_slots(
            X,
            tiles,
            start,
            stop,
            V,
            k,
            softcap,
            SLOTS,
            VECTORS,
            E,
            AHEAD,
            CAP,
            ENTROPY,
            P_SQ,
            ALIGN,
            POLICY,
        )
        top, sum, dot, sum_sq = merge_slots(top, sum, dot, sum_sq, top2, sum2, dot2, sq2, k)
    return row_of_slots(X, V, k, softcap, top, sum, dot, sum_sq, SLOTS, E, CAP, ENTROPY, P_SQ)


@triton.jit
def store_slots(P, top, sum, dot, sum_sq, SLOTS: tl.constexpr):
    P += tl.arange(0, SLOTS)
    tl.store(P, top)
    tl.store(P + SLOTS, sum)
    tl.store(P + 2 * SLOTS, dot)
    tl.store(P + 3 * SLOTS, sum_sq)


@triton.jit
def merged_row(
    P,
    X,
    V,
    k,
    softcap,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
):
    """The state of a row from the slots of its segments, which are at ``P``."""
    top, sum, dot, sum_sq = no_slots(SLOTS)
    P += tl.arange(0, SLOTS)
    for _ in range(tl.cdiv(V, SEGMENT)):
        top2, sum2, dot2, sq2 = (
            tl.load(P),
            tl.load(P + SLOTS),
            tl.load(P + 2 * SLOTS),
            tl.load(P + 3 * SLOTS),
        )
        top, sum, dot, sum_sq = merge_slots(top, sum, dot, sum_sq, top2, sum2, dot2, sq2, k)
        P += 4 * SLOTS
    return row_of_slots(X, V, k, softcap, top, sum, dot, sum_sq, SLOTS, E, CAP, ENTROPY, P_SQ)
