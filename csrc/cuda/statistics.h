// The statistics sweep: one thread's sums of a slice.
#pragma once

#include "common/terms.h"
#include "partial.h"

namespace reweight_ops {
namespace {

/// A thread's sums during a sweep, with the largest logit included. t = scale·x - reference(top)
/// takes one fma per logit.
struct Sweep {
    float top = -kInf, sum = 0.0f, dot = 0.0f, sum_sq = 0.0f;
};

/// Up to this magnitude a rounded reference is precise enough. Beyond it, exponents lose digits,
/// and such a thread sums again.
constexpr float kFar = 131072.0f;
RW_DEVICE bool is_near(float top, float scale) { return fabsf(top * scale) <= kFar && fabsf(top) <= kLowest; }

/// The bound avoids NaN from differences of references while every logit is -inf. It keeps the sums
/// of a thread far from zero finite or infinite.
RW_DEVICE float reference(float top, float scale) { return fminf(fmaxf(top * scale, -5.36870912e8f), 5.36870912e8f); }

RW_DEVICE void rebase(Sweep& s, float top, float scale) {
    const float shift = reference(s.top, scale) - reference(top, scale);
    const float factor = exp2_approximate(shift);
    s.dot = factor * fmaf(shift, s.sum, s.dot);
    s.sum *= factor;
    s.sum_sq *= factor * factor;
    s.top = top;
}

/// The sums of a group of logits. kBounded: none of them is -inf.
template <Sums kSums, bool kBounded>
struct Group {
    float scale, ref;
    float sum = 0.0f, dot = 0.0f, sum_sq = 0.0f;

    RW_DEVICE void add(float x, const Softcap& softcap) {
        if constexpr (kSums == Sums::full) {
            if (softcap.on) softcap.apply(x);
        }
        const float t = fmaf(x, scale, -ref), e = exp2_approximate(t);
        sum += e;
        dot = fmaf(e, kBounded ? t : fmaxf(t, kFloor), dot);
        if constexpr (kSums == Sums::full) sum_sq = fmaf(e, e, sum_sq);
    }
};

/// Adds a group of logits to a thread's sums. `top` is their maximum; for_each(f) calls f with
/// each. A NaN does not change the maximum, but makes the sum NaN.
template <Sums kSums, bool kBounded, class ForEach>
RW_DEVICE void absorb(Sweep& s, float top, float scale, const Softcap& softcap, const ForEach& for_each) {
    if (kSums == Sums::full && softcap.on) softcap.apply(top);  // it is monotonic
    if (top > s.top) rebase(s, top, scale);
    Group<kSums, kBounded> group{scale, reference(s.top, scale)};
    for_each([&](float x) { group.add(x, softcap); });
    s.sum += group.sum;
    s.dot += group.dot;
    s.sum_sq += group.sum_sq;
}

/// Adds a thread's vectors of one tile. Vectors beyond the slice are -inf.
template <class T, Sums kSums>
RW_DEVICE void absorb_tile(Sweep& s, const Vector (&v)[kUnroll], float scale, const Softcap& softcap) {
    constexpr bool kBounded = kBoundsPairs<T> && kSums == Sums::entropy;
    absorb<kSums, kBounded>(s, largest<T>(v), scale, softcap, [&](const auto& f) {  // unpacks only here: registers are scarcer than shifts
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float values[kPerVector<T>];
            unpack<T>(kBounded ? bounded(v[u]) : v[u], values);
#pragma unroll
            for (int j = 0; j < kPerVector<T>; ++j) f(values[j]);
        }
    });
}

/// The thread's column after the last whole vector, or -1.
template <class T>
RW_DEVICE int tail_of(int thread, int columns) {
    const int tail = columns / kPerVector<T> * kPerVector<T> + thread;
    return tail < columns ? tail : -1;
}

/// Adds the columns after the last whole vector, one per thread. `x` is the row.
template <class T, Sums kSums>
RW_DEVICE void absorb_tail(Sweep& s, const T* x, int columns, float scale, const Softcap& softcap) {
    const int tail = tail_of<T>(thread_index(), columns);
    if (tail < 0) return;
    const float last = widen(x[tail]);
    absorb<kSums, false>(s, last == last ? last : -kInf, scale, softcap, [&](const auto& f) { f(last); });
}

// ---- from a sweep to sums without the largest logit

/// Below this share of the largest exponential, the thread with the largest logit has lost its
/// other terms to rounding.
constexpr float kRoundedAway = 0x1p-10f;

/// Sums one thread's logits again with the whole warp, relative to their maximum `top`. for_each(f)
/// calls f with a lane's share of them. Exponents are of differences. Logits equal to the maximum
/// are counted: nothing is added to their 1.
template <Sums kSums, class ForEach>
RW_DEVICE Partial sum_again(float top, float scale, const Softcap& softcap, const ForEach& for_each) {
    float tops = 0.0f, rest = 0.0f, dot = 0.0f, sum_sq = 0.0f;
    for_each([&](float x) {
        if (kSums == Sums::full && softcap.on) softcap.apply(x);
        if (x == top) {
            tops += 1.0f;
            return;
        }
        const float t = (x - top) * scale, e = exp2_approximate(t);
        rest += e;
        dot = fmaf(e, fmaxf(t, kFloor), dot);
        sum_sq = fmaf(e, e, sum_sq);
    });
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
        tops += shuffle_xor(tops, lanes);
        rest += shuffle_xor(rest, lanes);
        dot += shuffle_xor(dot, lanes);
        sum_sq += shuffle_xor(sum_sq, lanes);
    }
    return {top, (tops - 1.0f) + rest, dot, (tops - 1.0f) + sum_sq};
}

/// A thread's sums relative to its largest logit and without it. It subtracts what the sweep added,
/// with the same instruction on the same number.
template <Sums kSums>
RW_DEVICE Partial without_top(const Sweep& s, float scale) {
    if (!is_near(s.top, scale)) {  // summed again if it has any mass; keeps NaN
        const float nothing = s.sum != s.sum || s.top == kInf ? kNaN : 0.0f;
        return {s.top, nothing, nothing, nothing};
    }
    const float t = fmaf(s.top, scale, -reference(s.top, scale)), e = exp2_approximate(t);  // |t| <= 2^-7
    const float u = -t * kLn2f, back = fmaf(fmaf(fmaf(u, 1.0f / 6.0f, 0.5f), u, 1.0f), u, 1.0f);
    const float rest = s.sum - e;
    Partial out{s.top, rest * back, back * fmaf(-t, rest, fmaf(-e, t, s.dot)), 0.0f};
    if constexpr (kSums == Sums::full) out.sum_sq = fmaf(-e, e, s.sum_sq) * back * back;
    return out;
}

/// The sums of a warp's part of a slice, in all its threads. share_of(thread, f) calls f with this
/// lane's share of the logits that `thread` swept.
template <Sums kSums, class ShareOf>
RW_DEVICE Partial merge_warp(const Sweep& swept, float scale, const Softcap& softcap, const ShareOf& share_of) {
    Partial s = without_top<kSums>(swept, scale), merged = merge_lanes<32>(s, scale);
    const bool far = !is_near(merged.top, scale);
    if (far ? fabsf(merged.top) < kInf : merged.rest < kRoundedAway) {
        // Sum again for the thread that has the maximum, or, far from zero, for every thread with
        // mass. The losses of other threads are small next to their own maximum.
        for (uint32_t todo = ballot(far ? (s.top - merged.top) * scale > kFloor : s.top == merged.top); todo; todo &= todo - 1) {
            const int lane = lowest_bit(todo);
            const int thread = thread_index() / 32 * 32 + lane;
            const Partial again = sum_again<kSums>(broadcast(s.top, lane), scale, softcap, [&](const auto& f) { share_of(thread, f); });
            if (thread == thread_index()) s = again;
        }
        merged = merge_lanes<32>(s, scale);
    }
    return merged;
}

/// Calls f with this lane's share of the vectors that `thread` swept in a slice. load(i) gives
/// vector i of the slice.
template <class T, class Load, class F>
RW_DEVICE void for_each_of(int thread, int vectors, const Load& load, const F& f) {
#pragma unroll 1
    for (int i = thread + thread_index() % 32 * kThreads; i < vectors; i += 32 * kThreads) {
        float values[kPerVector<T>];
        unpack<T>(load(i), values);
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j) f(values[j]);
    }
}

}  // namespace
}  // namespace reweight_ops
