"""Divergences of the softmaxes of two logits tensors, and the gradient by the first.

Tiles, slots and segments are as in :mod:`.sweep`. p is the softmax of X, and q that of
Y. With ``x = (w - max)·k`` (base 2, relative to a slot's running maximum) and ``e =
2^x``, a slot holds for each tensor ``sum = Σe``, ``dot = Σe·x`` and ``cross = Σe·(own x
- the other's x)``: where the distributions are close, the differences themselves are
small. A slot also holds two flags: whether a column has p = 0 < q, and whether a column
has q = 0 < p.
"""

import triton
import triton.language as tl

from . import math
from .divergence_gradient import row_gradient
from .gradient import peeled, zero_sweep
from .kernels import OUT_OF_LOSS, kernel
from .sweep import (
    LN2,
    LOWEST,
    SURE,
    base2_scale,
    capped,
    high,
    low,
    pack,
    rest_of_slot,
    row_offset,
    slot_dot,
    slot_sum,
)
from .words import load_elements, load_tile, numbers

# 2⁵⁰: a thousand elements of that size fit in 63 bits
_FIXED = tl.constexpr(1125899906842624.0)
# the least size of a sum: its quotient with 2⁵⁰ is still finite
_SMALLEST = tl.constexpr(4e-24)
#: Numbers of a slot, and rows of a table of slots.
SLOT = tl.constexpr(10)


@triton.jit
def _step(before, top, k):
    """Exponent by which a slot's sums shrink when its maximum grows to top.

    It is bounded. A slot that holds nothing, or only columns that are masked by the
    lowest number, would otherwise get -inf, and 0 times -inf is NaN.
    """
    return tl.maximum((before - top) * k, -1e30)


@triton.jit
def _moved(step, own_step, sum, dot, cross):
    """A slot's sums relative to another maximum.

    ``step`` is its own exponent; ``own_step`` is its own minus the other tensor's.
    """
    scale = tl.exp2(step)
    return scale * sum, scale * tl.fma(step, sum, dot), scale * tl.fma(own_step, sum, cross)


@triton.jit
def _both_moved(state, p_top, q_top, kp, kq):
    """The slots relative to the given maxima."""
    p_max, p_sum, p_dot, p_cross, q_max, q_sum, q_dot, q_cross, p_zero, q_zero = state
    p_step, q_step = _step(p_max, p_top, kp), _step(q_max, q_top, kq)
    p_sum, p_dot, p_cross = _moved(p_step, p_step - q_step, p_sum, p_dot, p_cross)
    q_sum, q_dot, q_cross = _moved(q_step, q_step - p_step, q_sum, q_dot, q_cross)
    return p_top, p_sum, p_dot, p_cross, q_top, q_sum, q_dot, q_cross, p_zero, q_zero


@triton.jit
def _exponent(w, top, k):
    """``log2 e`` of columns.

    Only -inf has probability 0. A finite masking number may overflow the product, but
    must not count as -inf: slots that hold only such numbers would disagree with the
    others.
    """
    a = (w - top[:, None]) * k
    return tl.where((a < -1e30) & (w > float("-inf")), -1e30, a)


@triton.jit
def _logits(z, cap, CAP: tl.constexpr):
    w, _ = capped(z[0], cap, CAP)
    if len(z) == 1:
        return (w,)
    else:
        odd, _ = capped(z[1], cap, CAP)
        return w, odd


@triton.jit
def _run(
    x, y, state, kp, kq, p_cap, q_cap, SLOTS: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr
):
    """Add one run to the slots; ``x`` and ``y`` are fp32."""
    ws, vs = _logits(x, p_cap, P_CAP), _logits(y, q_cap, Q_CAP)
    # drops NaN; e keeps it
    p_top, q_top = tl.maximum(state[0], tl.max(ws[0], 1)), tl.maximum(state[4], tl.max(vs[0], 1))
    for i in tl.static_range(1, len(x)):
        p_top, q_top = tl.maximum(p_top, tl.max(ws[i], 1)), tl.maximum(q_top, tl.max(vs[i], 1))
    p_max, p_sum, p_dot, p_cross, q_max, q_sum, q_dot, q_cross, p_zero, q_zero = _both_moved(
        state, p_top, q_top, kp, kq
    )
    for i in tl.static_range(len(x)):
        a, b = _exponent(ws[i], p_top, kp), _exponent(vs[i], q_top, kq)
        p_masked, q_masked = a == float("-inf"), b == float("-inf")
        e, f = tl.exp2(a), tl.exp2(b)
        d = tl.where(p_masked | q_masked, 0.0, a - b)
        p_sum += slot_sum(e, SLOTS)
        q_sum += slot_sum(f, SLOTS)
        p_dot = slot_dot(e, tl.where(p_masked, 0.0, a), p_dot, SLOTS)
        q_dot = slot_dot(f, tl.where(q_masked, 0.0, b), q_dot, SLOTS)
        p_cross = slot_dot(e, d, p_cross, SLOTS)
        q_cross = slot_dot(f, 0.0 - d, q_cross, SLOTS)
        p_zero = tl.maximum(p_zero, tl.max(tl.where(p_masked & (q_masked == 0), 1.0, 0.0), 1))
        q_zero = tl.maximum(q_zero, tl.max(tl.where(q_masked & (p_masked == 0), 1.0, 0.0), 1))
    return p_max, p_sum, p_dot, p_cross, q_max, q_sum, q_dot, q_cross, p_zero, q_zero


@triton.jit
def _no_slots(SLOTS: tl.constexpr):
    zero = tl.zeros([SLOTS], tl.float32)
    lowest = tl.full([SLOTS], LOWEST, tl.float32)
    return lowest, zero, zero, zero, lowest, zero, zero, zero, zero, zero


@triton.jit
def _merged(state, other, kp, kq):
    """The slots of two segments, merged in this order."""
    p_top, q_top = tl.maximum(state[0], other[0]), tl.maximum(state[4], other[4])
    s, o = _both_moved(state, p_top, q_top, kp, kq), _both_moved(other, p_top, q_top, kp, kq)
    return (
        p_top, s[1] + o[1], s[2] + o[2], s[3] + o[3], q_top, s[5] + o[5], s[6] + o[6], s[7] + o[7],
        tl.maximum(s[8], o[8]), tl.maximum(s[9], o[9]),
    )  # fmt: skip


@triton.jit
def _segment_slots(
    X,
    Y,
    x,
    y,
    start,
    stop,
    limit,
    kp,
    kq,
    p_cap,
    q_cap,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Slots of columns ``start`` to ``stop`` of the rows at ``X`` and ``Y``, and the
    next tiles.

    ``x`` and ``y`` are the first tiles of these columns. Nothing is read at or after
    ``limit``.
    """
    BLOCK: tl.constexpr = SLOTS * VECTORS * E
    p: tl.constexpr = X.dtype.element_ty
    q: tl.constexpr = Y.dtype.element_ty
    state = _no_slots(SLOTS)
    full = start + (stop - start) // BLOCK * BLOCK
    for c in range(start, full - BLOCK, BLOCK):
        x_ahead = load_tile(X + c + BLOCK, None, SLOTS, VECTORS, E, ALIGN, POLICY)
        y_ahead = load_tile(Y + c + BLOCK, None, SLOTS, VECTORS, E, ALIGN, POLICY)
        for i in tl.static_range(VECTORS):
            state = _run(
                numbers(x[i], p, E),
                numbers(y[i], q, E),
                state,
                kp,
                kq,
                p_cap,
                q_cap,
                SLOTS,
                P_CAP,
                Q_CAP,
            )
        x, y = x_ahead, y_ahead
    if full > start:
        x_ahead = load_tile(X + full, limit - full, SLOTS, VECTORS, E, ALIGN, POLICY)
        y_ahead = load_tile(Y + full, limit - full, SLOTS, VECTORS, E, ALIGN, POLICY)
        for i in tl.static_range(VECTORS):
            state = _run(
                numbers(x[i], p, E),
                numbers(y[i], q, E),
                state,
                kp,
                kq,
                p_cap,
                q_cap,
                SLOTS,
                P_CAP,
                Q_CAP,
            )
        x, y = x_ahead, y_ahead
    for i in tl.static_range(VECTORS):
        if full + i * (SLOTS * E) < stop:  # the last tile of a row, run by run
            state = _run(
                numbers(x[i], p, E),
                numbers(y[i], q, E),
                state,
                kp,
                kq,
                p_cap,
                q_cap,
                SLOTS,
                P_CAP,
                Q_CAP,
            )
    if stop % E != 0:  # the rest of a vector, in its column's slot
        first = stop // (SLOTS * E) * (SLOTS * E)
        x_last = load_elements(X + first, stop // E * E - first, stop - first, SLOTS, E, POLICY)
        y_last = load_elements(Y + first, stop // E * E - first, stop - first, SLOTS, E, POLICY)
        state = _run(
            numbers(x_last, p, E),
            numbers(y_last, q, E),
            state,
            kp,
            kq,
            p_cap,
            q_cap,
            SLOTS,
            P_CAP,
            Q_CAP,
        )
    return state, x, y


@triton.jit
def _swept_slots(
    X,
    Y,
    V,
    kp,
    kq,
    p_cap,
    q_cap,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The slots of whole rows."""
    state = _no_slots(SLOTS)
    x = load_tile(X, V, SLOTS, VECTORS, E, ALIGN, POLICY)
    y = load_tile(Y, V, SLOTS, VECTORS, E, ALIGN, POLICY)
    for start in range(0, V, SEGMENT):
        stop = tl.minimum(V, start + SEGMENT)
        more, x, y = _segment_slots(
            X,
            Y,
            x,
            y,
            start,
            stop,
            V,
            kp,
            kq,
            p_cap,
            q_cap,
            SLOTS,
            VECTORS,
            E,
            P_CAP,
            Q_CAP,
            ALIGN,
            POLICY,
        )
        state = _merged(state, more, kp, kq)
    return state


@triton.jit
def _split_slots(PARTIAL, V, kp, kq, SEGMENT: tl.constexpr, SLOTS: tl.constexpr):
    """The slots of a row from the slots of its segments."""
    state = _no_slots(SLOTS)
    P = PARTIAL + tl.arange(0, SLOTS)
    for _ in range(tl.cdiv(V, SEGMENT)):
        more = (tl.load(P),)
        for i in tl.static_range(1, SLOT):
            more = more + (tl.load(P + i * SLOTS),)
        state = _merged(state, more, kp, kq)
        P += SLOT * SLOTS
    return state


@triton.jit
def _joined8(a, b, c, d, e, f, g, h):
    """Join to ``[SLOTS, 2, 2, 2]``, which one reduction over the threads can take."""
    return tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))


@triton.jit
def _split8(x):
    first, second = tl.split(x)
    ab, cd = tl.split(first)
    ef, gh = tl.split(second)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    e, f = tl.split(ef)
    g, h = tl.split(gh)
    return a, b, c, d, e, f, g, h


@triton.jit
def _size(x):
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def _fixed(x, size):
    return (tl.where(x == x, x, 0.0) * (_FIXED / size)).to(tl.int64)


@triton.jit
def _lse(top, k, log_sum, T):
    """``top/T + log_sum`` as a value and the part that its rounding lost."""
    r = top / T
    value = r + log_sum
    return value, ((r - value) + log_sum) + tl.fma(-r, T, top) / T


@triton.jit
def _row_stats(
    state, X, Y, V, T, T_OTHER, kp, kq, p_cap, q_cap,
    SLOTS: tl.constexpr, E: tl.constexpr, P_CAP: tl.constexpr, Q_CAP: tl.constexpr,
):  # fmt: skip
    """The eight numbers of a row's table, from its slots.

    The slots are added in 64-bit fixed point relative to the largest: no layout changes
    the result. The largest column of each tensor, whose term is 1, is left out of its
    sum: next to it, the others of a sure row would round away. Where its slot has lost
    them, it is read again.
    """
    p_top, p_lead = tl.max(state[0], 0, return_indices=True, return_indices_tie_break_left=True)
    q_top, q_lead = tl.max(state[4], 0, return_indices=True, return_indices_tie_break_left=True)
    p_leads, q_leads = tl.arange(0, SLOTS) == p_lead, tl.arange(0, SLOTS) == q_lead
    _, p_sum, p_dot, p_cross, _, q_sum, q_dot, q_cross, p_zero, q_zero = _both_moved(
        state, p_top, q_top, kp, kq
    )
    leaders = pack(tl.where(p_leads, p_sum, 0.0), tl.where(q_leads, q_sum, 0.0))
    is_nan = ((p_sum == p_sum) & (q_sum == q_sum)) == 0  # integers cannot hold a NaN
    p_sum, q_sum = tl.where(p_leads, 0.0, p_sum), tl.where(q_leads, 0.0, q_sum)
    sizes = _joined8(
        _size(p_sum), _size(p_dot), _size(p_cross), _size(q_sum), _size(q_dot), _size(q_cross),
        p_zero, q_zero,
    )  # fmt: skip
    s1, s2, s3, s4, s5, s6, p_zero, q_zero = _split8(tl.max(sizes, 0))
    s1, s2, s3 = tl.maximum(s1, _SMALLEST), tl.maximum(s2, _SMALLEST), tl.maximum(s3, _SMALLEST)
    s4, s5, s6 = tl.maximum(s4, _SMALLEST), tl.maximum(s5, _SMALLEST), tl.maximum(s6, _SMALLEST)
    p_rest, p_dot, p_cross, q_rest, q_dot, q_cross, is_nan, leaders = _split8(
        tl.sum(
            _joined8(
                _fixed(p_sum, s1), _fixed(p_dot, s2), _fixed(p_cross, s3),
                _fixed(q_sum, s4), _fixed(q_dot, s5), _fixed(q_cross, s6),
                is_nan.to(tl.int64), leaders,
            ),
            0,
        )
    )  # fmt: skip
    p_rest, p_dot, p_cross = _unfixed(p_rest, s1), _unfixed(p_dot, s2), _unfixed(p_cross, s3)
    q_rest, q_dot, q_cross = _unfixed(q_rest, s4), _unfixed(q_dot, s5), _unfixed(q_cross, s6)
    p_rest = _with_leader(p_rest, high(leaders), X, V, p_lead, p_top, kp, p_cap, SLOTS, E, P_CAP)
    q_rest = _with_leader(q_rest, low(leaders), Y, V, q_lead, q_top, kq, q_cap, SLOTS, E, Q_CAP)
    sound = (
        (is_nan == 0)
        & (p_rest > -1.0)
        & (q_rest > -1.0)
        & (p_top < float("inf"))
        & (q_top < float("inf"))
    )
    nan = float("nan")
    p_rest, q_rest = tl.where(sound, p_rest, nan), tl.where(sound, q_rest, nan)
    p_sum, q_sum = 1.0 + p_rest, 1.0 + q_rest
    p_log, q_log = math.log1p(p_rest), math.log1p(q_rest)
    gap = p_log - q_log
    forward = math.maximum(q_cross / q_sum * LN2 + gap, 0.0)
    reverse = math.maximum(p_cross / p_sum * LN2 - gap, 0.0)
    forward = tl.where((p_zero > 0.0) & (forward == forward), float("inf"), forward)
    reverse = tl.where((q_zero > 0.0) & (reverse == reverse), float("inf"), reverse)
    p_lse, p_low = _lse(p_top, kp, p_log, T)
    q_lse, q_low = _lse(q_top, kq, q_log, T_OTHER)
    return (
        forward,
        reverse,
        p_log - p_dot / p_sum * LN2,
        q_log - q_dot / q_sum * LN2,
        p_lse,
        p_low,
        q_lse,
        q_low,
    )


@triton.jit
def _with_leader(
    others, sum, X, V, lead, top, k, cap,
    SLOTS: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The sum of all columns but the largest, from the sum of the other slots and that
    of the largest column's slot.
    """
    rest = others + (sum - 1.0)
    if (rest < SURE) & (rest > -0.5):
        rest = others + rest_of_slot(X, V, lead, top, k, cap, SLOTS, E, CAP)
    return rest


@triton.jit
def _unfixed(total, size):
    return total.to(tl.float32) * (1.0 / _FIXED) * size


@kernel
def partial_divergence_kernel(
    X,
    Y,
    IDS,
    T,
    T_OTHER,
    PARTIAL,
    t_stride: tl.int32,
    other_t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    other_batch_stride: tl.int64,
    other_row_stride: tl.int64,
    V: tl.int32,
    p_cap,
    q_cap,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Write the slots of each segment of a split row to ``PARTIAL [N, segments, SLOT,
    SLOTS]``.

    Each segment has its own program.
    """
    segments = tl.cdiv(V, SEGMENT)
    pid = tl.program_id(0)
    row = pid // segments
    start = (pid % segments) * SEGMENT
    if tl.load(IDS + row) != OUT_OF_LOSS:
        X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
        Y = tl.multiple_of(
            Y + row_offset(row, per_batch, other_batch_stride, other_row_stride), ALIGN
        )
        kp, kq = (
            base2_scale(tl.load(T + row * t_stride)),
            base2_scale(tl.load(T_OTHER + row * other_t_stride)),
        )
        stop = tl.minimum(V, start + SEGMENT)
        x = load_tile(X + start, stop - start, SLOTS, VECTORS, E, ALIGN, "evict_last")
        y = load_tile(Y + start, stop - start, SLOTS, VECTORS, E, ALIGN, "evict_last")
        state, _, _ = _segment_slots(
            X,
            Y,
            x,
            y,
            start,
            stop,
            stop,
            kp,
            kq,
            p_cap,
            q_cap,
            SLOTS,
            VECTORS,
            E,
            P_CAP,
            Q_CAP,
            ALIGN,
            "evict_last",
        )
        P = PARTIAL + pid.to(tl.int64) * (SLOT * SLOTS) + tl.arange(0, SLOTS)
        for i in tl.static_range(SLOT):
            tl.store(P + i * SLOTS, state[i])


@kernel
def divergence_kernel(
    X,
    Y,
    OUT,
    IDS,
    T,
    T_OTHER,
    TABLE,
    DERIVATIVES,
    PARTIAL,
    N: tl.int64,
    t_stride: tl.int32,
    other_t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    other_batch_stride: tl.int64,
    other_row_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    V: tl.int32,
    width: tl.int32,
    p_cap,
    q_cap,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    LOGS: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    P_CAP: tl.constexpr,
    Q_CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    PEEL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Compute a row: STATS writes ``TABLE [8, N]``, GRAD writes ``OUT``.

    Without STATS the table is read. GRAD uses the derivatives ``DERIVATIVES [3, N]``.
    With SPLIT, statistics come from PARTIAL. A split gradient has its own launch, with
    one program per SEGMENT of a row.
    """
    pid = tl.program_id(0)
    row, start, stop = pid, 0, width
    if SPLIT and GRAD:
        chunks = tl.cdiv(width, SEGMENT)
        row, start = pid // chunks, (pid % chunks) * SEGMENT
        stop = tl.minimum(width, start + SEGMENT)
    keep = tl.load(IDS + row) != OUT_OF_LOSS
    X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
    Y = tl.multiple_of(Y + row_offset(row, per_batch, other_batch_stride, other_row_stride), ALIGN)
    G = TABLE + row
    t, u = tl.load(T + row * t_stride), tl.load(T_OTHER + row * other_t_stride)
    zero = tl.full((), 0.0, tl.float32)
    forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low = (
        zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip
    if STATS:
        if keep:
            kp, kq = base2_scale(t), base2_scale(u)
            if SPLIT:
                P = PARTIAL + row.to(tl.int64) * (tl.cdiv(V, SEGMENT) * (SLOT * SLOTS))
                state = _split_slots(P, V, kp, kq, SEGMENT, SLOTS)
            else:
                policy: tl.constexpr = "evict_last" if GRAD else "evict_first"
                state = _swept_slots(
                    X,
                    Y,
                    V,
                    kp,
                    kq,
                    p_cap,
                    q_cap,
                    SEGMENT,
                    SLOTS,
                    VECTORS,
                    E,
                    P_CAP,
                    Q_CAP,
                    ALIGN,
                    policy,
                )
            forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low = _row_stats(
                state, X, Y, V, t, u, kp, kq, p_cap, q_cap, SLOTS, E, P_CAP, Q_CAP
            )
        values = (forward, reverse, entropy, other_entropy, p_lse, p_low, q_lse, q_low)
        for i in tl.static_range(8):
            tl.store(G + i * N, values[i])
    else:
        reverse, entropy = tl.load(G + N), tl.load(G + 2 * N)
        p_lse, p_low, q_lse, q_low = (
            tl.load(G + 4 * N),
            tl.load(G + 5 * N),
            tl.load(G + 6 * N),
            tl.load(G + 7 * N),
        )
    if GRAD:
        B = DERIVATIVES + row
        d_forward, d_reverse, d_entropy = tl.load(B), tl.load(B + N), tl.load(B + 2 * N)
        OUT = OUT + row_offset(row, per_batch, out_batch_stride, out_row_stride)
        OUT = tl.multiple_of(OUT, 1 if PEEL else 16)
        G, OUT, head, stop, columns = peeled(X, OUT, start, stop, V, width, PEEL)
        has_gradient = keep & ((d_forward != 0.0) | (d_reverse != 0.0) | (d_entropy != 0.0))
        if has_gradient:
            row_gradient(
                G,
                Y + head,
                OUT,
                head,
                start,
                stop,
                columns,
                t,
                u,
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
                SLOTS,
                VECTORS,
                E,
                P_CAP,
                Q_CAP,
                LOGS,
                GRAD_ALIGN,
                PEEL,
                EMULATE,
            )
        else:
            zero_sweep(OUT, head, start, stop, SLOTS * VECTORS * E, E, PEEL)
