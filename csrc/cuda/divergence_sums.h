// The sums over part of a row of two logits tensors, and how they are merged.
//
// With t = (x - top)·log2(e)/T and e = 2^t they are, for each tensor, Σe, Σe·t and Σe·(own t - the other's t): where the
// distributions are close, the differences themselves are small.
#pragma once

#include "divergence.h"
#include "statistics.h"

namespace reweight_ops {
namespace {

/// A thread's `sum` has every column. Merged sums leave out the largest one, whose term is 1: next to
/// it, the others of a sure row would round away.
struct alignas(16) Side {
    float top = -kInf, sum = 0.0f, dot = 0.0f, cross = 0.0f;
};

/// Three vectors of 16 bytes, which a block can send to another.
struct State {
    Side p, q;
    float p_zero = 0.0f, q_zero = 0.0f;  // 1 if a column has p = 0 < q; q = 0 < p
};

/// The merged sums of every warp of every slice of a row.
using RowStates = State[kMaxSlices][kWarps];

/// The scales of both tensors of a row.
struct Scales {
    float p, q;  // log2(e) / T
};

RW_DEVICE float finite_top(float top) { return top == -kInf ? 0.0f : top; }

RW_DEVICE void rebase(Side& s, float top, float shift, float others_shift) {
    const float factor = exp2_approximate(shift);
    s.cross = factor * fmaf(shift - others_shift, s.sum, s.cross);
    s.dot = factor * fmaf(shift, s.sum, s.dot);
    s.sum *= factor;
    s.top = top;
}

/// Makes the sums relative to other maxima.
RW_DEVICE void rebase(State& s, float p_top, float q_top, const Scales& scales) {
    if (p_top == s.p.top && q_top == s.q.top) return;
    // The bound: a maximum may be the lowest finite number, by which logits are masked, and -inf -
    // -inf would be NaN.
    const auto shift = [](float from, float to, float scale) { return from == -kInf || from == to ? 0.0f : fmaxf((from - to) * scale, -1e30f); };
    const float p_shift = shift(s.p.top, p_top, scales.p), q_shift = shift(s.q.top, q_top, scales.q);
    rebase(s.p, p_top, p_shift, q_shift);
    rebase(s.q, q_top, q_shift, p_shift);
}

/// A thread's sums without its largest columns; the subtraction is exact.
RW_DEVICE State without_top(State s) {
    if (s.p.top > -kInf) s.p.sum -= 1.0f;
    if (s.q.top > -kInf) s.q.sum -= 1.0f;
    return s;
}

/// Makes merged sums relative to other maxima. A column that is still the largest stays left out.
RW_DEVICE void rebase_merged(State& s, float p_top, float q_top, const Scales& scales) {
    const Side p = s.p, q = s.q;
    if (p.top > -kInf) s.p.sum += 1.0f;
    if (q.top > -kInf) s.q.sum += 1.0f;
    rebase(s, p_top, q_top, scales);
    if (p.top == p_top) s.p.sum = p.sum;
    if (q.top == q_top) s.q.sum = q.sum;
}

/// Of several largest columns, one is left out.
RW_DEVICE State merge(State a, State b, const Scales& scales) {
    const float p_top = fmaxf(a.p.top, b.p.top), q_top = fmaxf(a.q.top, b.q.top);
    const bool p_both = a.p.top == b.p.top && p_top > -kInf, q_both = a.q.top == b.q.top && q_top > -kInf;
    rebase_merged(a, p_top, q_top, scales);
    rebase_merged(b, p_top, q_top, scales);
    const auto add = [](const Side& x, const Side& y, bool both) {
        return Side{x.top, x.sum + y.sum + (both ? 1.0f : 0.0f), x.dot + y.dot, x.cross + y.cross};
    };
    return {add(a.p, b.p, p_both), add(a.q, b.q, q_both), fmaxf(a.p_zero, b.p_zero), fmaxf(a.q_zero, b.q_zero)};
}

/// The lanes of a warp whose largest column is the largest of all.
RW_DEVICE uint32_t leaders(const Side& s, float top) { return ballot(s.top == top && top > -kInf); }

/// Merges the sums of all lanes of a warp: first the maxima, then what is relative to them. Every
/// lane gets the result.
RW_DEVICE State merge_lanes(State s, const Scales& scales) {
    float p_top = s.p.top, q_top = s.q.top;
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
        p_top = fmaxf(p_top, shuffle_xor(p_top, lanes));
        q_top = fmaxf(q_top, shuffle_xor(q_top, lanes));
    }
    const int p_leaders = count_bits(leaders(s.p, p_top)), q_leaders = count_bits(leaders(s.q, q_top));
    rebase_merged(s, p_top, q_top, scales);
    const auto add = [](Side& x, int lanes) {
        x.sum += shuffle_xor(x.sum, lanes);
        x.dot += shuffle_xor(x.dot, lanes);
        x.cross += shuffle_xor(x.cross, lanes);
    };
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
        add(s.p, lanes);
        add(s.q, lanes);
        s.p_zero = fmaxf(s.p_zero, shuffle_xor(s.p_zero, lanes));
        s.q_zero = fmaxf(s.q_zero, shuffle_xor(s.q_zero, lanes));
    }
    if (p_leaders > 1) s.p.sum += float(p_leaders - 1);
    if (q_leaders > 1) s.q.sum += float(q_leaders - 1);
    return s;
}

/// The sums of a row, in every lane of a warp: a lane takes one warp of each half of the slices.
RW_DEVICE State merge_row(const RowStates& states, int slices, const Scales& scales) {
    constexpr int kHalf = 32 / kWarps;
    static_assert(2 * kHalf == kMaxSlices);
    const int slice = thread_index() % 32 / kWarps, warp = thread_index() % kWarps;
    State s = slice < slices ? states[slice][warp] : State();
    if (slice + kHalf < slices) s = merge(s, states[slice + kHalf][warp], scales);
    return merge_lanes(s, scales);
}

/// log2 of a column's exponential. Only -inf has probability 0. A finite masking number may
/// overflow the product, but must not count as -inf: threads that see only such numbers would
/// disagree with the others.
RW_DEVICE float exponent(float x, float base, float scale) {
    const float t = (x - base) * scale;
    return t < -1e30f && x > -kInf ? -1e30f : t;
}

/// The sums of n columns. kPlain: no column is -inf and no difference overflows, so that no column
/// needs a check.
template <bool kPlain, int n>
RW_DEVICE void add(State& s, const float (&x)[n], const float (&y)[n], float p_base, float q_base, const Scales& scales) {
    Side p, q;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        const float t = kPlain ? (x[j] - p_base) * scales.p : exponent(x[j], p_base, scales.p);
        const float u = kPlain ? (y[j] - q_base) * scales.q : exponent(y[j], q_base, scales.q);
        const bool p_masked = !kPlain && t == -kInf, q_masked = !kPlain && u == -kInf;
        const float e = exp2_approximate(t), f = exp2_approximate(u), d = p_masked || q_masked ? 0.0f : t - u;
        p.sum += e;
        q.sum += f;
        p.dot = fmaf(e, p_masked ? 0.0f : t, p.dot);
        q.dot = fmaf(f, q_masked ? 0.0f : u, q.dot);
        p.cross = fmaf(e, d, p.cross);
        q.cross = fmaf(f, -d, q.cross);
        if (p_masked != q_masked) (p_masked ? s.p_zero : s.q_zero) = 1.0f;
    }
    s.p.sum += p.sum, s.p.dot += p.dot, s.p.cross += p.cross;
    s.q.sum += q.sum, s.q.dot += q.dot, s.q.cross += q.cross;
}

/// Adds n columns of both tensors to a thread's sums. A NaN does not change the maximum, but makes
/// the sum NaN.
template <bool kCapped, int n>
RW_DEVICE void absorb(State& s, float (&x)[n], float (&y)[n], const Scales& scales, const Softcap& p_cap, const Softcap& q_cap) {
    constexpr float kLarge = 1e20f;
    float p_top = s.p.top, q_top = s.q.top, low = kLarge;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        if constexpr (kCapped) {
            if (p_cap.on) p_cap.apply(x[j]);
            if (q_cap.on) q_cap.apply(y[j]);
        }
        p_top = fmaxf(p_top, x[j]);
        q_top = fmaxf(q_top, y[j]);
        low = fminf(low, fminf(x[j], y[j]));
    }
    rebase(s, p_top, q_top, scales);
    const float p_base = finite_top(p_top), q_base = finite_top(q_top);
    if (!kCapped && low > -kLarge && fmaxf(p_top, q_top) < kLarge) {
        add<true>(s, x, y, p_base, q_base, scales);
    } else {
        add<false>(s, x, y, p_base, q_base, scales);
    }
}

}  // namespace
}  // namespace reweight_ops
