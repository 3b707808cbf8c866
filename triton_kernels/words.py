"""Logits as 32-bit words: rows are read and written 16 bytes at a time in every dtype.

A vector of ``E`` columns is four words: four columns in fp32, eight in a 16-bit dtype
(even columns in the low halves, odd columns in the high halves). An fp32 tensor next to
a 16-bit tensor has vectors of eight columns too, which are eight words. A loop that
loads ahead carries words: 16-bit elements would take twice the registers. A tile of
words is a tuple of ``[SLOTS, words]`` tensors, one per run. As numbers, a run is one
fp32 tensor ``[SLOTS, 4]``, or two (even columns, odd columns).
"""

import triton
import triton.language as tl

#: Bits of two -inf elements (one in fp32).
_BF16_INF = tl.constexpr(-8323200)  # 0xff80ff80
_FP16_INF = tl.constexpr(-67044352)  # 0xfc00fc00
_FP32_INF = tl.constexpr(-8388608)  # 0xff800000


@triton.jit
def _minus_infinities(dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return _BF16_INF
    elif dtype == tl.float16:
        return _FP16_INF
    else:
        return _FP32_INF


@triton.jit
def _offsets(SLOTS: tl.constexpr, E: tl.constexpr):
    """Offsets of a run's elements, ``[SLOTS, E]``."""
    return tl.arange(0, SLOTS)[:, None] * E + tl.arange(0, E)[None, :]


@triton.jit
def _low_half(x):
    return x.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def load_elements(P, first, stop, SLOTS: tl.constexpr, E: tl.constexpr, policy: tl.constexpr):
    """Load a run at ``P`` element by element: ``first`` to ``stop``, and -inf outside
    of them.
    """
    if P.dtype.element_ty == tl.float32:
        i = _offsets(SLOTS, E)
        return tl.load(
            P + i, mask=(i >= first) & (i < stop), other=float("-inf"), eviction_policy=policy
        ).to(tl.int32, bitcast=True)
    else:
        return _four_words(
            _load_word(P, 0, first, stop, SLOTS, E, policy),
            _load_word(P, 2, first, stop, SLOTS, E, policy),
            _load_word(P, 4, first, stop, SLOTS, E, policy),
            _load_word(P, 6, first, stop, SLOTS, E, policy),
        )


@triton.jit
def _load_word(P, column, first, stop, SLOTS: tl.constexpr, E: tl.constexpr, policy: tl.constexpr):
    """Two columns of each vector, the first of them in the low half."""
    even = tl.arange(0, SLOTS) * E + column
    odd = even + 1
    low = tl.load(
        P + even,
        mask=(even >= first) & (even < stop),
        other=float("-inf"),
        eviction_policy=policy,
    )
    high = tl.load(
        P + odd, mask=(odd >= first) & (odd < stop), other=float("-inf"), eviction_policy=policy
    )
    return _low_half(low) | (_low_half(high) << 16)


@triton.jit
def _four_words(w0, w1, w2, w3):
    """``[SLOTS, 4]`` of four ``[SLOTS]``."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [w0.shape[0], 4])


@triton.jit
def _shifted(a, b, skip, dtype: tl.constexpr):
    """The four words ``[SLOTS, 4]`` that begin ``skip`` bytes after those of ``a``;
    ``b`` has the next four.
    """
    evens, odds = tl.split(tl.reshape(a, [a.shape[0], 2, 2]))
    w0, w2 = tl.split(evens)
    w1, w3 = tl.split(odds)
    evens, odds = tl.split(tl.reshape(b, [b.shape[0], 2, 2]))
    w4, w6 = tl.split(evens)
    w5, w7 = tl.split(odds)
    two, one = (skip & 8) != 0, (skip & 4) != 0
    w0, w1, w2 = tl.where(two, w2, w0), tl.where(two, w3, w1), tl.where(two, w4, w2)
    w3, w4, w5 = tl.where(two, w5, w3), tl.where(two, w6, w4), tl.where(two, w7, w5)
    w0, w1, w2 = tl.where(one, w1, w0), tl.where(one, w2, w1), tl.where(one, w3, w2)
    w3, w4 = tl.where(one, w4, w3), tl.where(one, w5, w4)
    if dtype.primitive_bitwidth == 16:
        half = (skip & 2) != 0
        w0 = tl.where(half, _low_half_of_next(w0, w1), w0)
        w1 = tl.where(half, _low_half_of_next(w1, w2), w1)
        w2 = tl.where(half, _low_half_of_next(w2, w3), w2)
        w3 = tl.where(half, _low_half_of_next(w3, w4), w3)
    return _four_words(w0, w1, w2, w3)


@triton.jit
def _low_half_of_next(word, following):
    """The high half of a word, and above it the low half of the next."""
    return ((word >> 16) & 0xFFFF) | (following << 16)


@triton.jit
def load_shifted(P, columns, SLOTS: tl.constexpr, E: tl.constexpr, policy: tl.constexpr):
    """:func:`load_run` at any address: a vector is cut out of the two aligned vectors
    that hold it. The second is not read where the row is aligned.
    """
    dtype: tl.constexpr = P.dtype.element_ty
    skip = (P.to(tl.int64, bitcast=True) & 15).to(tl.int32)
    W = P.to(tl.pointer_type(tl.int8), bitcast=True) - skip
    W = tl.multiple_of(W.to(tl.pointer_type(tl.int32), bitcast=True), 16) + _offsets(SLOTS, 4)
    there = tl.full([SLOTS, 4], 1, tl.int1)
    if columns is not None:
        there &= tl.arange(0, SLOTS)[:, None] * E + E <= columns
    a = tl.load(W, mask=there, other=0, eviction_policy=policy)
    b = tl.load(W + 4, mask=there & (skip != 0), other=0, eviction_policy=policy)
    return tl.where(there, _shifted(a, b, skip, dtype), _minus_infinities(dtype))


@triton.jit
def load_run(
    P, columns, SLOTS: tl.constexpr, E: tl.constexpr, ALIGN: tl.constexpr, policy: tl.constexpr
):  # fmt: skip
    """Load a run at ``P``.

    It loads the whole run (``columns`` is None), or the whole vectors among the first
    ``columns`` elements and -inf after them.
    """
    SHIFTS: tl.constexpr = ALIGN < 16 and E * P.dtype.element_ty.primitive_bitwidth == 128
    if SHIFTS:
        words = load_shifted(P, columns, SLOTS, E, policy)
    elif ALIGN < 4:
        if columns is None:
            words = load_elements(P, 0, SLOTS * E, SLOTS, E, policy)
        else:
            words = load_elements(P, 0, columns // E * E, SLOTS, E, policy)
    else:
        W = tl.multiple_of(P.to(tl.pointer_type(tl.int32), bitcast=True), ALIGN) + _offsets(
            SLOTS, E if P.dtype.element_ty == tl.float32 else 4
        )
        if columns is None:
            words = tl.load(W, eviction_policy=policy)
        else:
            there = tl.arange(0, SLOTS)[:, None] * E + E <= columns
            words = tl.load(
                W, mask=there, other=_minus_infinities(P.dtype.element_ty), eviction_policy=policy
            )
    return words


@triton.jit
def load_tile(
    P,
    columns,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    ALIGN: tl.constexpr,
    policy: tl.constexpr,
):
    """Load the tile at ``P``: the whole tile, or its vectors as in :func:`load_run`."""
    words = (load_run(P, columns, SLOTS, E, ALIGN, policy),)
    for i in tl.static_range(1, VECTORS):
        left = None if columns is None else columns - i * (SLOTS * E)
        words = words + (load_run(P + i * (SLOTS * E), left, SLOTS, E, ALIGN, policy),)
    return words


@triton.jit
def numbers(words, dtype: tl.constexpr, E: tl.constexpr):
    """A run in fp32: ``(all,)`` or ``(even columns, odd columns)``."""
    if dtype == tl.float32:
        x = words.to(tl.float32, bitcast=True)
        if E == 4:
            return (x,)
        else:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, 2]))
            return even, odd
    elif dtype == tl.bfloat16:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(
            tl.float32, bitcast=True
        )
    else:
        low, high = (
            (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True),
            (words >> 16).to(tl.uint16).to(dtype, bitcast=True),
        )
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def tile_numbers(words, VECTORS: tl.constexpr, dtype: tl.constexpr, E: tl.constexpr):
    """A tile in fp32: the tensors of its runs in order."""
    result = numbers(words[0], dtype, E)
    for i in tl.static_range(1, VECTORS):
        result = result + numbers(words[i], dtype, E)
    return result


@triton.jit
def round_to(g, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Round to nearest even, as hardware does.

    Triton's interpreter truncates to bfloat16; EMULATE rounds there.
    """
    if EMULATE:
        bits = g.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        g = tl.where(g == g, rounded.to(tl.float32, bitcast=True), g)
    return g.to(dtype)


@triton.jit
def store_run(P, g, columns, SLOTS: tl.constexpr, E: tl.constexpr, EMULATE: tl.constexpr):
    """Round the fp32 tensors of a run and store them to ``P``, the inverse of
    :func:`load_run`.

    It stores the whole run, or the whole vectors among ``columns``.
    """
    x = round_to(g[0] if E == 4 else tl.interleave(g[0], g[1]), P.dtype.element_ty, EMULATE)
    if columns is None:
        tl.store(P + _offsets(SLOTS, E), x, eviction_policy="evict_first")
    else:
        there = tl.arange(0, SLOTS)[:, None] * E + E <= columns
        tl.store(P + _offsets(SLOTS, E), x, mask=there, eviction_policy="evict_first")
