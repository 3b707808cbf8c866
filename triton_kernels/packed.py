"""Statistics and gradients of packed rows: a program each, whose row begins and ends where BOUNDS says; the sweeps are those of rows of logits.

IDS are places in a row; a row whose id is negative is not read, nor is its gradient written.
"""

import triton.language as tl

from .kernels import OUT_OF_LOSS, _finish, _gradient_row, _reference_point, _target_logit, kernel
from .sweep import base2_scale, capped, gradient_sweep, load_last_tiles, swept_row, zero_sweep


@kernel
def packed_stats_kernel(
    X, BOUNDS, IDS, T, OUT, N: tl.int64, t_stride: tl.int32, softcap, STATS: tl.constexpr, SEGMENT: tl.constexpr, SLOTS: tl.constexpr,
    VECTORS: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ALIGN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """As :func:`.kernels.stats_kernel`."""
    row = tl.program_id(0)
    y = tl.load(IDS + row)
    zero = tl.full((), 0.0, tl.float32)
    logp, entropy, lse, lse_low, log_p_sq, max_logp = zero, zero, zero, zero, zero, zero
    if y >= 0:
        begin = tl.load(BOUNDS + row)
        V = (tl.load(BOUNDS + N + row) - begin).to(tl.int32)
        X = tl.multiple_of(X + begin, ALIGN)
        t = tl.load(T + row * t_stride)
        inside = y >= 0
        w_y, _ = capped(_target_logit(X, y, inside), softcap, CAP)
        k = base2_scale(t)
        top, rest, dot, rest_sq = swept_row(
            X, V, k, softcap, SEGMENT, SLOTS, VECTORS, E, AHEAD, CAP, STATS[1] >= 0, STATS[4] >= 0, ALIGN, "evict_first"
        )
        logp, entropy, lse, lse_low, log_p_sq, max_logp = _finish(top, rest, dot, rest_sq, w_y, inside, t)
    result = (logp, entropy, lse, lse_low, log_p_sq, max_logp)
    bad = (y < 0) & (y != OUT_OF_LOSS)
    for i in tl.static_range(6):
        if STATS[i] >= 0:
            tl.store(OUT + STATS[i] * N + row, tl.where(bad, float("nan"), result[i]))


@kernel
def packed_gradient_kernel(
    X, OUT, BOUNDS, IDS, T, LOGP, LSE, LSE_LOW, H, LOG_P_SQ, BY_LOGP, BY_H, BY_LSE, BY_P_SQ, N: tl.int64, t_stride: tl.int32, softcap,
    BY: tl.constexpr, LOW: tl.constexpr, SLOTS: tl.constexpr, VECTORS: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """As :func:`.kernels.gradient_kernel`; OUT is like X, and not X."""
    row = tl.program_id(0)
    y = tl.load(IDS + row)
    if y >= 0:
        begin = tl.load(BOUNDS + row)
        V = (tl.load(BOUNDS + N + row) - begin).to(tl.int32)
        X = tl.multiple_of(X + begin, ALIGN)
        OUT = tl.multiple_of(OUT + begin, ALIGN)
        zero = tl.full((), 0.0, tl.float32)
        by_logp = tl.load(BY_LOGP + row) if BY[0] else zero
        by_entropy = tl.load(BY_H + row) if BY[1] else zero
        by_lse = tl.load(BY_LSE + row) if BY[2] else zero
        by_p_sq = tl.load(BY_P_SQ + row) if BY[3] else zero
        if (by_logp != 0.0) | (by_entropy != 0.0) | (by_lse != 0.0) | (by_p_sq != 0.0):
            tiles = load_last_tiles(X, 0, V, V, SLOTS, VECTORS, E, ALIGN)
            w_y, slope = capped(_target_logit(X, y, y >= 0), softcap, CAP)
            t, logp, lse = tl.load(T + row * t_stride), tl.load(LOGP + row), tl.load(LSE + row)
            entropy = tl.load(H + row) if BY[1] else zero
            log_p_sq = tl.load(LOG_P_SQ + row) if BY[3] else zero
            k = base2_scale(t)
            A, B, C, at_target = _gradient_row(logp, entropy, by_logp, by_entropy, by_lse, by_p_sq, log_p_sq, w_y, slope, t, BY[1], BY[3])
            c, b = _reference_point(zero, lse, tl.load(LSE_LOW + row) if LOW else zero, t, k)
            gradient_sweep(
                X, OUT, tiles, 0, V, V, y.to(tl.int32), at_target, c, k, b, A, B, C, softcap, SLOTS, VECTORS, E, CAP, BY[1], BY[3], ALIGN,
                EMULATE,
            )  # fmt: skip
        else:
            zero_sweep(OUT, 0, V, SLOTS * VECTORS * E, E)
