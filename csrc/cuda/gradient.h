// The gradient of a row: its constants, evaluated once, and the sweep that writes it.
#pragma once

#include <type_traits>

#include "statistics.h"

namespace reweight_ops {
namespace {

/// Derivatives of the loss by the row's statistics, and those of the statistics that they multiply.
struct Derivatives {
    float logp_coef, entropy_coef, lse_coef, p_sq_coef;
    float logp, entropy, log_sum_p_sq;

    RW_DEVICE bool all_zero() const { return logp_coef == 0 && entropy_coef == 0 && lse_coef == 0 && p_sq_coef == 0; }

    /// The target's own element: p - 1 from its log-prob, for a rounded p loses everything as it goes to 1.
    RW_DEVICE float at_target() const {
        const float p = expf(logp);
        float g = lse_coef * p - logp_coef * expm1f(logp);
        if (entropy_coef != 0 && p > 0) g -= entropy_coef * p * (logp + entropy);
        if (p_sq_coef != 0) g += 2.0f * p_sq_coef * p * (p / expf(log_sum_p_sq) - 1.0f);
        return g;
    }
};

/// e·constant, e·(constant + log·t), or e·(constant + log·t + p_coef·e) times the softcap's slope; or one value in every column.
enum class Terms { fill, plain, entropy, full };

/// With e = 2^t, t = scale·x - ref, and p = 2^rest·e: what a gradient sweep needs to know of its row.
struct RowGradient {
    Terms terms;
    float value;  // of a fill
    float scale, ref, constant, log, p_coef;
    float target;  // the gradient of the target
};

/// `rest`: log2 of p/e, and `factor` is 2^rest; all by the row's reference. NaN: there is no distribution.
RW_DEVICE RowGradient row_gradient(const Derivatives& d, float temperature, float scale, float ref, float rest, float factor,
                                   const Target& target, bool softcap) {
    RowGradient g{};
    g.terms = Terms::fill;
    g.scale = scale;
    if (d.all_zero()) return g;
    g.target = target.exact == -kInf ? 0.0f : d.at_target() * target.slope / temperature;
    if (rest != rest) {
        g.value = g.target = kNaN;
        return g;
    }
    float constant = d.lse_coef - d.logp_coef;
    g.terms = softcap ? Terms::full : Terms::plain;
    g.ref = ref;
    if (d.entropy_coef != 0) {
        constant -= d.entropy_coef * fmaf(kLn2, rest, d.entropy);
        g.log = -d.entropy_coef * kLn2 * factor / temperature;
        if (!softcap) g.terms = Terms::entropy;
    }
    if (d.p_sq_coef != 0) {
        constant -= 2.0f * d.p_sq_coef;
        g.p_coef = 2.0f * d.p_sq_coef / expf(d.log_sum_p_sq) * factor * factor / temperature;
        g.terms = Terms::full;
    }
    g.constant = constant * factor / temperature;
    return g;
}

template <Terms kTerms>
RW_DEVICE float gradient_of(float x, const RowGradient& g, const Softcap& softcap) {
    if constexpr (kTerms == Terms::fill) return g.value;
    float slope = 1.0f;
    if constexpr (kTerms == Terms::full) {
        if (softcap.on) slope = softcap.apply(x);
    }
    const float t = fmaf(x, g.scale, -g.ref), e = exp2_approximate(t);
    if constexpr (kTerms == Terms::plain) return e * g.constant;
    float factor = fmaf(fmaxf(t, kFloor), g.log, g.constant);
    if constexpr (kTerms == Terms::full) factor = fmaf(e, g.p_coef, factor) * slope;
    return e * factor;
}

/// From the last vectors to the first: what the statistics sweep read last is what the second-level cache still has. May be in place.
template <class T, Terms kTerms, bool kAligned>
RW_DEVICE void sweep_gradient(const T* x, T* out, int vocab, const RowGradient& g, const Softcap& softcap) {
    // Registers: element by element, and with a softcap, they do not suffice for more.
    constexpr int kInFlight = !kAligned ? 1 : kTerms == Terms::full ? kUnroll / 2 : kUnroll;
    constexpr int n = kPerVector<T>, kStep = kThreads * kInFlight;
    const int vectors = vocab / n, tail = vectors * n + thread_index();
    if (tail < vocab) narrow(gradient_of<kTerms>(kTerms == Terms::fill ? 0.0f : widen(x[tail]), g, softcap), out[tail]);
    for (int begin = (vectors - 1) / kStep * kStep + thread_index(); begin >= 0; begin -= kStep) {
        Vector v[kInFlight];
        if constexpr (kTerms != Terms::fill) {
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                const int i = begin + u * kThreads;
                if (i < vectors) v[u] = load_vector(x + int64_t(i) * n, kAligned);
            }
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int i = begin + u * kThreads;
            if (i >= vectors) continue;
            float values[n] = {};
            if constexpr (kTerms != Terms::fill) unpack<T>(v[u], values);
#pragma unroll
            for (int j = 0; j < n; ++j) values[j] = gradient_of<kTerms>(values[j], g, softcap);
            store_vector(out + int64_t(i) * n, values, kAligned);
        }
    }
}

/// The thread whose sweep writes a column, and which may therefore write it again without a barrier.
template <class T>
RW_DEVICE int owner(int column, int vocab) {
    constexpr int n = kPerVector<T>;
    const int tail = vocab / n * n;
    return column < tail ? column / n % kThreads : column - tail;
}

/// Writes one gradient row, padding included. kFull: with softcap or Σp² terms.
template <class T, bool kFull>
RW_DEVICE void write_gradient(const T* x, T* out, int vocab, int columns, int target, const RowGradient& g, const Softcap& softcap) {
    const bool aligned = is_aligned(out) && (g.terms == Terms::fill || is_aligned(x));
    const auto sweep = [&](auto terms) {
        constexpr Terms kTerms = decltype(terms)::value;
        if (aligned) {
            sweep_gradient<T, kTerms, true>(x, out, vocab, g, softcap);
        } else {
            sweep_gradient<T, kTerms, false>(x, out, vocab, g, softcap);
        }
    };
    if (g.terms == Terms::fill) {
        sweep(std::integral_constant<Terms, Terms::fill>());
    } else if (kFull) {
        if constexpr (kFull) sweep(std::integral_constant<Terms, Terms::full>());
    } else if (g.terms == Terms::entropy) {
        if constexpr (!kFull) sweep(std::integral_constant<Terms, Terms::entropy>());
    } else {
        if constexpr (!kFull) sweep(std::integral_constant<Terms, Terms::plain>());
    }
    if (target >= 0 && owner<T>(target, vocab) == thread_index()) narrow(g.target, out[target]);
    for (int64_t column = vocab + thread_index(); column < columns; column += kThreads) narrow(0.0f, out[column]);
}

}  // namespace
}  // namespace reweight_ops
