// Divergences of the softmaxes of two logits tensors, and the gradient by the first. This file is compiled once per
// instruction-set level.
#include "divergence.h"

#include "common/concat.h"
#include "divergence_sweep.h"
#include "parallel.h"

namespace reweight_ops {
namespace {

template <class T, class U>
DivergenceResult known(const DivergenceCall& call, const DivergenceRow<T, U>& row, int64_t i, const Caps& caps) {
    const auto get = [&](int k) { return double(call.known[k * call.rows + i]); };
    const DivergenceStats s{get(0), get(1), get(2), get(3), get(4) + get(5), get(6) + get(7)};
    if (std::fabs(s.p_lse) > kLargestLse || std::fabs(s.q_lse) > kLargestLse) {
        const DivergenceResult again = DivergenceSweeper<T, U>(row, caps)(call.vocab_size);
        return {s, again.p, again.q};
    }
    const auto anchor = [](double lse, double scale) {
        const float at = float(kLog2e * lse / scale);
        return Anchor{at, double(at) * scale - kLog2e * lse};
    };
    return {s, anchor(s.p_lse, row.x_scale), anchor(s.q_lse, row.y_scale)};
}
void put_stats(const DivergenceCall& call, int64_t i, const DivergenceStats& s) {
    float values[kDivergenceTable];
    round_to_table(s, values);
    put_column(call.table, call.rows, i, values);
}

/// Writes the gradient row in one sweep over both tensors: p·(a + b·log2 p + c·log2(p/q)) - f·q.
/// kLogs: b, c or a soft cap is set. kFar: references may have any size.
template <class T, class U, bool kLogs, bool kStream, bool kFar>
void divergence_grad_row(const DivergenceRow<T, U>& row, T* g, int64_t columns, const DivergenceResult& known, const double (&derivatives)[3],
                         const Caps& caps) {
    // Logs are in units of 4. In units of 1, the logs of a column that is masked by the lowest
    // number would be infinite.
    constexpr float kUnit = kLogs ? 4 : 1;
    const Shift<kFar> p_shift(row.x_scale / kUnit, known.p.at), q_shift(row.y_scale / kUnit, known.q.at);
    // p = e·2^rest. The factors take the rest, which is the log2 of p where the shift is 0.
    const double p_rest = known.p.log_p - (double(known.p.at) * row.x_scale - p_shift.ref * kUnit);
    const double q_rest = known.q.log_p - (double(known.q.at) * row.y_scale - q_shift.ref * kUnit), t = row.inverse_temperature;
    double constant = derivatives[0], by_log = 0, by_ratio = 0;
    if (derivatives[1] != 0) {
        constant -= derivatives[1] * known.stats.reverse;
        by_ratio = derivatives[1] * kLn2;
    }
    if (derivatives[2] != 0) {
        constant -= derivatives[2] * known.stats.entropy;
        by_log = -derivatives[2] * kLn2;
    }
    constant += by_log * p_rest + by_ratio * (p_rest - q_rest);
    const double p_factor = std::exp2(p_rest) * t, q_factor = std::exp2(q_rest) * t;
    const Vec a = splat(float(p_factor * constant)), b = splat(float(p_factor * by_log * kUnit)), c = splat(float(p_factor * by_ratio * kUnit));
    const Vec f = splat(float(-q_factor * derivatives[0])), unit = splat(kUnit);
    const Exp2<5> exponential(1.0);
    const auto one = [&](Vec x, Vec y) RW_ALWAYS_INLINE {
        Vec slope = splat(1.0f), ignored;
        const VecI masked = x == splat(-kInf);
        if constexpr (kLogs) {
            if (caps.p.on) caps.p.apply(x, slope);
            if (caps.q.on) caps.q.apply(y, ignored);
        }
        const Vec u = p_shift(x), v = q_shift(y);
        const Vec e = exponential(u * unit), w = f * exponential(v * unit);
        Vec r;
        if constexpr (kLogs) {
            // A column with p = 0 has no logs: those of a column that a large number masks
            // overflow. Where q is 0 and p is not, the row was already filled with NaN.
            const Vec s1 = max(splat(kFloor / kUnit), u), s2 = max(splat(-std::numeric_limits<float>::max()), v);
            r = (select(e == splat(0.0f), e, e * fma(s1, b, fma(s1 - s2, c, a))) + w) * slope;
        } else {
            r = e * a + w;  // two roundings keep both products equal where p and q are equal
        }
        return select(masked, splat(0.0f), r);
    };
    int64_t i = 0;
    for (; i + 2 * kWidth <= columns; i += 2 * kWidth) {
        const Vec r1 = one(get(row.x + i), get(row.y + i)), r2 = one(get(row.x + i + kWidth), get(row.y + i + kWidth));
        if constexpr (kStream) {
            put2_past(g + i, r1, r2);
        } else {
            put(g + i, r1);
            put(g + i + kWidth, r2);
        }
    }
    for (; i < columns; i += kWidth) {
        const int64_t rest = columns - i < kWidth ? columns - i : kWidth;
        put_partial(g + i, rest, one(get_partial(row.x + i, rest), get_partial(row.y + i, rest)));
    }
}

template <class T, class U>
void write_divergence_grad(const DivergenceCall& call, const DivergenceRow<T, U>& row, int64_t i, const DivergenceResult& known,
                           const double (&derivatives)[3], const Caps& caps) {
    T* g = (T*)call.out + call.out_strides.offset(i);
    const int64_t v = call.vocab_size;
    const DivergenceStats& s = known.stats;
    const bool is_nan = s.p_lse != s.p_lse || s.q_lse != s.q_lse || (derivatives[1] != 0 && float(s.reverse) == kInf);
    if (derivatives[0] == 0 && derivatives[1] == 0 && derivatives[2] == 0) {
        fill(g, call.columns, 0.0f);
        return;
    }
    if (is_nan) {
        fill(g, v, kNaN);
    } else {
        const bool large = call.out != call.logits && call.rows * call.columns * int64_t(sizeof(T)) > kCacheBytes;
        const bool stream = large && (uintptr_t)g % 64 == 0, logs = derivatives[1] != 0 || derivatives[2] != 0 || caps.p.on || caps.q.on;
        const auto sweep = [&](auto grad) { grad(row, g, v, known, derivatives, caps); };
        if (is_far(known.p.at, row.x_scale) || is_far(known.q.at, row.y_scale)) {
            sweep(divergence_grad_row<T, U, true, false, true>);
        } else if (logs) {
            sweep(stream ? divergence_grad_row<T, U, true, true, false> : divergence_grad_row<T, U, true, false, false>);
        } else {
            sweep(stream ? divergence_grad_row<T, U, false, true, false> : divergence_grad_row<T, U, false, false, false>);
        }
        if (stream) stream_fence();
    }
    if (call.columns > v) fill(g + v, call.columns - v, 0.0f);
}

// ---- the primitives

template <class T, class U>
struct DivergenceOf {
    template <class Body>
    static void rows(const DivergenceCall& call, const Body& body) {
        for_each_row(call.rows, 2 * call.columns, threads_for(call.rows, 2 * call.columns, call.threads), [&](int64_t i, int64_t) { body(i); });
    }
    static void out_row(const DivergenceCall& call, int64_t i) { put_column(call.table, call.rows, i, {}); }

    static void stats(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_ignored(call, i)) return out_row(call, i);
            put_stats(call, i, DivergenceSweeper<T, U>(DivergenceRow<T, U>(call, i), caps)(call.vocab_size).stats);
        });
    }

    static void grad(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_ignored(call, i)) return fill((T*)call.out + call.out_strides.offset(i), call.columns, 0.0f);
            double derivatives[3];
            for (int k = 0; k < 3; ++k) derivatives[k] = call.derivatives[k * call.rows + i];
            const DivergenceRow<T, U> row(call, i);
            write_divergence_grad(call, row, i, known(call, row, i, caps), derivatives, caps);
        });
    }

    static void loss_grad(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_ignored(call, i)) {
                out_row(call, i);
                return fill((T*)call.out + call.out_strides.offset(i), call.columns, 0.0f);
            }
            const DivergenceRow<T, U> row(call, i);
            const DivergenceResult s = DivergenceSweeper<T, U>(row, caps)(call.vocab_size);
            put_stats(call, i, s.stats);
            double derivatives[3];
            for (int k = 0; k < 3; ++k) derivatives[k] = double(call.constants[k]) * call.weights[i];
            write_divergence_grad(call, row, i, s, derivatives, caps);
        });
    }
};

template <class T, class F>
void by_second(DType dtype, const F& f) {
    switch (dtype) {
        case DType::f32: return f(DivergenceOf<T, float>{});
        case DType::bf16: return f(DivergenceOf<T, Bf16>{});
        case DType::f16: return f(DivergenceOf<T, F16>{});
    }
}
template <class F>
void by_dtypes(const DivergenceCall& call, const F& f) {
    switch (call.dtype) {
        case DType::f32: return by_second<float>(call.q.dtype, f);
        case DType::bf16: return by_second<Bf16>(call.q.dtype, f);
        case DType::f16: return by_second<F16>(call.q.dtype, f);
    }
}

void divergence_stats(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.stats(call); });
}
void divergence_grad(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.grad(call); });
}
void divergence_loss_grad(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.loss_grad(call); });
}

}  // namespace

extern const DivergenceKernels RW_CONCAT(divergence_, RW_LEVEL);
const DivergenceKernels RW_CONCAT(divergence_, RW_LEVEL) = {divergence_stats, divergence_grad, divergence_loss_grad};

}  // namespace reweight_ops
