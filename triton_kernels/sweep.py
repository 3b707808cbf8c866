"""The two sweeps over a row of logits that every kernel is made of: its statistics, and its gradient.

**Statistics.** ``w`` is the logit (softcapped if asked), ``k = log2(e) / T``, so ``p = 2^((w - m)·k) / S``. A tile is ``[R, E]`` with ``E``
the elements of one 16-byte load: each of the ``R`` slots keeps a running maximum and sums relative to it, so the hot loop needs one
exponential an element (and one a slot) and nothing from another thread. At the end of a segment the slots are brought to the
common maximum and added in 64-bit fixed point. Integer addition is associative: the result does not depend on how the compiler
lays a tile out over threads, hence not on the alignment of the row. Within a slot, the order is that of the columns.

**Segments.** A long row is cut into segments of fixed width whose results are merged in order. Who computes them, one program after
another or a program each, changes nothing in the result.

Contraction of ``a * b + c`` is off at launch, and written ``tl.fma`` where it is wanted: two kernels that share a sweep must round alike.
"""

import triton
import triton.language as tl

from . import math

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a running maximum starts: finite, so that -inf - m is -inf and not NaN
#: 2^x is 0 below -150; no exponent goes below this one.
FLOOR = tl.constexpr(-200.0)
_FIXED = tl.constexpr(1099511627776.0)  # 2⁴⁰: sums up to 2²³ fit in 63 bits, and 2⁻⁴⁰ is far below fp32's resolution at 1
_UNFIXED = tl.constexpr(9.094947017729282e-13)


@triton.jit
def row_offset(row, per_batch, batch_stride, row_stride):
    """Elements from the start of the tensor to row ``row`` (a 32-bit number, as are all counts of rows): int64."""
    batch = row // per_batch
    return batch.to(tl.int64) * batch_stride + (row - batch * per_batch).to(tl.int64) * row_stride


@triton.jit
def base2_scale(T):
    """``log2(e) / T``."""
    return tl.full((), LOG2E, tl.float32) / T


@triton.jit
def _exponent(d, k, b):
    """``d·k + b``, and FLOOR if that is less: the exponent of a p that is 0 should not be -inf, because 0 * -inf is NaN."""
    floor = tl.full((), FLOOR, tl.float32)  # with the constant itself on the left, the interpreters of Triton 3.7 and 3.8 fail
    return tl.fma(math.maximum(d, (floor - b) / k), k, b)


@triton.jit
def capped(z, softcap, CAP: tl.constexpr):
    """``w = softcap·tanh(z / softcap)`` and its slope; -inf stays -inf, and +inf becomes NaN as it does without a cap.

    With ``e = exp(-2|u|)``, ``tanh|u| = 1 - 2e/(1+e)`` and its slope is ``4e/(1+e)²``: formed from e and not from the tanh, of which ``1 - tanh²``
    would cancel all digits as the cap saturates. The quotient is corrected once: an ulp of w is an error of p for every column.
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
def _sum(x, R: tl.constexpr, E: tl.constexpr):
    """``[R, E]`` to ``[R]``: the sum of each slot, in an order that no layout can change."""
    if E == 8:
        a, b = _halves(x, R, 8)
        x = a + b
    if E >= 4:
        a, b = _halves(x, R, 4)
        x = a + b
    a, b = _halves(x, R, 2)
    return a + b


@triton.jit
def _dot2(x, y, total, R: tl.constexpr):
    x1, x2 = _halves(x, R, 2)
    y1, y2 = _halves(y, R, 2)
    return tl.fma(x2, y2, tl.fma(x1, y1, total))


@triton.jit
def _dot4(x, y, total, R: tl.constexpr):
    x1, x2 = _halves(x, R, 4)
    y1, y2 = _halves(y, R, 4)
    return _dot2(x2, y2, _dot2(x1, y1, total, R), R)


@triton.jit
def _dot(x, y, total, R: tl.constexpr, E: tl.constexpr):
    """``total`` plus the scalar product of each slot, likewise."""
    if E == 8:
        x1, x2 = _halves(x, R, 8)
        y1, y2 = _halves(y, R, 8)
        total = _dot4(x2, y2, _dot4(x1, y1, total, R), R)
    else:
        tl.static_assert(E == 4)
        total = _dot4(x, y, total, R)
    return total


@triton.jit
def _tile(z, m, s, u, q, k, softcap, R: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr):
    """One tile more. ``s``, ``u``, ``q``: sums of ``e``, ``e·x`` and ``e²`` with ``x = (w - m)·k`` and ``e = 2^x``."""
    w, _ = capped(z, softcap, CAP)
    top = tl.maximum(m, tl.max(w, 1))  # drops NaN; e keeps it
    shift = _exponent(m - top, k, 0.0)
    scale = tl.exp2(shift)
    x = _exponent(w - top[:, None], k, 0.0)
    e = tl.exp2(x)
    if ENTROPY:
        u = _dot(e, x, scale * tl.fma(shift, s, u), R, E)
    if P_SQ:
        q = _dot(e, e, scale * scale * q, R, E)
    return top, tl.fma(scale, s, _sum(e, R, E)), u, q


@triton.jit
def _total(x):
    return tl.sum((tl.where(x == x, x, 0.0) * _FIXED).to(tl.int64), 0).to(tl.float32) * _UNFIXED


@triton.jit
def segment_state(
    X, start, stop, k, softcap,
    BLOCK: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``(m, S, U, Q)`` of the columns ``start`` to ``stop`` of the row at ``X``. KEEP: the row is read again soon, hold it in L2."""
    R: tl.constexpr = BLOCK // E
    cols = tl.arange(0, R)[:, None] * E + tl.arange(0, E)[None, :]
    m = tl.full([R], LOWEST, tl.float32)
    s = tl.zeros([R], tl.float32)
    u = tl.zeros([R], tl.float32)
    q = tl.zeros([R], tl.float32)
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    full = start + (stop - start) // BLOCK * BLOCK
    for c in range(start, full, BLOCK):
        z = tl.load(X + c + cols, eviction_policy=policy).to(tl.float32)
        m, s, u, q = _tile(z, m, s, u, q, k, softcap, R, E, CAP, ENTROPY, P_SQ)
    if full < stop:
        z = tl.load(X + full + cols, mask=full + cols < stop, other=float("-inf"), eviction_policy=policy).to(tl.float32)
        m, s, u, q = _tile(z, m, s, u, q, k, softcap, R, E, CAP, ENTROPY, P_SQ)
    # To the common maximum. Integers know no NaN, so it is looked for apart.
    top = tl.max(m, 0)
    shift = _exponent(m - top, k, 0.0)
    scale = tl.exp2(shift)
    S = _total(scale * s)
    U = S * 0.0
    Q = S * 0.0
    if ENTROPY:
        U = _total(scale * tl.fma(shift, s, u))
    if P_SQ:
        Q = _total(scale * scale * q)
    sick = tl.max(tl.where(s == s, 0, 1), 0) > 0
    return top, tl.where(sick | (top == float("inf")), float("nan"), S), U, Q


@triton.jit
def merge(m1, s1, u1, q1, m2, s2, u2, q2, k):
    """The state of two segments, in this order."""
    top = tl.maximum(m1, m2)
    d1, d2 = _exponent(m1 - top, k, 0.0), _exponent(m2 - top, k, 0.0)
    a1, a2 = tl.exp2(d1), tl.exp2(d2)
    u = tl.fma(a1, tl.fma(d1, s1, u1), a2 * tl.fma(d2, s2, u2))
    return top, tl.fma(a1, s1, a2 * s2), u, tl.fma(a1 * a1, q1, a2 * a2 * q2)


@triton.jit
def row_state(
    X, PARTIAL, V, k, softcap, SEGMENT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``(m, S, U, Q)`` of a whole row, swept here or (SPLIT) read from ``PARTIAL``; NaN sums if no logit is above -inf."""
    m = tl.full((), LOWEST, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    u = s
    q = s
    for i in range(tl.cdiv(V, SEGMENT)):
        if SPLIT:
            P = PARTIAL + i * 4
            m2, s2, u2, q2 = tl.load(P), tl.load(P + 1), tl.load(P + 2), tl.load(P + 3)
        else:
            m2, s2, u2, q2 = segment_state(
                X, i * SEGMENT, tl.minimum(V, i * SEGMENT + SEGMENT), k, softcap, BLOCK, E, CAP, ENTROPY, P_SQ, KEEP
            )
        m, s, u, q = merge(m, s, u, q, m2, s2, u2, q2, k)
    return m, tl.where(s > 0.0, s, float("nan")), u, q


@triton.jit
def gradient_tile(z, c, k, b, A, B, C, softcap, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr):
    """``p·(A + B·log2 p + C·p)`` with ``log2 p = (w - c)·k + b``, times the slope of the cap."""
    w, slope = capped(z, softcap, CAP)
    log2_p = _exponent(w - c, k, b)
    p = tl.exp2(log2_p)
    factor = A
    if ENTROPY:
        factor = tl.fma(B, log2_p, A)
    if P_SQ:
        factor = tl.fma(C, p, factor)
    g = p * factor
    if CAP:
        g = g * slope
    return g


@triton.jit
def round_to(g, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """To nearest even, as hardware does. Triton's interpreter truncates to bfloat16: EMULATE there."""
    if EMULATE:
        bits = g.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        g = tl.where(g == g, rounded.to(tl.float32, bitcast=True), g)
    return g.to(dtype)


@triton.jit
def gradient_sweep(
    X, OUT, start, stop, V, y, at_target, c, k, b, A, B, C, softcap,
    BLOCK: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the columns ``start`` (a multiple of BLOCK) to ``stop``, last tile first: what was read last is still in L2.

    Columns from ``V`` on are not in the softmax, they get zeros. The target's column ``y`` (-1: none) is written over at the end.
    """
    cols = tl.arange(0, BLOCK // E)[:, None] * E + tl.arange(0, E)[None, :]
    full = tl.maximum(start, tl.minimum(stop, V) // BLOCK * BLOCK)
    for first in range(full, stop, BLOCK):
        z = tl.load(X + first + cols, mask=first + cols < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        g = gradient_tile(z, c, k, b, A, B, C, softcap, CAP, ENTROPY, P_SQ)
        g = tl.where(first + cols < V, g, 0.0)
        tl.store(OUT + first + cols, round_to(g, OUT.dtype.element_ty, EMULATE), mask=first + cols < stop, eviction_policy="evict_first")
    for i in range((full - start) // BLOCK):
        first = full - (i + 1) * BLOCK
        z = tl.load(X + first + cols, eviction_policy="evict_first").to(tl.float32)
        g = gradient_tile(z, c, k, b, A, B, C, softcap, CAP, ENTROPY, P_SQ)
        tl.store(OUT + first + cols, round_to(g, OUT.dtype.element_ty, EMULATE), eviction_policy="evict_first")
    if (y >= start) & (y < stop):
        tl.debug_barrier()  # another thread has just written this column
        tl.store(OUT + y, round_to(at_target, OUT.dtype.element_ty, EMULATE))


@triton.jit
def zero_sweep(OUT, start, stop, BLOCK: tl.constexpr, E: tl.constexpr):
    """Exact zeros, without reading anything."""
    cols = tl.arange(0, BLOCK // E)[:, None] * E + tl.arange(0, E)[None, :]
    zero = tl.zeros([BLOCK // E, E], OUT.dtype.element_ty)
    full = start + (stop - start) // BLOCK * BLOCK
    for first in range(start, full, BLOCK):
        tl.store(OUT + first + cols, zero, eviction_policy="evict_first")
    if full < stop:
        tl.store(OUT + full + cols, zero, mask=full + cols < stop, eviction_policy="evict_first")
