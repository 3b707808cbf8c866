// The two sweeps over a row: statistics, and the gradient. Everything vocabulary-sized happens here.
#pragma once

#include <cmath>

#include "common/row_state.h"
#include "simd.h"

namespace reweight_ops {
namespace {

/// Columns of one block: small enough for the first-level cache, and the unit in which the reference of the exponentials may change.
constexpr int64_t kBlock = 2048;
/// The reference may lag the running maximum by 2^8: a block is redone only when it exceeds that, so maxima need no sweep of their own.
constexpr float kMargin = 8.0f;
/// Lower bound of an exponent: 2^-150 is 0, and 0 * -150 is 0 where 0 * -inf would be NaN.
constexpr float kFloor = -150.0f;
constexpr double kLn2 = 0.693147180559945309417, kLog2e = 1.442695040888963407360;

/// What a sweep computes besides Σe: nothing, Σe·t, or that and Σe² with an optional softcap.
enum class Sums { plain, entropy, full };
/// What a gradient sweep evaluates: e·A, e·(A + B·t), or e·(A + B·t + D·e) times the softcap's slope.
enum class Terms { plain, entropy, full };

struct Softcap {
    bool on;
    Vec cap, inverse;
    explicit Softcap(float c) : on(c < kInf), cap(splat(c)), inverse(splat(1.0f / c)) {}

    /// cap·tanh(x / cap), and its derivative. Infinities stay: -inf has no mass, +inf has to make the row NaN.
    void apply(Vec& x, Vec& slope) const {
        const Vec r = tanh(x * inverse);
        const VecI infinite = ((VecI)x & INT32_MAX) == 0x7f800000;
        x = select(infinite, x, cap * r);
        slope = splat(1.0f) - r * r;
    }
    /// The same for one number, with the same bits as for a column of a row.
    void apply_one(float& x, float& slope) const {
        Vec v = splat(x), s;
        apply(v, s);
        x = v[0];
        slope = s[0];
    }
};

struct BlockSums {
    float top, sum, dot, sum_sq;  // top: the largest capped logit
};

template <Sums kSums>
struct Accumulator {
    Vec top = splat(-kInf), sum{}, dot{}, sum_sq{};

    /// One vector of logits; returns its exponentials.
    Vec add(Vec x, Vec scale, Vec minus_ref, const Softcap& softcap) {
        if constexpr (kSums == Sums::full) {
            Vec slope;
            if (softcap.on) softcap.apply(x, slope);
        }
        top = max(top, x);
        Vec t = fma(x, scale, minus_ref);
        if constexpr (kSums != Sums::plain) t = max(splat(kFloor), t);
        const Vec e = exp2(t);
        sum += e;
        if constexpr (kSums != Sums::plain) dot = fma(e, t, dot);
        if constexpr (kSums == Sums::full) sum_sq = fma(e, e, sum_sq);
        return e;
    }
};

/// Kept exponentials of fp32 may overlay the output row, which ends where it ends; those of 16-bit rows lie in a padded buffer of their own.
template <class T>
inline void keep_partial(float* kept, int64_t n, Vec a, Vec b) {
    if constexpr (sizeof(T) == sizeof(float)) {
        store2_partial(kept, n, a, b);
    } else {
        store2(kept, a, b);
    }
}
template <class T>
inline void kept_partial(const float* kept, int64_t n, Vec& a, Vec& b) {
    if constexpr (sizeof(T) == sizeof(float)) {
        load2_partial(kept, n, a, b);
    } else {
        load2(kept, a, b);
    }
}

/// Sums of one block relative to `ref`. With kKeep the exponentials are stored to `kept` (in load2's order), which may be x itself.
template <class T, Sums kSums, bool kKeep>
inline BlockSums sweep_block(const T* x, int64_t n, float scale, float ref, const Softcap& softcap, float* kept) {
    Accumulator<kSums> acc[4];
    const Vec k = splat(scale), minus_ref = splat(-ref);
    const auto add2 = [&](Accumulator<kSums>* into, Vec& a, Vec& b) {
        a = into[0].add(a, k, minus_ref, softcap);
        b = into[1].add(b, k, minus_ref, softcap);
    };
    Vec a, b, c, d;
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        load2(x + i, a, b);
        load2(x + i + 2 * kWidth, c, d);
        add2(acc, a, b);
        add2(acc + 2, c, d);
        if constexpr (kKeep) {
            store2(kept + i, a, b);
            store2(kept + i + 2 * kWidth, c, d);
        }
    }
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        load2(x + i, a, b);
        add2(acc, a, b);
        if constexpr (kKeep) store2(kept + i, a, b);
    }
    if (i < n) {
        load2_partial(x + i, n - i, a, b);
        add2(acc + 2, a, b);
        if constexpr (kKeep) keep_partial<T>(kept + i, n - i, a, b);
    }
    return {largest(max(max(acc[0].top, acc[1].top), max(acc[2].top, acc[3].top))), sum((acc[0].sum + acc[1].sum) + (acc[2].sum + acc[3].sum)),
            sum((acc[0].dot + acc[1].dot) + (acc[2].dot + acc[3].dot)), sum((acc[0].sum_sq + acc[1].sum_sq) + (acc[2].sum_sq + acc[3].sum_sq))};
}

/// The largest capped logit of a block.
template <class T>
inline float block_top(const T* x, int64_t n, const Softcap& softcap) {
    Vec top0 = splat(-kInf), top1 = top0, a, b;
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        load2(x + i, a, b);
        top0 = max(top0, a);
        top1 = max(top1, b);
    }
    if (i < n) {
        load2_partial(x + i, n - i, a, b);
        top0 = max(top0, a);
        top1 = max(top1, b);
    }
    float top = largest(max(top0, top1)), slope;
    if (softcap.on) softcap.apply_one(top, slope);  // it is monotonic
    return top;
}

/// A row's online softmax, and the reference of each block's exponentials when they are kept.
struct RowSweep {
    RowState<double> state;
    float top = -kInf;
};

inline float next_reference(float ref, float top) { return top > ref + kMargin ? top : ref; }

/// `scale`: log2(e) / T. With kKeep, `kept` and `refs` receive each block's exponentials and what they are relative to.
/// If `kept` overlays x, maxima are taken before a block is overwritten; the references, and so the results, are the same.
template <class T, Sums kSums, bool kKeep>
RowSweep sweep_row(const T* x, int64_t columns, float scale, const Softcap& softcap, float* kept = nullptr, float* refs = nullptr) {
    RowSweep row;
    const bool overlaid = kKeep && (const void*)kept == (const void*)x;
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
        const T* block = x + begin;
        float* keep = kKeep ? kept + begin : nullptr;
        float ref = float(row.state.ref);
        if (overlaid || ref == -kInf) ref = next_reference(ref, block_top(block, n, softcap) * scale);
        // A block of -inf still has to be swept, relative to anything finite: it may hold a NaN.
        BlockSums sums = sweep_block<T, kSums, kKeep>(block, n, scale, ref == -kInf ? 0.0f : ref, softcap, keep);
        const float wanted = next_reference(ref, sums.top * scale);
        if (wanted != ref) {
            ref = wanted;
            sums = sweep_block<T, kSums, kKeep>(block, n, scale, ref, softcap, keep);
        }
        if (double(ref) != row.state.ref) row.state.rebase(ref);
        row.state.update(sums.sum, sums.dot, sums.sum_sq);
        row.top = sums.top > row.top ? sums.top : row.top;
        if constexpr (kKeep) refs[begin / kBlock] = ref == -kInf ? 0.0f : ref;
    }
    return row;
}

/// dL/dlogit = p·(constant + log·log p + p_coef·p) away from the target, before the softcap's slope; 1/T is in the coefficients.
struct GradCoefs {
    double constant, log, p_coef;
};

/// The same for exponentials e = 2^t relative to `ref`: e·(a + b·t + d·e).
struct BlockCoefs {
    Vec a, b, d;
    BlockCoefs(const GradCoefs& c, double ref, double lse2) {
        const double p = std::exp2(ref - lse2);  // p = e · 2^(ref - lse2)
        a = splat(float(p * (c.constant + c.log * kLn2 * (ref - lse2))));
        b = splat(float(p * c.log * kLn2));
        d = splat(float(p * p * c.p_coef));
    }
};

/// One block of the gradient. kKept: `kept` holds the exponentials, else they are computed from x.
template <class T, Terms kTerms, bool kKept>
inline void grad_block(const T* x, const float* kept, T* g, int64_t n, float scale, float ref, const BlockCoefs& c, const Softcap& softcap) {
    const Vec k = splat(scale), minus_ref = splat(-ref);
    constexpr bool kReadsLogits = !kKept || kTerms != Terms::plain;
    const auto one = [&](Vec x_v, Vec e) {
        Vec slope = splat(1.0f), t{};
        if constexpr (kTerms == Terms::full) {
            if (softcap.on) softcap.apply(x_v, slope);
        }
        if constexpr (kReadsLogits) t = fma(x_v, k, minus_ref);
        if constexpr (kTerms != Terms::plain) t = max(splat(kFloor), t);
        if constexpr (!kKept) e = exp2(t);
        Vec factor = c.a;
        if constexpr (kTerms != Terms::plain) factor = fma(t, c.b, factor);
        if constexpr (kTerms == Terms::full) factor = fma(e, c.d, factor) * slope;
        return e * factor;
    };
    Vec a{}, b{}, ea{}, eb{};
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        if constexpr (kReadsLogits) load2(x + i, a, b);
        if constexpr (kKept) load2(kept + i, ea, eb);
        store2(g + i, one(a, ea), one(b, eb));
    }
    if (i < n) {
        if constexpr (kReadsLogits) load2_partial(x + i, n - i, a, b);
        if constexpr (kKept) kept_partial<T>(kept + i, n - i, ea, eb);
        store2_partial(g + i, n - i, one(a, ea), one(b, eb));
    }
}

/// The gradient row from the logits, in one sweep. May be written over them.
template <class T, Terms kTerms>
void grad_row(const T* x, T* g, int64_t columns, float scale, double lse2, const GradCoefs& coefs, const Softcap& softcap) {
    const float ref = float(lse2);  // what is lost to this rounding is in the coefficients
    const BlockCoefs c(coefs, ref, lse2);
    grad_block<T, kTerms, false>(x, nullptr, g, columns, scale, ref, c, softcap);
}

/// The gradient row from the exponentials that sweep_row kept.
template <class T, Terms kTerms>
void grad_row_kept(const T* x, const float* kept, const float* refs, T* g, int64_t columns, float scale, double lse2, const GradCoefs& coefs) {
    const Softcap off(kInf);
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
        const float ref = refs[begin / kBlock];
        grad_block<T, kTerms, true>(x + begin, kept + begin, g + begin, n, scale, ref, BlockCoefs(coefs, ref, lse2), off);
    }
}

}  // namespace
}  // namespace reweight_ops
