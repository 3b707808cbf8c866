// The two sweeps over a row: statistics and gradient. All work of the vocabulary's size happens
// here.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "common/derivatives.h"
#include "common/terms.h"
#include "row_state.h"
#include "simd.h"
#include "top_ids.h"

namespace reweight_ops {
namespace {

/// Columns of one block. The reference of the exponentials may change between blocks. A block is 32
/// additions for each lane of four accumulators, so that fp32 sums stay exact to a few roundings at
/// any width.
constexpr int64_t kBlock = 128 * kWidth;
/// The reference may lag the running maximum by 2^2. A block is summed again only when it exceeds
/// that, so that maxima need no sweep of their own. A larger margin would cost digits of the
/// entropy: its two parts grow with the lag and cancel.
constexpr double kMargin = 2.0;
/// How far ahead of a sweep to prefetch. The hardware prefetcher stops at every 4 KiB page.
constexpr int64_t kFetchAhead = 8192;

/// Starts loading the cache lines of [p, p + bytes). Any address is allowed.
template <int64_t kBytes>
inline void fetch(const char* p) {
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(p + line);
}

/// What a gradient sweep prefetches while it runs: from `p`, 2^-shift bytes for each byte of its
/// own row.
struct Fetch {
    const char* p;
    int shift;
};

/// The degree of the exponential in a gradient of this type. Its error vanishes in the rounding of
/// the result.
template <class T>
constexpr int kDegree = 5;
template <>
constexpr int kDegree<Bf16> = 3;
template <>
constexpr int kDegree<F16> = 4;

struct Softcap {
    bool on;
    Vec cap;
    explicit Softcap(float c) : on(c < kInf), cap(splat(c)) {}

    /// cap·tanh(x / cap), and its derivative. Infinities stay: -inf has no mass, and +inf must make
    /// the row NaN.
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

/// Beyond this magnitude of x·log2(e)/T, fp32 cannot hold a reference that keeps exponents small.
constexpr double kFarAway = 1 << 20;
inline bool is_far(float at, double scale) { return !(std::fabs(at * scale) < kFarAway); }

/// t = x·log2(e)/T - ref, to a few roundings of t however large x is. It takes one fma, or
/// subtracts before it scales, which is right for any x. The scale is rounded. `ref` is the product
/// at the logit `at`, so that this costs only a rounding of the difference.
template <bool kFar>
struct Shift {
    static constexpr bool kFma = kFused && !kFar;
    static constexpr bool kFarAway = kFar;
    Vec scale, minus;
    double ref;

    Shift(double exact_scale, float at) {
        const float k = float(exact_scale);
        const double product = double(at) * k;
        // Rounded down, so that t is never just below 0 at `at`: from above, the polynomial goes to
        // exactly 1.
        float r = kFma ? float(product) : at;
        if (kFma && r > product) r = std::nextafter(r, -kInf);
        scale = splat(k);
        minus = splat(-r);
        ref = double(at) * exact_scale - (kFma ? product - r : 0.0);
    }
    Vec operator()(Vec x) const { return kFma ? fma(x, scale, minus) : (x + minus) * scale; }
};

/// Calls body(shift to `at`), a generic function, for everything that is relative to one logit.
template <class Body>
auto with_shift(double scale, float at, const Body& body) {
    return is_far(at, scale) ? body(Shift<true>(scale, at)) : body(Shift<false>(scale, at));
}

struct BlockSums {
    float top = -kInf;  // the largest capped logit
    RowState<double> state;
    bool has_top = true;  // the sums include its own term
};

template <Sums kSums>
struct Accumulator {
    Vec top = splat(-kInf), sum{}, dot{}, sum_sq{};

    /// Adds one vector of logits.
    template <bool kFar>
    RW_INLINE void add(Vec x, const Shift<kFar>& shift, const Exp2<5>& exponential, const Softcap& softcap) {
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

/// The sums of one block relative to shift.ref.
template <class T, Sums kSums, bool kFar>
inline BlockSums sweep_block(const T* x, int64_t n, const Shift<kFar>& shift, const Exp2<5>& exponential, const Softcap& softcap) {
    Accumulator<kSums> acc[4];
    const auto add2 = [&](Accumulator<kSums>* into, Vec a, Vec b) RW_ALWAYS_INLINE {
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
    BlockSums sums;
    sums.top = largest(max(max(acc[0].top, acc[1].top), max(acc[2].top, acc[3].top)));
    sums.state.ref = shift.ref;
    sums.state.update(sum4(acc[0].sum, acc[1].sum, acc[2].sum, acc[3].sum), sum4(acc[0].dot, acc[1].dot, acc[2].dot, acc[3].dot),
                      sum4(acc[0].sum_sq, acc[1].sum_sq, acc[2].sum_sq, acc[3].sum_sq));
    return sums;
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

/// The first column of a block whose capped logit is `top`. There must be one.
template <class T>
inline int64_t find_top(const T* x, int64_t n, float top, const Softcap& softcap) {
    const auto is_top = [&](Vec v) {
        Vec slope;
        if (softcap.on) softcap.apply(v, slope);
        return v == splat(top);
    };
    Vec a, b;
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        load2(x + i, a, b);
        if (any(is_top(a) | is_top(b))) break;
    }
    while (i + 1 < n && !is_top(splat(load1(x + i)))[0]) ++i;
    return i;
}

/// The largest capped logit of a row, and the sums of all other columns.
struct RowSweep {
    float top = -kInf;
    RowState<double> rest;
};

/// Next to the 1 of the largest column, a sum of exponentials below this has lost too many digits
/// in fp32: the 32 additions of a block may lose 2^-19. Such a block is summed again without that
/// column.
constexpr double kSmallRest = 1.0 / 2048;
/// A maximum that exceeds the reference by 2^8 probably has nearly all of its row's mass. The next
/// sweep leaves it out at once.
constexpr double kLeap = 8.0;

template <class T, Sums kSums>
class RowSweeper {
public:
    /// `scale`: log2(e) / T. `likeliest`: null, or what is to see every block that may hold one of the largest logits.
    RowSweeper(double scale, const Softcap& softcap, TopIds<T>* likeliest = nullptr) : scale_(scale), softcap_(softcap), likeliest_(likeliest) {}

    RowSweep operator()(const T* x, int64_t columns) {
        const T* home = x;  // the block with the largest column is kept apart
        BlockSums kept;
        RowState<double> others;
        for (int64_t begin = 0; begin < columns; begin += kBlock) {
            const int64_t n = size_of(columns - begin);
            if (at_ == -kInf) at_ = block_top(x + begin, n, softcap_);
            BlockSums sums = sweep(x + begin, n);
            const double rise = (double(sums.top) - at_) * scale_;
            if (rise > kMargin) {
                at_ = sums.top;
                sums = rise > kLeap ? sweep_without(x + begin, n, sums.top) : sweep(x + begin, n);
            }
            if (likeliest_ && may_hold_likeliest(sums)) likeliest_->see(x + begin, begin, n);
            if (sums.top > kept.top) {
                std::swap(sums, kept);
                home = x + begin;
            }
            others.merge(with_top(sums));
        }
        RowSweep row{kept.top, others};
        row.rest.merge(without_top(kept));
        if (kept.has_top && row.rest.sum < kSmallRest) {  // the largest is 1 to 4 times the reference
            row.rest = others;
            row.rest.merge(sweep_without(home, size_of(columns - (home - x)), kept.top).state);
        }
        return row;
    }

private:
    /// A maximum says nothing of a block with a NaN, of which the sum tells; and a capped one nothing of logits.
    bool may_hold_likeliest(const BlockSums& sums) const { return softcap_.on || std::isnan(sums.state.sum) || !likeliest_->is_above(sums.top); }

    static int64_t size_of(int64_t left) { return left < kBlock ? left : kBlock; }

    /// Sums relative to the reference. Without one, every logit so far is -inf: the block may hold a
    /// NaN, and else it has no mass and nothing that other sums could be relative to.
    BlockSums sweep(const T* x, int64_t n) const {
        if (at_ == -kInf) {
            const BlockSums sums = sweep_from(0.0f, x, n);
            return std::isnan(sums.state.sum) ? sums : BlockSums();
        }
        return sweep_from(at_, x, n);
    }

    BlockSums sweep_from(float at, const T* x, int64_t n) const {
        return with_shift(scale_, at, [&](const auto& shift) {
            // One form serves all rows far from zero.
            constexpr Sums kThese = std::decay_t<decltype(shift)>::kFarAway ? Sums::full : kSums;
            return sweep_block<T, kThese>(x, n, shift, exponential_, softcap_);
        });
    }

    /// The same without one of the largest columns: the columns before it and those after it.
    BlockSums sweep_without(const T* x, int64_t n, float top) const {
        if (top == -kInf || top == kInf) return sweep(x, n);
        const int64_t column = find_top(x, n, top, softcap_);
        BlockSums sums = sweep(x, column);
        sums.state.merge(sweep(x + column + 1, n - column - 1).state);
        sums.top = top;
        sums.has_top = false;
        return sums;
    }

    RowState<double> with_top(const BlockSums& sums) const {
        RowState<double> state = sums.state;
        if (!sums.has_top) {
            const double t = double(sums.top) * scale_ - state.ref, e = std::exp2(t);
            state.update(e, e * t, e * e);
        }
        return state;
    }

    /// Subtracts exactly what the largest column added.
    RowState<double> without_top(const BlockSums& sums) const {
        RowState<double> state = sums.state;
        if (sums.has_top && sums.top > -kInf) {
            const Vec t = with_shift(scale_, at_, [&](const auto& shift) { return shift(splat(sums.top)); });
            const double e = exponential_(t)[0];
            state.update(-e, -e * t[0], -e * e);
        }
        return state;
    }

    const double scale_;
    const Softcap& softcap_;
    TopIds<T>* const likeliest_;
    const Exp2<5> exponential_{1.0};
    float at_ = -kInf;  // the logit that exponentials are relative to
};

/// No cache still holds a gradient beyond this size when it is read next.
constexpr int64_t kCacheBytes = 8 << 20;

template <class T>
void fill(T* g, int64_t n, float value) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) store2(g + i, splat(value), splat(value));
    if (i < n) store2_partial(g + i, n - i, splat(value), splat(value));
}

/// The origin of probabilities: a logit near the largest, and the log2 of the probability of a
/// column with that logit.
struct Anchor {
    float at;
    double log_p;
};

/// Writes the gradient row from the logits in one sweep. It may overwrite them. kStream writes past
/// the caches; g must then be aligned to 64.
template <class T, Terms kTerms, bool kStream, bool kFar>
void grad_row(const T* x, T* g, int64_t columns, const Shift<kFar>& shift, double log_p, const GradientFactors<double>& factors,
              const Softcap& softcap, Fetch ahead) {
    // p = e·2^log_p. The coefficients take log_p, the log-prob of a column where the shift is 0.
    const double p = std::exp2(log_p);
    const Vec a = splat(float(p * (factors.constant + factors.log * kLn2 * log_p))), b = splat(float(p * factors.log * kLn2)),
              d = splat(float(p * p * factors.p_coef));
    const Exp2<kDegree<T>> exponential(kTerms == Terms::plain ? p * factors.constant : 1.0);
    const auto one = [&](Vec v) RW_ALWAYS_INLINE {
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
