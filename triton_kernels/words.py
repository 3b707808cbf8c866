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
        even = tl.arange(0, SLOTS)[:, None] * E + tl.arange(0, 4)[None, :] * 2
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
def load_run(
    P, columns, SLOTS: tl.constexpr, E: tl.constexpr, ALIGN: tl.constexpr, policy: tl.constexpr
):
    """Load a run at ``P``.

    It loads the whole run (``columns`` is None), or the whole vectors among the first
    ``columns`` elements and -inf after them.
    """
    if ALIGN < 4:
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
