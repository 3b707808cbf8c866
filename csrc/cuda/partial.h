// Sums over part of a row that stay exact for a sure token: the largest logit, and the sums of all
// others. In such a row the sum of all exponentials rounds to 1. The log-prob of its token is
// -log1p(rest), and 1 - p is rest / (1 + rest).
#pragma once

#include "common/constants.h"
#include "common/row_stats.h"
#include "elements.h"
#include "slices.h"

namespace reweight_ops {
namespace {

struct Softcap {
    bool on;
    float cap;
    RW_DEVICE explicit Softcap(float c) : on(c < kInf), cap(c) {}

    /// Sets x to cap·tanh(x / cap) and returns the derivative. Infinities stay: -inf has no mass,
    /// and +inf must make the row NaN.
    RW_DEVICE float apply(float& x) const {
        const float r = tanhf(x / cap);
        if (fabsf(x) != kInf) x = cap * r;
        return 1.0f - r * r;
    }

    /// The same in fp64 for the one logit whose error does not average out: fp32 would cost its
    /// log-prob two units in the last place.
    RW_DEVICE double exactly(float x, float& slope) const {
        const double r = 1.0 - 2.0 / (exp(2.0 * double(x) / double(cap)) + 1.0);
        slope = float(1.0 - r * r);
        return fabsf(x) == kInf ? double(x) : cap * r;
    }
};

/// The target's logit: as the sweeps cap it, its exact value, and the derivative of the cap. It is
/// -inf if another shard has the target.
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

/// Σe, Σe·t and Σe² over all columns but the largest, with t = scale·(x - top) and e = 2^t. The
/// largest column's own terms are 1, 0 and 1. An empty Partial has top = -inf.
struct Partial {
    float top, rest, dot, sum_sq;
};

using SlicePartials = Partial[kWarps];
using RowPartials = SlicePartials[kMaxSlices];

/// Merges two Partials. The order does not change the bits.
RW_DEVICE Partial merge(const Partial& a, const Partial& b, float scale) {
    const bool second = b.top > a.top;
    const Partial w = second ? b : a, l = second ? a : b;
    // The bound avoids NaN from -inf - -inf and from 0 * -inf.
    const float shift = fmaxf((l.top - w.top) * scale, -1e30f), e = exp2_approximate(shift);
    return {w.top, fmaf(e, l.rest, w.rest) + e, fmaf(e, fmaf(shift, 1.0f + l.rest, l.dot), w.dot), fmaf(e * e, l.sum_sq, w.sum_sq) + e * e};
}

template <int kLanes>
RW_DEVICE Partial merge_lanes(Partial s, float scale) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes; lanes /= 2) {
        s = merge(s, {shuffle_xor(s.top, lanes), shuffle_xor(s.rest, lanes), shuffle_xor(s.dot, lanes), shuffle_xor(s.sum_sq, lanes)}, scale);
    }
    return s;
}

/// Merges the sums of a slice with one warp. Every thread of the warp gets the result.
RW_DEVICE Partial merge_slice(const SlicePartials& partials, float scale) { return merge_lanes<kWarps>(partials[thread_index() % kWarps], scale); }

/// log2 of a number >= 2^-126. It treats the exponent separately: the logarithm of a mantissa has a
/// smaller error and needs no fp64 function.
RW_DEVICE double log2_of(float x) {
    const uint32_t bits = as_bits(x);
    return double(int(bits >> 23) - 127) + double(log2f(as_float((bits & 0x7fffffu) | 0x3f800000u)));
}

/// The natural logarithm of 1 + x.
RW_DEVICE double log1p_of(float x) { return x < 1.0f ? double(log1pf(x)) : log2_of(1.0f + x) * kLn2; }

/// lse - top/T of the logits as they were swept. It is NaN without a distribution: if the row holds
/// NaN or +inf, or only -inf.
RW_DEVICE double log_sum(const Partial& s) { return s.rest < kInf && s.top > -kInf ? log1p_of(s.rest) : kNaN; }

/// A dozen fp64 operations, once per row: the ratio multiplies every rounding error that is made
/// here.
RW_DEVICE RowStats finish(const Partial& s, const Target& target, float temperature, float scale) {
    const double log_s = log_sum(s), mean = double(s.dot / (1.0f + s.rest));
    const double rounding = double(temperature) * scale - kLog2e;  // relative rounding error of the scale, which sharpens the row by as much
    const double inverse = 1.0 / double(temperature);
    const double swept = log_s - rounding / kLog2e * mean * kLn2;  // lse - top/T
    // The target's capped logit has an error. Its probability carries the error into lse.
    const double above = (double(target.swept) - double(s.top)) * inverse - swept;
    const double error = target.exact == double(target.swept) ? 0.0 : (target.exact - double(target.swept)) * inverse;
    RowStats out;
    out.logp = at_most_zero(error == 0.0 ? float(above) : float(above - error * expm1f(float(above))));
    out.entropy = float(log_s - mean * kLn2);
    const double largest = double(s.top) * inverse, rest = error == 0.0 ? swept : swept + error * expf(float(above));
    out.lse = float(largest + rest);
    out.lse_low = is_empty(s.top, s.rest) ? -kInf : float((largest - out.lse) + rest);
    out.log_sum_p_sq = at_most_zero(float(log1p_of(s.sum_sq) - 2.0 * log_s));
    out.max_logp = target.swept == s.top ? out.logp : at_most_zero(float(-swept));
    return out;
}

}  // namespace
}  // namespace reweight_ops
