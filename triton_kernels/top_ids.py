"""Statistics, and the ids of a row's largest logits from the same read.

A key is a logit in its order, then the column from the last to the first, in 64 bits:
no two are equal. A program appends the keys above a bound to its ``KEYS`` in memory,
``ROOM`` at most. When they would not fit, a sort leaves the ``K`` largest, and the
least of them is the new bound. If a part of a tile still has too many, the K-th largest
of its slots' own largest keys is a bound: a slot has 4 keys of a part, so that K slots
have no more than ``4·K``.
"""

import triton
import triton.language as tl

from .kernels import OUT_OF_LOSS, _finish, _target, _target_logit, kernel
from .sweep import _tile, base2_scale, capped, merge_slots, no_slots, row_of_slots, row_offset
from .words import load_elements, load_tile, numbers, tile_numbers

#: Below every key.
_NO_KEY = tl.constexpr(-(1 << 63))
_NAN = tl.constexpr(0x7FFFFFFF)  # the order of NaN, above all
_LAST = tl.constexpr(0x7FFFFFFF)  # xor a column: from the last to the first


@triton.jit
def _keys(z, column, V):
    """The keys of logits ``z`` at columns ``column``; no key from ``V`` on."""
    w = z.to(tl.float32) + 0.0  # -0 becomes 0
    bits = w.to(tl.int32, bitcast=True)
    order = tl.where(w == w, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)
    key = (order.to(tl.int64) << 32) | (column ^ _LAST).to(tl.int64)
    return tl.where(column < V, key, _NO_KEY)


@triton.jit
def _logit_of(key):
    """The logit of a key; -inf if there is none."""
    order = (key >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    logit = tl.where(order == _NAN, float("nan"), bits.to(tl.float32, bitcast=True))
    return tl.where(key == _NO_KEY, float("-inf"), logit)


@triton.jit
def _at(sorted, K, SIZE: tl.constexpr):
    """Element K - 1."""
    return tl.max(tl.where(tl.arange(0, SIZE) == K - 1, sorted, _NO_KEY), 0)


@triton.jit
def _sorted_keys(KEYS, count, ROOM: tl.constexpr):
    """The first ``count`` keys, the largest first."""
    tl.debug_barrier()  # other threads have written them
    i = tl.arange(0, ROOM)
    return tl.sort(tl.load(KEYS + i, mask=i < count, other=_NO_KEY), descending=True)


@triton.jit(noinline=True)
def _see_part(X, first, V, KEYS, K, count, bound, SLOTS: tl.constexpr, ROOM: tl.constexpr):
    """Append the keys of the ``4·SLOTS`` columns from ``first`` on; return the new
    ``(count, bound)``.

    It reads them again. The first cache has it: its tile was just swept.
    """
    at = first + tl.arange(0, SLOTS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    keys = _keys(tl.load(X + at, mask=at < V, other=0.0), at, V)
    new = (keys > bound).to(tl.int32)
    total = tl.sum(tl.sum(new, 1), 0)
    if total > 0:
        if count + total > ROOM:
            if count > K:
                sorted = _sorted_keys(KEYS, count, ROOM)
                bound = tl.maximum(bound, _at(sorted, K, ROOM))
                tl.debug_barrier()  # all have been read
                tl.store(KEYS + tl.arange(0, ROOM), sorted, mask=tl.arange(0, ROOM) < K)
                count = tl.minimum(count, K)
            by_slots = _at(tl.sort(tl.max(keys, 1), descending=True), K, SLOTS)
            # what equals a bound is out
            bound = tl.maximum(bound, tl.where(by_slots == _NO_KEY, by_slots, by_slots - 1))
            new = (keys > bound).to(tl.int32)
        found = tl.sum(new, 1)
        place = (count + tl.cumsum(found, 0) - found)[:, None] + tl.cumsum(new, 1) - new
        tl.store(KEYS + place, keys, mask=new > 0)
        count += tl.sum(found, 0)
    return count, bound


@triton.jit
def _tops(w):
    """The largest logit of each slot of a tile; NaN is dropped."""
    largest = w[0]
    for i in tl.static_range(1, len(w)):
        largest = tl.maximum(largest, w[i])
    return tl.max(largest, 1)


@triton.jit
def _is_hot(tops, sum, bound):
    """Whether a tile may have a key above the bound.

    Columns ascend from tile to tile, so that what equals the bound's logit has smaller
    keys. A slot's sum is NaN from its first NaN on.
    """
    above = (tops > _logit_of(bound)) | (sum != sum)
    return tl.max(above.to(tl.int32), 0) > 0


@triton.jit
def _swept_row_and_keys(
    X,
    V,
    k,
    softcap,
    KEYS,
    K,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    P_SQ: tl.constexpr,
    ALIGN: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The state of a whole row, as :func:`.sweep.swept_row` finds it, and the number of
    its keys.
    """
    RUN: tl.constexpr = SLOTS * E
    BLOCK: tl.constexpr = VECTORS * RUN
    dtype: tl.constexpr = X.dtype.element_ty
    top, sum, dot, sum_sq = no_slots(SLOTS)
    count = tl.full((), 0, tl.int32)
    bound = tl.full((), _NO_KEY, tl.int64)
    z = load_tile(X, V, SLOTS, VECTORS, E, ALIGN, "evict_first")
    for start in range(0, V, SEGMENT):
        stop = tl.minimum(V, start + SEGMENT)
        top2, sum2, dot2, sq2 = no_slots(SLOTS)
        for c in range(start, stop, BLOCK):
            there = V - (c + BLOCK)
            ahead = load_tile(X + c + BLOCK, there, SLOTS, VECTORS, E, ALIGN, "evict_first")
            hot = count < K
            if c + BLOCK <= stop:
                w = tile_numbers(z, VECTORS, dtype, E)
                tops = _tops(w)
                top2, sum2, dot2, sq2 = _tile(
                    w, top2, sum2, dot2, sq2, k, softcap, SLOTS, CAP, ENTROPY, P_SQ
                )
                hot |= _is_hot(tops, sum2, bound)
            else:
                for i in tl.static_range(VECTORS):
                    if c + i * RUN < stop:
                        top2, sum2, dot2, sq2 = _tile(
                            numbers(z[i], dtype, E),
                            top2,
                            sum2,
                            dot2,
                            sq2,
                            k,
                            softcap,
                            SLOTS,
                            CAP,
                            ENTROPY,
                            P_SQ,
                        )
                if stop % E != 0:
                    first = stop // RUN * RUN
                    words = load_elements(
                        X + first, stop // E * E - first, stop - first, SLOTS, E, "evict_first"
                    )
                    top2, sum2, dot2, sq2 = _tile(
                        numbers(words, dtype, E),
                        top2,
                        sum2,
                        dot2,
                        sq2,
                        k,
                        softcap,
                        SLOTS,
                        CAP,
                        ENTROPY,
                        P_SQ,
                    )
                hot |= c < V
            if hot:
                for first in range(c, tl.minimum(c + BLOCK, stop), 4 * SLOTS):
                    count, bound = _see_part(X, first, V, KEYS, K, count, bound, SLOTS, ROOM)
            z = ahead
        top, sum, dot, sum_sq = merge_slots(top, sum, dot, sum_sq, top2, sum2, dot2, sq2, k)
    state = row_of_slots(X, V, k, softcap, top, sum, dot, sum_sq, SLOTS, E, CAP, ENTROPY, P_SQ)
    return state[0], state[1], state[2], state[3], count


@kernel
def top_stats_kernel(
    X,
    IDS,
    T,
    KEYS,
    OUT,
    TOP,
    N: tl.int64,
    K: tl.int32,
    t_stride: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    V: tl.int32,
    softcap,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    STATS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTORS: tl.constexpr,
    E: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Like :func:`.kernels.stats_kernel` with its bits, and ``TOP[row]``: the ids
    of the K largest logits.
    """
    row = tl.program_id(0)
    y, keep, bad, inside = _target(IDS, row, vocab_start, vocab_total, V)
    zero = tl.full((), 0.0, tl.float32)
    logp, entropy, lse, lse_low, log_p_sq, max_logp = zero, zero, zero, zero, zero, zero
    TOP += row.to(tl.int64) * K
    KEYS += row.to(tl.int64) * ROOM
    ids = tl.full([ROOM], OUT_OF_LOSS, tl.int64)
    if keep:
        X = tl.multiple_of(X + row_offset(row, per_batch, batch_stride, row_stride), ALIGN)
        t = tl.load(T + row * t_stride)
        w_y, _ = capped(_target_logit(X, y, inside), softcap, CAP)
        k = base2_scale(t)
        top, rest, dot, rest_sq, count = _swept_row_and_keys(
            X,
            V,
            k,
            softcap,
            KEYS,
            K,
            SEGMENT,
            SLOTS,
            VECTORS,
            E,
            CAP,
            STATS[1] >= 0,
            STATS[4] >= 0,
            ALIGN,
            ROOM,
        )
        logp, entropy, lse, lse_low, log_p_sq, max_logp = _finish(
            top, rest, dot, rest_sq, w_y, inside, t
        )
        ids = vocab_start + (_sorted_keys(KEYS, count, ROOM).to(tl.int32) ^ _LAST).to(tl.int64)
    i = tl.arange(0, ROOM)
    tl.store(TOP + i, ids, mask=i < K)
    result = (logp, entropy, lse, lse_low, log_p_sq, max_logp)
    for j in tl.static_range(6):
        if STATS[j] >= 0:
            tl.store(OUT + STATS[j] * N + row, tl.where(bad, float("nan"), result[j]))
