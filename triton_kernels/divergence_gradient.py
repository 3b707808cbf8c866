"""The gradient of a divergence by the logits of p, from statistics of both tensors.

It has no sums, so its vectors begin where rows of the gradient are aligned
(:func:`.gradient.peeled`).
"""

import triton
import triton.language as tl

from . import math
from .sweep import LN2, base2_scale, capped
from .words import load_tile, numbers, round_to, store_run


@triton.jit
def _center(lse, low, T, k):
    """``(center, rest)`` with ``log2 p = (w - center)·k + rest``; center is T·lse,
    rounded.
    """
    center = T * lse
    return center, (tl.fma(T, lse, -center) + T * low) * -k


@triton.jit
def _gradient_columns(
    z, y, p_center, p_rest, kp, q_center, q_rest, kq, w_const, w_log, w_ratio, w_q, p_cap, q_cap,
    P_CAP: tl.constexpr, Q_CAP: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    """``p·(w_const + w_log·log2 p + w_ratio·(log2 p - log2 q)) - w_q·q``, times the
    slope of the cap.

    It is 0 where p has a ``-inf`` logit.
    """
    w, slope = capped(z, p_cap, P_CAP)
    v, _ = capped(y, q_cap, Q_CAP)
    a = tl.fma(w - p_center, kp, p_rest)
    b = tl.fma(v - q_center, kq, q_rest)
    # 2^-200 is 0, and 0 times a finite number is 0. Where q is 0 and p is not, the
    # caller has already made the row NaN.
    a = math.maximum(a, -200.0)
    p, q = tl.exp2(a), tl.exp2(b)
    factor = w_const
    if LOGS:
        factor = tl.fma(a, w_log, tl.fma(a - math.maximum(b, -1e30), w_ratio, w_const))
    g = p * factor - w_q * q
    if P_CAP:
        g = g * slope
    # NaN in every column of a NaN row, whose w_const is NaN; 0 at -inf in every other
    # row.
    return tl.where(z == float("-inf"), tl.where(w_const == w_const, 0.0, w_const), g)


@triton.jit
def _gradient_run(
    P,
    x,
    y,
    columns,
    p_center,
    p_rest,
    kp,
    q_center,
    q_rest,
    kq,
    w_const,
    w_log,
    w_ratio,
    w_q,
    p_cap,
    q_cap,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    LOGS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient of a run; ``x`` and ``y`` are fp32.

    It writes the whole run, or the whole vectors among the first ``columns``.
    """
    g = (
        _gradient_columns(
            x[0],
            y[0],
            p_center,
            p_rest,
            kp,
            q_center,
            q_rest,
            kq,
            w_const,
            w_log,
            w_ratio,
            w_q,
            p_cap,
            q_cap,
            P_CAP,
            Q_CAP,
            LOGS,
        ),
    )
    if E == 8:
        g = g + (
            _gradient_columns(
                x[1],
                y[1],
                p_center,
                p_rest,
                kp,
                q_center,
                q_rest,
                kq,
                w_const,
                w_log,
                w_ratio,
                w_q,
                p_cap,
                q_cap,
                P_CAP,
                Q_CAP,
                LOGS,
            ),
        )
    store_run(P, g, columns, SLOTS, E, EMULATE)


@triton.jit
def _single_columns(
    X,
    Y,
    OUT,
    first,
    stop,
    V,
    p_center,
    p_rest,
    kp,
    q_center,
    q_rest,
    kq,
    w_const,
    w_log,
    w_ratio,
    w_q,
    p_cap,
    q_cap,
    SLOTS: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    LOGS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient of at most SLOTS columns from ``first`` on, one by one."""
    column = first + tl.arange(0, SLOTS)
    there = column < tl.minimum(stop, V)
    z = tl.load(X + column, mask=there, other=float("-inf"), eviction_policy="evict_first")
    v = tl.load(Y + column, mask=there, other=float("-inf"), eviction_policy="evict_first")
    g = _gradient_columns(
        z.to(tl.float32),
        v.to(tl.float32),
        p_center,
        p_rest,
        kp,
        q_center,
        q_rest,
        kq,
        w_const,
        w_log,
        w_ratio,
        w_q,
        p_cap,
        q_cap,
        P_CAP,
        Q_CAP,
        LOGS,
    )
    tl.store(
        OUT + column,
        round_to(tl.where(there, g, 0.0), OUT.dtype.element_ty, EMULATE),
        mask=column < stop,
        eviction_policy="evict_first",
    )


@triton.jit
def row_gradient(
    X,
    Y,
    OUT,
    head,
    start,
    stop,
    V,
    T,
    T_OTHER,
    p_cap,
    q_cap,
    reverse,
    entropy,
    p_lse,
    p_low,
    q_lse,
    q_low,
    d_forward,
    d_reverse,
    d_entropy,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    LOGS: tl.constexpr,
    ALIGN: tl.constexpr,
    PEEL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient of columns ``start`` to ``stop``, last tile first, and of the
    columns that :func:`.gradient.peeled` left before them.

    L2 still holds what was read last.
    """
    kp, kq = base2_scale(T), base2_scale(T_OTHER)
    p_center, p_rest = _center(p_lse, p_low, T, kp)
    q_center, q_rest = _center(q_lse, q_low, T_OTHER, kq)
    w_const = d_forward
    w_log = 0.0 * w_const
    w_ratio = w_log
    if LOGS:
        w_const -= tl.where(d_reverse == 0.0, 0.0, d_reverse * reverse) + tl.where(
            d_entropy == 0.0, 0.0, d_entropy * entropy
        )
        w_log = d_entropy * -LN2
        w_ratio = d_reverse * LN2
    is_nan = (p_lse != p_lse) | (q_lse != q_lse) | ((d_reverse != 0.0) & (reverse == float("inf")))
    w_const = tl.where(is_nan, float("nan"), w_const / T)
    w_log, w_ratio, w_q = w_log / T, w_ratio / T, d_forward / T
    BLOCK: tl.constexpr = SLOTS * VECTORS * E
    p: tl.constexpr = X.dtype.element_ty
    q: tl.constexpr = Y.dtype.element_ty
    last = tl.minimum(stop, V)
    full = start + tl.maximum(last - start, 0) // BLOCK * BLOCK
    there = tl.where(full > start, BLOCK, 0)
    x = load_tile(X + (full - BLOCK), there, SLOTS, VECTORS, E, ALIGN, "evict_first")
    y = load_tile(Y + (full - BLOCK), there, SLOTS, VECTORS, E, ALIGN, "evict_first")
    for first in range(full, last // E * E, SLOTS * E):
        x_run = load_tile(X + first, last - first, SLOTS, 1, E, ALIGN, "evict_first")
        y_run = load_tile(Y + first, last - first, SLOTS, 1, E, ALIGN, "evict_first")
        _gradient_run(
            OUT + first,
            numbers(x_run[0], p, E),
            numbers(y_run[0], q, E),
            last - first,
            p_center,
            p_rest,
            kp,
            q_center,
            q_rest,
            kq,
            w_const,
            w_log,
            w_ratio,
            w_q,
            p_cap,
            q_cap,
            SLOTS,
            E,
            P_CAP,
            Q_CAP,
            LOGS,
            EMULATE,
        )
    # the rest of a vector, and padding
    for first in range(tl.maximum(start, last // E * E), stop, SLOTS):
        _single_columns(
            X,
            Y,
            OUT,
            first,
            stop,
            V,
            p_center,
            p_rest,
            kp,
            q_center,
            q_rest,
            kq,
            w_const,
            w_log,
            w_ratio,
            w_q,
            p_cap,
            q_cap,
            SLOTS,
            P_CAP,
            Q_CAP,
            LOGS,
            EMULATE,
        )
    if PEEL:
        _single_columns(
            X,
            Y,
            OUT,
            -tl.where(start == 0, head, 0),
            0,
            V,
            p_center,
            p_rest,
            kp,
            q_center,
            q_rest,
            kq,
            w_const,
            w_log,
            w_ratio,
            w_q,
            p_cap,
            q_cap,
            SLOTS,
            P_CAP,
            Q_CAP,
            LOGS,
            EMULATE,
        )
    for i in range((full - start) // BLOCK):
        first = full - (i + 1) * BLOCK
        there = tl.where(first > start, BLOCK, 0)
        x_ahead = load_tile(X + (first - BLOCK), there, SLOTS, VECTORS, E, ALIGN, "evict_first")
        y_ahead = load_tile(Y + (first - BLOCK), there, SLOTS, VECTORS, E, ALIGN, "evict_first")
        for j in tl.static_range(VECTORS):
            _gradient_run(
                OUT + (first + j * (SLOTS * E)),
                numbers(x[j], p, E),
                numbers(y[j], q, E),
                None,
                p_center,
                p_rest,
                kp,
                q_center,
                q_rest,
                kq,
                w_const,
                w_log,
                w_ratio,
                w_q,
                p_cap,
                q_cap,
                SLOTS,
                E,
                P_CAP,
                Q_CAP,
                LOGS,
                EMULATE,
            )
        x, y = x_ahead, y_ahead
