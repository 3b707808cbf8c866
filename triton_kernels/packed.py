"""Statistics and gradients of packed rows, one program per row.

BOUNDS gives the begin and the end of a row. The sweeps are those of rows of logits. IDS
are positions in a row. A row with a negative id is not read, and its gradient is not
written.
"""

import triton.language as tl

from .gradient import gradient_sweep, load_last_tiles, peeled, zero_sweep
from .kernels import OUT_OF_LOSS, _finish, _gradient_row, _reference_point, _target_logit, kernel
from .sweep import base2_scale, capped, swept_row


@kernel
def packed_stats_kernel(
    X,
    BOUNDS,
    IDS,
    T,
    OUT,
    N: tl.int64,
    t_stride: tl.int32,
    softcap,
    STATS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Like :func:`.kernels.stats_kernel`."""
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
    bad = (y < 0) & (y != OUT_OF_LOSS)
    for i in tl.static_range(6):
        if STATS[i] >= 0:
            tl.store(OUT + STATS[i] * N + row, tl.where(bad, float("nan"), result[i]))


@kernel
def packed_gradient_kernel(
    X,
    OUT,
    BOUNDS,
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
    N: tl.int64,
    t_stride: tl.int32,
    softcap,
    GIVEN: tl.constexpr,
    LOW: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Like :func:`.kernels.gradient_kernel`; OUT has X's layout and is
    another tensor."""
    row = tl.program_id(0)
    y = tl.load(IDS + row)
    if y >= 0:
        begin = tl.load(BOUNDS + row)
        V = (tl.load(BOUNDS + N + row) - begin).to(tl.int32)
        X = tl.multiple_of(X + begin, ALIGN)
        G, OUT, head, stop, width = peeled(X, OUT + begin, 0, V, V, V, True)
        zero = tl.full((), 0.0, tl.float32)
        d_logp = tl.load(D_LOGP + row) if GIVEN[0] else zero
        d_entropy = tl.load(D_H + row) if GIVEN[1] else zero
        d_lse = tl.load(D_LSE + row) if GIVEN[2] else zero
        d_p_sq = tl.load(D_P_SQ + row) if GIVEN[3] else zero
        if (d_logp != 0.0) | (d_entropy != 0.0) | (d_lse != 0.0) | (d_p_sq != 0.0):
            tiles = load_last_tiles(G, 0, stop, width, SLOTS, VECTORS, E, GRAD_ALIGN)
            w_y, slope = capped(_target_logit(X, y, y >= 0), softcap, CAP)
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
                0,
                stop,
                width,
                y.to(tl.int32) - head,
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
                True,
                EMULATE,
            )
        else:
            zero_sweep(OUT, head, 0, stop, SLOTS * VECTORS * E, E, True)
