"""Two logits tensors: divergences of their softmaxes and the gradient by the first. A program a row, in tiles as in :mod:`.sweep`.

p is the softmax of X, q that of Y. With ``x = (w - m)·k`` (base 2, relative to a slot's running maximum) and ``e = 2^x`` a slot holds, for each tensor,
``S = Σ e``, ``U = Σ e·x`` and ``C = Σ e·(own x - the other's x)``: where the distributions are close, the differences themselves are small.
"""

import triton
import triton.language as tl

from . import math
from .kernels import kernel
from .sweep import LN2, LOWEST, base2_scale, capped, row_offset, slot_dot, slot_sum, zero_sweep
from .words import round_to

_FIXED = tl.constexpr(1125899906842624.0)  # 2⁵⁰: a thousand elements of that size fit in 63 bits


@triton.jit
def _step(m, top, k):
    """The exponent by which what a slot holds shrinks when its maximum goes from m to top. Bounded: a slot that holds nothing, or only columns
    that are masked by the lowest number, would have -inf there, and 0 times that is NaN."""
    return tl.maximum((m - top) * k, -1e30)


@triton.jit
def _moved(step, own_step, S, U, C):
    """A slot's sums relative to another maximum; ``step``: its own, ``own_step``: its own less the other tensor's."""
    scale = tl.exp2(step)
    return scale * S, scale * tl.fma(step, S, U), scale * tl.fma(own_step, S, C)


@triton.jit
def _exponent(w, top, k):
    """``log2 e`` of columns. Only -inf is probability 0: a number that masks, so low that the product overflows, is not, or slots that hold nothing
    else would disagree with the others."""
    a = (w - top[:, None]) * k
    return tl.where((a < -1e30) & (w > float("-inf")), -1e30, a)


@triton.jit
def _tile(
    z, y, m, S, U, C, n, P, Q, D, p_zero, q_zero, kp, kq, p_cap, q_cap,
    R: tl.constexpr, E: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr,
):  # fmt: skip
    """One tile more. ``m, S, U, C`` belong to p, ``n, P, Q, D`` to q."""
    w, _ = capped(z, p_cap, P_CAP)
    v, _ = capped(y, q_cap, Q_CAP)
    p_top, q_top = tl.maximum(m, tl.max(w, 1)), tl.maximum(n, tl.max(v, 1))  # drops NaN; e keeps it
    p_step, q_step = _step(m, p_top, kp), _step(n, q_top, kq)
    S, U, C = _moved(p_step, p_step - q_step, S, U, C)
    P, Q, D = _moved(q_step, q_step - p_step, P, Q, D)
    a, b = _exponent(w, p_top, kp), _exponent(v, q_top, kq)
    p_dead, q_dead = a == float("-inf"), b == float("-inf")
    e, f = tl.exp2(a), tl.exp2(b)
    d = tl.where(p_dead | q_dead, 0.0, a - b)
    S += _sum(e, R, E)
    P += _sum(f, R, E)
    U = _dot(e, tl.where(p_dead, 0.0, a), U, R, E)
    Q = _dot(f, tl.where(q_dead, 0.0, b), Q, R, E)
    C = _dot(e, d, C, R, E)
    D = _dot(f, 0.0 - d, D, R, E)
    p_zero = tl.maximum(p_zero, tl.max(tl.where(p_dead & (q_dead == 0), 1, 0), 1))
    q_zero = tl.maximum(q_zero, tl.max(tl.where(q_dead & (p_dead == 0), 1, 0), 1))
    return p_top, S, U, C, q_top, P, Q, D, p_zero, q_zero


@triton.jit
def _total(x):
    """The sum of ``[R]`` without its NaNs, in 64-bit fixed point relative to its largest element: no layout can change it."""
    x = tl.where(x == x, x, 0.0)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-20)
    return tl.sum((x * (_FIXED / largest)).to(tl.int64), 0).to(tl.float32) * (largest / _FIXED)


@triton.jit
def _lse(m, k, log_s, T):
    """``m/T + log_s`` as a value and what its rounding lost."""
    r = m / T
    value = r + log_s
    return value, ((r - value) + log_s) + tl.fma(-r, T, m) / T


@triton.jit
def _row_stats(
    X, Y, V, T, T_OTHER, p_cap, q_cap,
    BLOCK: tl.constexpr, E: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The eight numbers of the table of a row."""
    R: tl.constexpr = BLOCK // E
    cols = tl.arange(0, R)[:, None] * E + tl.arange(0, E)[None, :]
    kp, kq = base2_scale(T), base2_scale(T_OTHER)
    m = tl.full([R], LOWEST, tl.float32)
    n = tl.full([R], LOWEST, tl.float32)
    S = tl.zeros([R], tl.float32)
    U, C, P, Q, D = S, S, S, S, S
    p_zero = tl.zeros([R], tl.int32)
    q_zero = p_zero
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    full = V // BLOCK * BLOCK
    for c in range(0, full, BLOCK):
        z = tl.load(X + c + cols, eviction_policy=policy).to(tl.float32)
        y = tl.load(Y + c + cols, eviction_policy=policy).to(tl.float32)
        m, S, U, C, n, P, Q, D, p_zero, q_zero = _tile(
            z, y, m, S, U, C, n, P, Q, D, p_zero, q_zero, kp, kq, p_cap, q_cap, R, E, P_CAP, Q_CAP
        )
    if full < V:
        there = full + cols < V
        z = tl.load(X + full + cols, mask=there, other=float("-inf"), eviction_policy=policy).to(tl.float32)
        y = tl.load(Y + full + cols, mask=there, other=float("-inf"), eviction_policy=policy).to(tl.float32)
        m, S, U, C, n, P, Q, D, p_zero, q_zero = _tile(
            z, y, m, S, U, C, n, P, Q, D, p_zero, q_zero, kp, kq, p_cap, q_cap, R, E, P_CAP, Q_CAP
        )
    # To the common maxima.
    p_top, q_top = tl.max(m, 0), tl.max(n, 0)
    p_step, q_step = _step(m, p_top, kp), _step(n, q_top, kq)
    S, U, C = _moved(p_step, p_step - q_step, S, U, C)
    P, Q, D = _moved(q_step, q_step - p_step, P, Q, D)
    finite = (tl.max(tl.where(S == S, 0, 1), 0) == 0) & (tl.max(tl.where(P == P, 0, 1), 0) == 0)  # integers know no NaN
    S, U, C, P, Q, D = _total(S), _total(U), _total(C), _total(P), _total(Q), _total(D)
    sound = finite & (S > 0.0) & (P > 0.0) & (p_top < float("inf")) & (q_top < float("inf"))
    nan = float("nan")
    S, P = tl.where(sound, S, nan), tl.where(sound, P, nan)
    log_s, log_p = math.log(S), math.log(P)
    gap = log_s - log_p
    forward = math.maximum(D / P * LN2 + gap, 0.0)
    reverse = math.maximum(C / S * LN2 - gap, 0.0)
    forward = tl.where((tl.max(p_zero, 0) > 0) & (forward == forward), float("inf"), forward)
    reverse = tl.where((tl.max(q_zero, 0) > 0) & (reverse == reverse), float("inf"), reverse)
    p_lse, p_low = _lse(p_top, kp, log_s, T)
    q_lse, q_low = _lse(q_top, kq, log_p, T_OTHER)
    return forward, reverse, log_s - U / S * LN2, log_p - Q / P * LN2, p_lse, p_low, q_lse, q_low


@triton.jit
def _center(lse, low, T, k):
    """``(c, b)`` with ``log2 p = (w - c)·k + b``: c is T·lse rounded, b its rest."""
    c = T * lse
    return c, (tl.fma(T, lse, -c) + T * low) * -k


@triton.jit
def _gradient_tile(
    z, y, cp, bp, kp, cq, bq, kq, A, B, C, F, p_cap, q_cap, P_CAP: tl.constexpr, Q_CAP: tl.constexpr, LOGS: tl.constexpr
):  # fmt: skip
    """``p·(A + B·log2 p + C·(log2 p - log2 q)) - F·q``, times the slope of the cap; 0 where p has a ``-inf`` logit."""
    w, slope = capped(z, p_cap, P_CAP)
    v, _ = capped(y, q_cap, Q_CAP)
    a = tl.fma(w - cp, kp, bp)
    b = tl.fma(v - cq, kq, bq)
    # 2^-200 is 0, and 0 times anything finite is 0; where q is 0 and p is not, the caller has made the row NaN.
    a = math.maximum(a, -200.0)
    p, q = tl.exp2(a), tl.exp2(b)
    factor = A
    if LOGS:
        factor = tl.fma(a, B, tl.fma(a - math.maximum(b, -1e30), C, A))
    g = p * factor - F * q
    if P_CAP:
        g = g * slope
    return tl.where(z == float("-inf"), 0.0, g)


@triton.jit
def _row_gradient(
    X, Y, OUT, V, width, T, T_OTHER, p_cap, q_cap, reverse, entropy, p_lse, p_low, q_lse, q_low, by_forward, by_reverse, by_entropy,
    BLOCK: tl.constexpr, E: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr, LOGS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write the gradient row, last tile first: what was read last is still in L2."""
    kp, kq = base2_scale(T), base2_scale(T_OTHER)
    cp, bp = _center(p_lse, p_low, T, kp)
    cq, bq = _center(q_lse, q_low, T_OTHER, kq)
    A = by_forward
    B = 0.0 * A
    C = B
    if LOGS:
        A -= tl.where(by_reverse == 0.0, 0.0, by_reverse * reverse) + tl.where(by_entropy == 0.0, 0.0, by_entropy * entropy)
        B = by_entropy * -LN2
        C = by_reverse * LN2
    sick = (p_lse != p_lse) | (q_lse != q_lse) | ((by_reverse != 0.0) & (reverse == float("inf")))
    A = tl.where(sick, float("nan"), A / T)
    B, C, F = B / T, C / T, by_forward / T
    cols = tl.arange(0, BLOCK // E)[:, None] * E + tl.arange(0, E)[None, :]
    full = V // BLOCK * BLOCK
    for first in range(full, width, BLOCK):
        there = first + cols < V
        z = tl.load(X + first + cols, mask=there, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        y = tl.load(Y + first + cols, mask=there, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        g = _gradient_tile(z, y, cp, bp, kp, cq, bq, kq, A, B, C, F, p_cap, q_cap, P_CAP, Q_CAP, LOGS)
        g = tl.where(there, tl.where(sick, float("nan"), g), 0.0)
        tl.store(OUT + first + cols, round_to(g, OUT.dtype.element_ty, EMULATE), mask=first + cols < width, eviction_policy="evict_first")
    for i in range(full // BLOCK):
        first = full - (i + 1) * BLOCK
        z = tl.load(X + first + cols, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(Y + first + cols, eviction_policy="evict_first").to(tl.float32)
        g = _gradient_tile(z, y, cp, bp, kp, cq, bq, kq, A, B, C, F, p_cap, q_cap, P_CAP, Q_CAP, LOGS)
        g = tl.where(sick, float("nan"), g)
        tl.store(OUT + first + cols, round_to(g, OUT.dtype.element_ty, EMULATE), eviction_policy="evict_first")


@kernel
def divergence_kernel(
    X, Y, OUT, IDS, T, T_OTHER, TABLE, COEFS,
    N: tl.int64, t_stride: tl.int32, other_t_stride: tl.int32,
    per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, other_batch_stride: tl.int64, other_row_stride: tl.int64,
    out_batch_stride: tl.int64, out_row_stride: tl.int64, V: tl.int32, width: tl.int32, p_cap, q_cap,
    STATS: tl.constexpr, GRAD: tl.constexpr, LOGS: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr, ALIGN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A row: STATS writes ``TABLE [8, N]``, else it is read; GRAD writes ``OUT`` by the coefficients ``COEFS [3, N]``."""
    row = tl.program_id(0)
    keep = tl.load(IDS + row) != -100
    X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
    Y = tl.multiple_of(Y + row_offset(row, per_batch, other_batch_stride, other_row_stride), ALIGN)
    G = TABLE + row
    t, u = tl.load(T + row * t_stride), tl.load(T_OTHER + row * other_t_stride)
    zero = tl.full((), 0.0, tl.float32)
    forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low = zero, zero, zero, zero, zero, zero, zero, zero
    if STATS:
        if keep:
            forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low = _row_stats(
                X, Y, V, t, u, p_cap, q_cap, BLOCK, E, P_CAP, Q_CAP, GRAD
            )
        values = (forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low)
        for i in tl.static_range(8):
            tl.store(G + i * N, values[i])
    else:
        reverse, entropy = tl.load(G + N), tl.load(G + 2 * N)
        p_lse, p_low, q_lse, q_low = tl.load(G + 4 * N), tl.load(G + 5 * N), tl.load(G + 6 * N), tl.load(G + 7 * N)
    if GRAD:
        B = COEFS + row
        by_forward, by_reverse, by_entropy = tl.load(B), tl.load(B + N), tl.load(B + 2 * N)
        OUT = tl.multiple_of(OUT + row_offset(row, per_batch, out_batch_stride, out_row_stride), ALIGN)
        live = keep & ((by_forward != 0.0) | (by_reverse != 0.0) | (by_entropy != 0.0))
        if live:
            _row_gradient(
                X, Y, OUT, V, width, t, u, p_cap, q_cap, reverse, entropy, p_lse, p_low, q_lse, q_low, by_forward, by_reverse, by_entropy,
                BLOCK, E, P_CAP, Q_CAP, LOGS, EMULATE,
            )  # fmt: skip
        else:
            zero_sweep(OUT, 0, width, BLOCK, E)
