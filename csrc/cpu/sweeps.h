// The two sweeps over a row: statistics, and the gradient. Everything vocabulary-sized happens here.
#pragma once

#include <cmath>

#include "common/row_state.h"
#include "simd.h"

namespace reweight_ops {
namespace {

/// Columns of one block, the unit in which the reference of the exponentials may change: 32 additions for each lane of four accumulators,
/// so that fp32 sums stay exact to a few roundings at any width.
constexpr int64_t kBlock = 128 * kWidth;
/// The reference may lag the running maximum by 2^2: a block is redone only when it exceeds that, so maxima need no sweep of their own.
/// More would cost the entropy digits: its two parts grow with the lag and cancel.
constexpr double kMargin = 2.0;
/// How far ahead of a sweep to fetch: the hardware's own prefetch stops at every page of 4 KiB.
constexpr int64_t kFetchAhead = 8192;
/// Lower bound of an exponent: 2^-150 is 0, and 0 * -150 is 0 where 0 * -inf would be NaN.
constexpr float kFloor = -150.0f;
constexpr double kLn2 = 0.693147180559945309417, kLog2e = 1.442695040888963407360;

/// Starts loading the cache lines of [p, p + bytes); any address will do.
template <int64_t kBytes>
inline void fetch(const char* p) {
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(p + line);
}

/// What a gradient sweep fetches while it runs: from `p`, 2^-shift bytes for each byte of its own.
struct Fetch {
    const char* p;
    int shift;
};

/// What a sweep computes besides Σe: nothing, Σe·t, or that and Σe² with an optional softcap.
enum class Sums { plain, entropy, full };
/// Degree of the exponential in a gradient of this type: its error vanishes in the rounding of the result.
template <class T>
constexpr int kDegree = 5;
template <>
constexpr int kDegree<Bf16> = 3;
template <>
constexpr int kDegree<F16> = 4;

/// What a gradient sweep evaluates: e·A, e·(A + B·t), or e·(A + B·t + D·e) times the softcap's slope.
enum class Terms { plain, entropy, full };

struct Softcap {
    bool on;
    Vec cap;
    explicit Softcap(float c) : on(c < kInf), cap(splat(c)) {}

    /// cap·tanh(x / cap), and its derivative. Infinities stay: -inf has no mass, +inf has to make the row NaN.
    void apply(Vec& x, Vec& slope) const {
        const Vec r = tanh(x / cap, slope);
        const VecI infinite = ((VecI)x & INT32_MAX) == 0x7f800000;
        x = select(infinite, x, cap * r);
    }
    /// The same for one number, with the same bits as for a column of a row.
    void apply_one(float& x, float& slope) const {
        Vec v = splat(x), s;
        apply(v, s);
        x = v[0];
        slope = s[0];
    }
};

/// t = scale·x - ref, to within the rounding of t itself however large x is: in one rounding, or by subtracting before scaling.
struct Shift {
    Vec scale, minus;
    double ref;  // the representable reference nearest to the wanted one

    Shift(float k, double wanted) : scale(splat(k)) {
        const float r = kFused ? float(wanted) : float(wanted / k);
        minus = splat(-r);
        ref = kFused ? r : double(r) * k;
    }
    Vec operator()(Vec x) const { return kFused ? fma(x, scale, minus) : (x + minus) * scale; }
};

struct BlockSums {
    float top;  // the largest capped logit
    double sum, dot, sum_sq;
};

template <Sums kSums>
struct Accumulator {
    Vec top = splat(-kInf), sum{}, dot{}, sum_sq{};

    /// One vector of logits.
    void add(Vec x, const Shift& shift, const Exp2<5>& exponential, const Softcap& softcap) {
        if constexpr (kSums == Sums::full) {
            Vec slope;
            if (softcap.on) softcap.apply(x, slope);
        }
        top = max(top, x);
        Vec t = shift(x);
        if constexpr (kSums != Sums::plain) t = max(splat(kFloor), t);
        const Vec e = exponential(t);
        sum += e;
        if constexpr (kSums != Sums::plain) dot = fma(e, t, dot);
        if constexpr (kSums == Sums::full) sum_sq = fma(e, e, sum_sq);
    }
};

/// Sums of one block relative to shift.ref.
template <class T, Sums kSums>
inline BlockSums sweep_block(const T* x, int64_t n, const Shift& shift, const Exp2<5>& exponential, const Softcap& softcap) {
    Accumulator<kSums> acc[4];
    const auto add2 = [&](Accumulator<kSums>* into, Vec a, Vec b) {
        into[0].add(a, shift, exponential, softcap);
        into[1].add(b, shift, exponential, softcap);
    };
    Vec a, b, c, d;
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        load2(x + i, a, b);
        load2(x + i + 2 * kWidth, c, d);
        fetch<4 * kWidth * sizeof(T)>((const char*)(x + i) + kFetchAhead);
        add2(acc, a, b);
        add2(acc + 2, c, d);
    }
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        load2(x + i, a, b);
        add2(acc, a, b);
    }
    if (i < n) {
        load2_partial(x + i, n - i, a, b);
        add2(acc + 2, a, b);
    }
    return {largest(max(max(acc[0].top, acc[1].top), max(acc[2].top, acc[3].top))), sum4(acc[0].sum, acc[1].sum, acc[2].sum, acc[3].sum),
            sum4(acc[0].dot, acc[1].dot, acc[2].dot, acc[3].dot), sum4(acc[0].sum_sq, acc[1].sum_sq, acc[2].sum_sq, acc[3].sum_sq)};
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

/// A row's online softmax and its largest capped logit.
struct RowSweep {
    RowState<double> state;
    float top = -kInf;
};

/// `scale`: log2(e) / T.
template <class T, Sums kSums>
RowSweep sweep_row(const T* x, int64_t columns, float scale, const Softcap& softcap) {
    RowSweep row;
    const Exp2<5> exponential(1.0);
    const auto raised = [scale](double ref, float top) {
        const double t = double(top) * scale;
        return t > ref + kMargin ? Shift(scale, t).ref : ref;
    };
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
        const T* block = x + begin;
        double ref = row.state.ref;
        if (ref == -kInf) ref = raised(ref, block_top(block, n, softcap));
        // A block of -inf still has to be swept, relative to anything finite: it may hold a NaN.
        BlockSums sums = sweep_block<T, kSums>(block, n, Shift(scale, ref == -kInf ? 0.0 : ref), exponential, softcap);
        const double wanted = raised(ref, sums.top);
        if (wanted != ref) {
            ref = wanted;
            sums = sweep_block<T, kSums>(block, n, Shift(scale, ref), exponential, softcap);
        }
        if (ref != row.state.ref) row.state.rebase(ref);
        row.state.update(sums.sum, sums.dot, sums.sum_sq);
        row.top = sums.top > row.top ? sums.top : row.top;
    }
    // One column may be nearly all of the sum. What it added is put right, so that a log-prob near 0 is as exact as fp32 can hold it.
    const double ref = row.state.ref, t = double(row.top) * scale - ref, e = std::exp2(t);
    const Vec t_added = Shift(scale, ref)(splat(row.top));
    const double e_added = exponential(t_added)[0];
    if (std::isfinite(t)) row.state.update(e - e_added, e * t - e_added * t_added[0], e * e - e_added * e_added);
    return row;
}

/// Gradients beyond this size are held by no cache when they are next read.
constexpr int64_t kCacheBytes = 8 << 20;

template <class T>
void fill(T* g, int64_t n, float value) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) store2(g + i, splat(value), splat(value));
    if (i < n) store2_partial(g + i, n - i, splat(value), splat(value));
}

/// dL/dlogit = p·(constant + log·log p + p_coef·p) away from the target, before the softcap's slope; 1/T is in the coefficients.
struct GradCoefs {
    double constant, log, p_coef;
};

/// The gradient row from the logits, in one sweep. May be written over them. kStream: past the caches, for which g must be aligned to 64.
template <class T, Terms kTerms, bool kStream>
void grad_row(const T* x, T* g, int64_t columns, float scale, double lse2, const GradCoefs& coefs, const Softcap& softcap, Fetch ahead) {
    // With e = 2^t relative to ref, p = e·2^(ref - lse2): what is lost by rounding lse2 to ref goes into the coefficients.
    const Shift shift(scale, lse2);
    const double rest = shift.ref - lse2, p = std::exp2(rest);
    const Vec a = splat(float(p * (coefs.constant + coefs.log * kLn2 * rest))), b = splat(float(p * coefs.log * kLn2)), d = splat(float(p * p * coefs.p_coef));
    const Exp2<kDegree<T>> exponential(kTerms == Terms::plain ? p * coefs.constant : 1.0);
    const auto one = [&](Vec v) {
        Vec slope = splat(1.0f);
        if constexpr (kTerms == Terms::full) {
            if (softcap.on) softcap.apply(v, slope);
        }
        Vec t = shift(v);
        if constexpr (kTerms == Terms::plain) return exponential(t);
        t = max(splat(kFloor), t);
        const Vec e = exponential(t);
        Vec factor = fma(t, b, a);
        if constexpr (kTerms == Terms::full) factor = fma(e, d, factor) * slope;
        return e * factor;
    };
    Vec v, w;
    int64_t i = 0;
    for (; i + 2 * kWidth <= columns; i += 2 * kWidth) {
        load2(x + i, v, w);
        fetch<2 * kWidth * sizeof(T)>(ahead.p + (i * sizeof(T) >> ahead.shift));
        if constexpr (kStream) {
            stream2(g + i, one(v), one(w));
        } else {
            store2(g + i, one(v), one(w));
        }
    }
    if (i < columns) {
        load2_partial(x + i, columns - i, v, w);
        store2_partial(g + i, columns - i, one(v), one(w));
    }
}

}  // namespace
}  // namespace reweight_ops
