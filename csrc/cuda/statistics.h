// The statistics sweep: a thread's own sums, their reduction over the block, and the row's statistics.
#pragma once

#include "common/row_state.h"
#include "elements.h"
#include "slices.h"

namespace reweight_ops {
namespace {

/// Lower bound of an exponent: 2^-150 is 0, and 0 * -150 is 0 where 0 * -inf would be NaN.
constexpr float kFloor = -150.0f;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

/// What a sweep sums: Σe and Σe·t, or Σe² too, with an optional softcap.
enum class Sums { entropy, full };

struct Softcap {
    bool on;
    float cap;
    RW_DEVICE explicit Softcap(float c) : on(c < kInf), cap(c) {}

    /// cap·tanh(x / cap); returns its derivative. Infinities stay: -inf has no mass, +inf has to make the row NaN.
    RW_DEVICE float apply(float& x) const {
        const float r = tanhf(x / cap);
        if (fabsf(x) != kInf) x = cap * r;
        return 1.0f - r * r;
    }

    /// The same in fp64, for the one logit whose error nothing averages out: fp32 would cost its log-prob two units in the last place.
    RW_DEVICE double exactly(float x, float& slope) const {
        const double r = 1.0 - 2.0 / (exp(2.0 * double(x) / double(cap)) + 1.0);
        slope = float(1.0 - r * r);
        return fabsf(x) == kInf ? double(x) : cap * r;
    }
};

/// The target's logit, -inf if it is not here: as the sweeps cap it, exactly, and the derivative of that.
struct Target {
    float swept = -kInf;
    double exact = -kInf;
    float slope = 1.0f;

    RW_DEVICE Target() {}
    RW_DEVICE Target(float x, const Softcap& softcap) : swept(x), exact(double(x)) {
        if (!softcap.on) return;
        softcap.apply(swept);
        exact = softcap.exactly(x, slope);
    }
};

/// Sums over the columns seen so far, with t = log2(e)/T·x - reference: the reference is that of the largest logit.
struct Partial {
    float top, sum, dot, sum_sq;
};

using SlicePartials = Partial[kWarps];
using RowPartials = SlicePartials[kMaxSlices];

/// Bounded below: differences of references are never NaN while everything is -inf. Nor while a thread has seen nothing but logits that are
/// masked, by a number like -1e30: below -2^29 a product is rounded by so much that the exponentials of the largest would be infinite.
RW_DEVICE float reference(float top, float scale) { return fmaxf(top * scale, -5.36870912e8f); }

RW_DEVICE void rebase(Partial& s, float top, float scale) {
    const float shift = reference(s.top, scale) - reference(top, scale);
    const float factor = exp2_approximate(shift);
    s.dot = factor * fmaf(shift, s.sum, s.dot);
    s.sum *= factor;
    s.sum_sq *= factor * factor;
    s.top = top;
}

RW_DEVICE Partial merge(Partial a, Partial b, float scale) {
    const float top = fmaxf(a.top, b.top);
    rebase(a, top, scale);
    rebase(b, top, scale);
    return {top, a.sum + b.sum, a.dot + b.dot, a.sum_sq + b.sum_sq};
}

/// What a group of logits adds to the sums.
template <Sums kSums>
struct Group {
    float scale, ref;
    float sum = 0.0f, dot = 0.0f, sum_sq = 0.0f;

    RW_DEVICE void add(float x, const Softcap& softcap) {
        if constexpr (kSums == Sums::full) {
            if (softcap.on) softcap.apply(x);
        }
        const float t = fmaf(x, scale, -ref), e = exp2_approximate(t);
        sum += e;
        dot = fmaf(e, fmaxf(t, kFloor), dot);
        if constexpr (kSums == Sums::full) sum_sq = fmaf(e, e, sum_sq);
    }
};

/// Adds a group of logits to a thread's sums: `top` is their maximum, for_each(f) calls f with each. A NaN is no maximum, but makes the sum NaN.
template <Sums kSums, class ForEach>
RW_DEVICE void absorb(Partial& s, float top, float scale, const Softcap& softcap, const ForEach& for_each) {
    if (kSums == Sums::full && softcap.on) softcap.apply(top);  // it is monotonic
    rebase(s, fmaxf(s.top, top), scale);
    Group<kSums> group{scale, reference(s.top, scale)};
    for_each([&](float x) { group.add(x, softcap); });
    s.sum += group.sum;
    s.dot += group.dot;
    s.sum_sq += group.sum_sq;
}

/// Adds a thread's vectors of one tile; what lies beyond the slice is -inf.
template <class T, Sums kSums>
RW_DEVICE void absorb_tile(Partial& s, const Vector (&v)[kUnroll], float scale, const Softcap& softcap) {
    const auto for_each = [&](const auto& f) {  // unpacked again each time: registers are scarcer than shifts
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float values[kPerVector<T>];
            unpack<T>(v[u], values);
#pragma unroll
            for (int j = 0; j < kPerVector<T>; ++j) f(values[j]);
        }
    };
    float top = -kInf;
    for_each([&](float value) { top = fmaxf(top, value); });
    absorb<kSums>(s, top, scale, softcap, for_each);
}

/// The columns after the last whole vector, a thread each. `x` is the row.
template <class T, Sums kSums>
RW_DEVICE void absorb_tail(Partial& s, const T* x, int columns, float scale, const Softcap& softcap) {
    const int tail = columns / kPerVector<T> * kPerVector<T> + thread_index();
    if (tail >= columns) return;
    const float last = widen(x[tail]);
    absorb<kSums>(s, last == last ? last : -kInf, scale, softcap, [&](const auto& f) { f(last); });
}

template <int kLanes>
RW_DEVICE Partial merge_lanes(Partial s, float scale) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes; lanes /= 2) {
        const Partial other{shuffle_xor(s.top, lanes), shuffle_xor(s.sum, lanes), shuffle_xor(s.dot, lanes), shuffle_xor(s.sum_sq, lanes)};
        s = merge(s, other, scale);
    }
    return s;
}

/// The sums of a slice, by a warp: in every one of its threads.
RW_DEVICE Partial merge_slice(const SlicePartials& partials, float scale) {
    return merge_lanes<kWarps>(partials[thread_index() % kWarps], scale);
}

/// The sums with the largest logit's own share exact. Its exponent is the rounding of the reference, not 0, and an approximate exponential of
/// it would be the whole error of a log-prob near 0. What to take away is what the sweep added: the same instruction on the same number.
RW_DEVICE Partial with_exact_top(Partial s, float scale) {
    const float t = fmaf(s.top, scale, -reference(s.top, scale)), e = exp2_approximate(t);
    if (s.sum > 0) {  // neither NaN nor all -inf
        s.sum += expm1f(t * kLn2) - (e - 1.0f);
        s.sum_sq += expm1f(2.0f * t * kLn2) - (fmaf(e, e, -1.0f));
    }
    return s;
}

/// Rounding may leave the range by 1e-7 where p is 1; nobody expects a positive log-prob. NaN stays.
RW_DEVICE float at_most_zero(float x) { return x > 0 ? 0.0f : x; }

/// log2 of the sum. NaN for a row that holds NaN or +inf, and for one that is all -inf: there is no distribution.
RW_DEVICE double log_sum(const Partial& s) {
    if (!(s.sum > 0)) return kNaN;
    // The exponent apart: the logarithm of a mantissa has a smaller error, and costs no fp64 function.
    const uint32_t bits = as_bits(s.sum);
    return double(int(bits >> 23) - 127) + double(log2f(as_float((bits & 0x7fffffu) | 0x3f800000u)));
}

/// A dozen fp64 operations, once a row: what is rounded here, the ratio multiplies.
RW_DEVICE RowStats finish(const Partial& s, const Target& target, float temperature, float scale) {
    constexpr double ln2 = 0.693147180559945309417, log2e = 1.442695040888963407360;
    const double log_s = log_sum(s), mean = double(s.dot / s.sum), t_top = double(fmaf(s.top, scale, -reference(s.top, scale)));
    const double rounding = double(temperature) * scale - log2e;  // of the scale, which sharpens the row by as much
    const double inverse = 1.0 / double(temperature);
    const double swept = (log_s - t_top - rounding / log2e * (mean - t_top)) * ln2;  // lse - top/T, by the logits as swept
    const double above = (target.exact - double(s.top)) * inverse, error = (target.exact - double(target.swept)) * inverse;
    const double rest = target.exact == double(target.swept) ? swept : swept + expf(float(above - swept)) * error;
    RowStats out;
    out.logp = at_most_zero(float(above - rest));
    out.entropy = 0.0f - at_most_zero(float((mean - log_s) * ln2));  // and not -0
    out.lse = float(double(s.top) * inverse + rest);
    out.log_sum_p_sq = at_most_zero(float((double(log2f(s.sum_sq)) - 2.0 * log_s) * ln2));
    out.max_logp = target.swept == s.top ? out.logp : at_most_zero(float(-swept));
    return out;
}

}  // namespace
}  // namespace reweight_ops
