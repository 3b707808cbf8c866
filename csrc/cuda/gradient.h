// The gradient of a row: its constants, evaluated once, and the sweep that writes it.
#pragma once

#include <type_traits>

#include "common/derivatives.h"
#include "statistics.h"

namespace reweight_ops {
namespace {

/// Constants of a row's gradient sweep, with p = 2^rest·e and e = 2^t. t = scale·x - base, but t =
/// scale·(x - base) for the terms `far` and `full`, whose logits may have any size. A, B and D of
/// Terms are constant, log and p_coef.
struct RowGradient {
    Terms terms;
    float value;  // of Terms::fill
    float scale, base, constant, log, p_coef;
    float target;  // the gradient of the target
};

/// The origin of a row's exponents. `near`: it is a product, and a logit takes one fma. Otherwise
/// it is a logit.
struct Origin {
    bool near;
    float base;
    float rest, factor;  // log2 of p/e, and 2^rest; NaN without a distribution
};

RW_DEVICE RowGradient row_gradient(const Derivatives<float>& d, float temperature, float scale, const Origin& from, const Target& target, bool full) {
    RowGradient g{};
    g.terms = Terms::fill;
    g.scale = scale;
    if (d.all_zero()) return g;
    g.target = target.exact == -kInf ? 0.0f : d.at_target() * target.slope / temperature;
    if (from.rest != from.rest) {
        g.value = g.target = kNaN;
        return g;
    }
    g.terms = full ? Terms::full : !from.near ? Terms::far : d.d_entropy != 0 ? Terms::entropy : Terms::plain;
    g.base = from.base;
    const GradientFactors<float> c = d.factors(fmaf(kLn2f, from.rest, d.entropy));  // l = ln2·t
    g.constant = c.constant * from.factor / temperature;
    g.log = c.log * kLn2f * from.factor / temperature;
    g.p_coef = c.p_coef * from.factor * from.factor / temperature;
    return g;
}

/// kBounded means that x is not -inf.
template <Terms kTerms, bool kBounded = false>
RW_DEVICE float gradient_of(float x, const RowGradient& g, const Softcap& softcap) {
    if constexpr (kTerms == Terms::fill) return g.value;
    float slope = 1.0f;
    if constexpr (kTerms == Terms::full) {
        if (softcap.on) slope = softcap.apply(x);
    }
    const float t = kTerms == Terms::far || kTerms == Terms::full ? (x - g.base) * g.scale : fmaf(x, g.scale, -g.base);
    const float e = exp2_approximate(t);
    if constexpr (kTerms == Terms::plain) return e * g.constant;
    float factor = fmaf(kBounded ? t : fmaxf(t, kFloor), g.log, g.constant);
    if constexpr (kTerms == Terms::full) factor = fmaf(e, g.p_coef, factor) * slope;
    return e * factor;
}

/// The gradient of a vector of logits.
template <class T, Terms kTerms>
RW_DEVICE Vector gradient_of(const Vector& v, const RowGradient& g, const Softcap& softcap) {
    constexpr bool kBounded = kBoundsPairs<T> && kTerms == Terms::entropy;
    float values[kPerVector<T>] = {};
    if constexpr (kTerms != Terms::fill) unpack<T>(kBounded ? bounded(v) : v, values);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) values[j] = gradient_of<kTerms, kBounded>(values[j], g, softcap);
    return pack<T>(values);
}

/// Calls f(terms) with the row's terms as a compile-time constant. kFull: the kernel for softcap
/// and Σp² terms, which has no other terms.
template <bool kFull, class F>
RW_DEVICE void with_terms(Terms terms, const F& f) {
    if (terms == Terms::fill) {
        f(std::integral_constant<Terms, Terms::fill>());
    } else if constexpr (kFull) {
        f(std::integral_constant<Terms, Terms::full>());
    } else if (terms == Terms::plain) {
        f(std::integral_constant<Terms, Terms::plain>());
    } else if (terms == Terms::entropy) {
        f(std::integral_constant<Terms, Terms::entropy>());
    } else {
        f(std::integral_constant<Terms, Terms::far>());
    }
}

/// One step of a gradient sweep: reads and writes the vectors at `at`, at + kThreads, ...
template <class T, Terms kTerms, int kInFlight>
RW_DEVICE void write_vectors(const T* x, T* out, int at, const RowGradient& g, const Softcap& softcap) {
    constexpr int n = kPerVector<T>;
    Vector v[kInFlight] = {};
    if constexpr (kTerms != Terms::fill) {
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) v[u] = load16(x + int64_t(at + u * kThreads) * n);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) store16(out + int64_t(at + u * kThreads) * n, gradient_of<T, kTerms>(v[u], g, softcap));
}

/// Divides a row's columns among threads: `head` columns, one per thread; whole vectors; and the
/// remaining columns, one per thread. The order of a gradient does not matter, so that vectors
/// start where they are aligned in memory, if logits and gradient agree. Otherwise every column is
/// written by itself.
struct GradientColumns {
    int head, vectors;

    template <class T>
    RW_DEVICE GradientColumns(const T* x, const T* out, bool reads, int vocab) {
        const auto off = [](const T* p) { return int(reinterpret_cast<uintptr_t>(p) & 15); };
        head = (16 - off(out)) % 16 / int(sizeof(T));
        if (head > vocab) head = vocab;
        vectors = !reads || off(x) == off(out) ? (vocab - head) / kPerVector<T> : 0;
    }
    /// The thread that writes a column. It may write the column again without a barrier.
    template <class T>
    RW_DEVICE int owner(int column) const {
        const int in_vectors = column - head, after = in_vectors - vectors * kPerVector<T>;
        return (in_vectors < 0 ? column : after < 0 ? in_vectors / kPerVector<T> : after) % kThreads;
    }
};

/// Sweeps from the last column to the first: the L2 cache still has what the statistics sweep read
/// last. It may write in place.
template <class T, Terms kTerms, int kVectors>
RW_DEVICE void sweep_gradient(const T* x, T* out, int vocab, const GradientColumns& columns, const RowGradient& g, const Softcap& softcap) {
    // With a softcap, registers do not suffice for more.
    constexpr int kInFlight = kTerms == Terms::far ? 1 : kTerms == Terms::full ? kUnroll / 2 : kVectors;
    constexpr int n = kPerVector<T>, kStep = kThreads * kInFlight;
    const auto write = [&](int column) { narrow(gradient_of<kTerms>(kTerms == Terms::fill ? 0.0f : widen(x[column]), g, softcap), out[column]); };
    const int whole = columns.vectors / kStep * kStep;
    for (int column = columns.head + columns.vectors * n + thread_index(); column < vocab; column += kThreads) write(column);
    const T* const from = x + columns.head;
    T* const to = out + columns.head;
    for (int at = whole + thread_index(); at < columns.vectors; at += kThreads) write_vectors<T, kTerms, 1>(from, to, at, g, softcap);
    for (int at = whole - kStep + thread_index(); at >= 0; at -= kStep) write_vectors<T, kTerms, kInFlight>(from, to, at, g, softcap);
    if (thread_index() < columns.head) write(thread_index());
}

/// A row with the constants of its gradient.
template <class T>
struct GradientRow {
    const T* x;
    T* out;
    int target;  // its column; -1 if another shard has it or no shard does
    RowGradient g;
};

/// Writes one gradient row with its padding. kFull: with softcap or Σp² terms. kVectors: vectors in
/// flight per thread. A row in shared memory is read again after the sweep, because the sweep's
/// registers are scarce.
template <class T, bool kFull, int kVectors>
RW_DEVICE void write_gradient(const GradientRow<T>& row, int vocab, int columns, const Softcap& softcap) {
    const RowGradient g = row.g;
    const GradientColumns division(row.x, row.out, g.terms != Terms::fill, vocab);
    with_terms<kFull>(g.terms, [&](auto terms) { sweep_gradient<T, decltype(terms)::value, kVectors>(row.x, row.out, vocab, division, g, softcap); });
    if (row.target >= 0 && division.owner<T>(row.target) == thread_index()) narrow(row.g.target, row.out[row.target]);
    for (int64_t column = vocab + thread_index(); column < columns; column += kThreads) narrow(0.0f, row.out[column]);
}

}  // namespace
}  // namespace reweight_ops
