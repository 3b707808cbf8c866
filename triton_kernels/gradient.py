"""The gradient sweep over a row of logits, from the numbers of the statistics.

It has no sums, so its tiles begin where rows of the gradient are aligned
(:func:`peeled`). It goes backwards, because L2 still holds what was read last.
"""

import triton
import triton.language as tl

from .sweep import capped, exponent
from .words import load_tile, numbers, round_to, store_run


@triton.jit
def gradient_tile(
    z, c, k, b, A, B, C, softcap, CAP: tl.constexpr, ENTROPY: tl.constexpr, P_SQ: tl.constexpr
):
    """``p·(A + B·log2 p + C·p)`` with ``log2 p = (w - c)·k + b``, times the slope of
    the cap.
    """
    w, slope = capped(z, softcap, CAP)
    # Without a logarithm in the factor, no product has an exponent of -inf.
    log2_p = exponent(w - c, k, b) if ENTROPY else tl.fma(w - c, k, b)
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
def peeled(X, OUT, start, stop, V, width, PEEL: tl.constexpr):
    """A row from its first multiple of 16 bytes on: ``(X, OUT, head, stop, V)``.

    Whole vectors of the gradient begin there, wherever the logits do. The first program
    of a row also writes the ``head`` columns before it, which are counted below 0.
    Programs divide the others, from ``start`` to ``stop``. Without PEEL, rows of the
    gradient begin at a multiple, and the caller says so of OUT.
    """
    if PEEL:
        size: tl.constexpr = OUT.dtype.element_ty.primitive_bitwidth // 8
        head = tl.minimum(((-OUT.to(tl.int64, bitcast=True)) & 15).to(tl.int32) // size, width)
        OUT = tl.multiple_of(OUT + head, 16)
        return X + head, OUT, head, tl.minimum(stop, width - head), V - head
    else:
        return X, OUT, 0, stop, V


@triton.jit
def own_column(y, head, start, stop, PEEL: tl.constexpr):
    """Whether a program of :func:`peeled` writes column ``y``."""
    if PEEL:
        start -= tl.where(start == 0, head, 0)
    return (y >= start) & (y < stop)


@triton.jit
def _whole_tiles(start, stop, V, BLOCK: tl.constexpr):
    """The column after the last whole tile of the softmax in ``start`` to ``stop``."""
    return start + tl.maximum(tl.minimum(stop, V) - start, 0) // BLOCK * BLOCK


@triton.jit
def load_last_tiles(
    X,
    start,
    stop,
    V,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Load the first tiles of :func:`gradient_sweep`: the last whole tile and the
    vectors after it.

    Call it before the sweep's coefficients are known.
    """
    BLOCK: tl.constexpr = SLOTS * VECTORS * E
    full = _whole_tiles(start, stop, V, BLOCK)
    end = load_tile(X + full, tl.minimum(stop, V) - full, SLOTS, VECTORS, E, ALIGN, "evict_first")
    return end, load_tile(
        X + (full - BLOCK),
        tl.where(full > start, BLOCK, 0),
        SLOTS,
        VECTORS,
        E,
        ALIGN,
        "evict_first",
    )


@triton.jit
def _gradient_run(
    P,
    z,
    columns,
    c,
    k,
    b,
    A,
    B,
    C,
    softcap,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    EMULATE: tl.constexpr,
    dtype: tl.constexpr,
):
    w = numbers(z, dtype, E)
    g = (gradient_tile(w[0], c, k, b, A, B, C, softcap, CAP, ENTROPY, P_SQ),)
    if E == 8:
        g = g + (gradient_tile(w[1], c, k, b, A, B, C, softcap, CAP, ENTROPY, P_SQ),)
    store_run(P, g, columns, SLOTS, E, EMULATE)


@triton.jit
def _gradient_store(
    P,
    z,
    columns,
    c,
    k,
    b,
    A,
    B,
    C,
    softcap,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    EMULATE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Write the gradient of the tile of words ``z``, all of it or its first
    ``columns``, to ``P``.
    """
    for i in tl.static_range(VECTORS):
        if columns is None:
            _gradient_run(
                P + i * (SLOTS * E),
                z[i],
                None,
                c,
                k,
                b,
                A,
                B,
                C,
                softcap,
                SLOTS,
                E,
                CAP,
                ENTROPY,
                P_SQ,
                EMULATE,
                dtype,
            )
        else:
            left = columns - i * (SLOTS * E)
            if left > 0:
                _gradient_run(
                    P + i * (SLOTS * E),
                    z[i],
                    left,
                    c,
                    k,
                    b,
                    A,
                    B,
                    C,
                    softcap,
                    SLOTS,
                    E,
                    CAP,
                    ENTROPY,
                    P_SQ,
                    EMULATE,
                    dtype,
                )


@triton.jit
def _gradient_columns(
    X,
    OUT,
    first,
    stop,
    V,
    c,
    k,
    b,
    A,
    B,
    C,
    softcap,
    SLOTS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient of at most SLOTS columns from ``first`` on, one by one."""
    column = first + tl.arange(0, SLOTS)
    there = column < tl.minimum(stop, V)
    w = tl.load(X + column, mask=there, other=float("-inf"), eviction_policy="evict_first")
    g = gradient_tile(w.to(tl.float32), c, k, b, A, B, C, softcap, CAP, ENTROPY, P_SQ)
    tl.store(
        OUT + column,
        round_to(tl.where(there, g, 0.0), OUT.dtype.element_ty, EMULATE),
        mask=column < stop,
        eviction_policy="evict_first",
    )


@triton.jit
def gradient_sweep(
    X,
    OUT,
    tiles,
    head,
    start,
    stop,
    V,
    y,
    at_target,
    c,
    k,
    b,
    A,
    B,
    C,
    softcap,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    ALIGN: tl.constexpr,
    PEEL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Write the gradient of columns ``start`` (a multiple of a tile) to ``stop``, last
    tile first, and of the columns that :func:`peeled` left before them.

    L2 still holds what was read last. ``tiles`` is the result of
    :func:`load_last_tiles`. Columns from ``V`` on are outside the softmax and get
    zeros. The target's column ``y`` is overwritten at the end by the program whose it
    is.
    """
    BLOCK: tl.constexpr = SLOTS * VECTORS * E
    dtype: tl.constexpr = X.dtype.element_ty
    full = _whole_tiles(start, stop, V, BLOCK)
    last = tl.minimum(stop, V)
    end, z = tiles
    if full < last:
        _gradient_store(
            OUT + full,
            end,
            last - full,
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
            EMULATE,
            dtype,
        )
    # the rest of a vector, and padding
    for first in range(tl.maximum(start, last // E * E), stop, SLOTS):
        _gradient_columns(
            X, OUT, first, stop, V, c, k, b, A, B, C, softcap, SLOTS, CAP, ENTROPY, P_SQ, EMULATE
        )
    if PEEL:
        before = tl.where(start == 0, head, 0)
        _gradient_columns(
            X, OUT, -before, 0, V, c, k, b, A, B, C, softcap, SLOTS, CAP, ENTROPY, P_SQ, EMULATE
        )
    for i in range((full - start) // BLOCK - 1):
        first = full - (i + 1) * BLOCK
        ahead = load_tile(X + (first - BLOCK), None, SLOTS, VECTORS, E, ALIGN, "evict_first")
        _gradient_store(
            OUT + first,
            z,
            None,
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
            EMULATE,
            dtype,
        )
        z = ahead
    if full > start:
        _gradient_store(
            OUT + start,
            z,
            None,
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
            EMULATE,
            dtype,
        )
    if own_column(y, head, start, stop, PEEL):
        tl.debug_barrier()  # another thread has just written this column
        tl.store(OUT + y, round_to(at_target, dtype, EMULATE))


@triton.jit
def zero_sweep(OUT, head, start, stop, BLOCK: tl.constexpr, E: tl.constexpr, PEEL: tl.constexpr):
    """Write exact zeros without reading anything, to the columns of
    :func:`gradient_sweep`.
    """
    if PEEL:
        before = tl.where(start == 0, head, 0)
        nothing = tl.zeros([8], OUT.dtype.element_ty)
        tl.store(OUT - before + tl.arange(0, 8), nothing, mask=tl.arange(0, 8) < before)
    cols = tl.arange(0, BLOCK // E)[:, None] * E + tl.arange(0, E)[None, :]
    zero = tl.zeros([BLOCK // E, E], OUT.dtype.element_ty)
    full = start + (stop - start) // BLOCK * BLOCK
    for first in range(start, full, BLOCK):
        tl.store(OUT + first + cols, zero, eviction_policy="evict_first")
    if full < stop:
        tl.store(OUT + full + cols, zero, mask=full + cols < stop, eviction_policy="evict_first")
