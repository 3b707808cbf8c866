// The primitives at one instruction-set level. This file is compiled once per level; RW_LEVEL names the level.
#include "common/concat.h"
#include "common/row_view.h"
#include "parallel.h"
#include "primitives.h"
#include "program.h"
#include "stream.h"
#include "sweeps.h"

namespace reweight_ops {
namespace {

/// One row of a call with its scale and its target's logit.
template <class T>
struct Row : RowView<T, int64_t> {
    using RowView<T, int64_t>::x, RowView<T, int64_t>::target;

    double inverse_temperature, scale;  // scale is log2(e) / T
    float target_logit;                 // capped; -inf if another shard has it
    float target_slope = 1.0f;

    Row(const Call& call, int64_t i, const Softcap& softcap)
        : RowView<T, int64_t>(call, i), inverse_temperature(1.0 / this->temperature), scale(kLog2e * inverse_temperature) {
        target_logit = target < 0 ? -kInf : load1(x + target);
        if (softcap.on) softcap.apply_one(target_logit, target_slope);
    }

    template <Sums kSums>
    RowSweep sweep(int64_t columns, const Softcap& softcap, TopIds<T>* likeliest = nullptr) const {
        return RowSweeper<T, kSums>(scale, softcap, likeliest)(x, columns);
    }
    FinishedRow<double> finish(const RowSweep& sweep) const { return {double(sweep.top) * scale, sweep.rest}; }

    /// The logit at which p is 1, as fp32 can hold it, from a column's logit and its log-prob
    /// (`logp`, and `low`, which rounding lost). No column of the row has a larger exponential than
    /// that.
    Anchor anchor(float logit, double logp, double low) const {
        const float at = float(logit - logp / inverse_temperature);
        return {at, ((double(at) - logit) * scale + kLog2e * logp) + kLog2e * low};
    }
    RowStats statistics(const RowSweep& sweep, const FinishedRow<double>& row) const {
        return row.statistics(double(target_logit) * scale, sweep.top * inverse_temperature);
    }
};

// ---- the gradient row

/// A gradient in its own tensor that no cache can hold is written past the caches: a plain store
/// would first read the line from memory.
template <class C>
bool streams(const C& call, int64_t element) {
    return call.out != call.logits && call.rows * call.columns * element > kCacheBytes;
}

/// Writes one gradient row: `v` columns of its softmax, and zeros up to `width`. It may overwrite
/// the row of logits.
template <class T>
void write_grad(int64_t v, int64_t width, const Row<T>& row, const Derivatives<double>& d, Anchor anchor, T* g, const Softcap& softcap, Fetch ahead,
                bool stream) {
    if (d.all_zero()) {
        fill(g, width, 0.0f);
        return;
    }
    if (anchor.log_p != anchor.log_p) {
        fill(g, v, kNaN);
    } else {
        GradientFactors<double> c = d.factors(d.entropy);
        c = {c.constant * row.inverse_temperature, c.log * row.inverse_temperature, c.p_coef * row.inverse_temperature};
        stream = stream && (uintptr_t)g % 64 == 0;
        with_shift(row.scale, anchor.at, [&](const auto& shift) {
            using S = std::decay_t<decltype(shift)>;
            const double log_p = anchor.log_p - (double(anchor.at) * row.scale - shift.ref);
            const auto sweep = [&](auto grad) { grad(row.x, g, v, shift, log_p, c, softcap, ahead); };
            if (S::kFarAway || softcap.on || d.d_p_sq != 0) {  // one form serves all rows far from zero
                sweep(grad_row<T, Terms::full, false, S::kFarAway>);
            } else if constexpr (!S::kFarAway) {
                if (d.d_entropy != 0) {
                    sweep(stream ? grad_row<T, Terms::entropy, true, false> : grad_row<T, Terms::entropy, false, false>);
                } else {
                    sweep(stream ? grad_row<T, Terms::plain, true, false> : grad_row<T, Terms::plain, false, false>);
                }
            }
        });
        if (stream) stream_fence();
        if (row.target >= 0) {
            const double slope = row.target_slope * row.inverse_temperature;
            store1(g + row.target, row.target_logit == -kInf ? 0.0f : float(d.at_target() * slope));
        }
    }
    if (width > v) fill(g + v, width - v, 0.0f);
}

// ---- token_stats

/// One row; `likeliest`: null, or what is to see its columns.
template <class T, Sums kSums>
void row_stats(const StatsCall& call, int64_t i, const Softcap& softcap, TopIds<T>* likeliest) {
    if (is_invalid(call, i)) {
        put_invalid_row(call, i);
        if (likeliest) likeliest->see(row_of<T>(call, i), 0, columns_of(call, i));
        return;
    }
    const Row<T> row(call, i, softcap);
    const RowSweep sweep = row.template sweep<kSums>(columns_of(call, i), softcap, likeliest);
    put_row(call, i, row.statistics(sweep, row.finish(sweep)));
}

/// `top`: the same call, if it asks for ids too.
template <class T, Sums kSums>
void token_stats(const StatsCall& call, const TopStatsCall* top) {
    const Softcap softcap(call.softcap);
    for_each_row(call.rows, call.vocab_size, threads_for(call.rows, call.vocab_size, call.threads), [&](int64_t i, int64_t) {
        if (!top) return row_stats<T, kSums>(call, i, softcap, nullptr);
        int64_t* const ids = top->top_ids + i * top->top;
        if (is_ignored(call, i)) {
            put_invalid_row(call, i);
            std::fill(ids, ids + top->top, kIgnoreIndex);
            return;
        }
        TopIds<T> likeliest(top->top);
        row_stats<T, kSums>(call, i, softcap, &likeliest);
        likeliest.write(ids, call.vocab_start);
    });
}

template <class T>
void token_stats_of(const StatsCall& call, const TopStatsCall* top) {
    if (call.log_sum_p_sq || call.softcap < kInf) {
        token_stats<T, Sums::full>(call, top);
    } else if (call.entropy) {
        token_stats<T, Sums::entropy>(call, top);
    } else {
        token_stats<T, Sums::plain>(call, top);
    }
}

// ---- token_grad

/// The log-sum-exp is two fp32 numbers. Beyond kLargestLse they are less precise than the target's
/// log-prob, unless the target's probability is tiny.
template <class T>
Anchor known_anchor(const GradCall& call, const Row<T>& row, int64_t i) {
    const float lse = call.lse[i], logp = call.logp[i];
    return is_by_target(row.target >= 0, lse, logp) ? row.anchor(row.target_logit, logp, 0)
                                                    : row.anchor(0.0f, -lse, call.lse_low ? -call.lse_low[i] : 0);
}

template <class T>
void token_grad(const GradCall& call) {
    const Softcap softcap(call.softcap);
    const bool packed = call.bounds, stream = !packed && streams(call, sizeof(T));
    const auto get = [](const float* from, int64_t i) { return from ? from[i] : 0.0f; };
    for_each_row(call.rows, call.columns, threads_for(call.rows, call.columns, call.threads), [&](int64_t i, int64_t) {
        if (is_invalid(call, i)) {
            if (!packed) fill((T*)call.out + call.out_strides.offset(i), call.columns, 0.0f);
            return;
        }
        T* g = (T*)call.out + (packed ? call.bounds[i] : call.out_strides.offset(i));
        const int64_t v = columns_of(call, i), width = packed ? v : call.columns;
        const Row<T> row(call, i, softcap);
        const Derivatives<double> d{get(call.d_logp, i), get(call.d_entropy, i), get(call.d_lse, i),       get(call.d_p_sq, i),
                                    call.logp[i],        get(call.entropy, i),   get(call.log_sum_p_sq, i)};
        write_grad(v, width, row, d, known_anchor(call, row, i), g, softcap, Fetch{(const char*)row.x + kFetchAhead, 0}, stream);
    });
}

// ---- token_loss_grad

template <class T, bool kFull>
void token_loss_grad(const LossGradCall& call) {
    const Softcap softcap(call.softcap);
    const bool stream = streams(call, sizeof(T));
    const LossEvaluator evaluate(call);
    for_each_row(call.rows, call.columns, threads_for(call.rows, call.columns, call.threads), [&](int64_t i, int64_t next) {
        T* g = (T*)call.out + call.out_strides.offset(i);
        const Fetch ahead{(const char*)row_of<T>(call, next < call.rows ? next : i), 2};
        if (is_invalid(call, i)) {
            put_invalid_row(call, i);
            fill(g, call.columns, 0.0f);
            return;
        }
        const Row<T> row(call, i, softcap);
        const RowSweep sweep = row.template sweep<kFull ? Sums::full : Sums::entropy>(call.vocab_size, softcap);
        const FinishedRow<double> finished = row.finish(sweep);
        const RowStats s = row.statistics(sweep, finished);
        const RowLoss l = evaluate(i, s);
        put_row(call, i, s, l);
        const Derivatives<double> d{l.d_logp, l.d_entropy, 0.0f, l.d_p_sq, s.logp, s.entropy, s.log_sum_p_sq};
        write_grad(call.vocab_size, call.columns, row, d, {sweep.top, -kLog2e * finished.log_total}, g, softcap, ahead, stream);
    });
}

template <class T>
void token_loss_grad_of(const LossGradCall& call) {
    if (call.reads_p_sq || call.softcap < kInf) {
        token_loss_grad<T, true>(call);
    } else {
        token_loss_grad<T, false>(call);
    }
}

// ---- by dtype

template <template <class> class Primitive, class C>
void by_dtype(const C& call) {
    switch (call.dtype) {
        case DType::f32: return Primitive<float>::run(call);
        case DType::bf16: return Primitive<Bf16>::run(call);
        case DType::f16: return Primitive<F16>::run(call);
    }
}
template <class T>
struct Stats {
    static void run(const StatsCall& call) { token_stats_of<T>(call, nullptr); }
};
template <class T>
struct TopStats {
    static void run(const TopStatsCall& call) { token_stats_of<T>(call, &call); }
};
template <class T>
struct Grad {
    static void run(const GradCall& call) { token_grad<T>(call); }
};
template <class T>
struct LossGrad {
    static void run(const LossGradCall& call) { token_loss_grad_of<T>(call); }
};

}  // namespace

extern const Kernels RW_CONCAT(kernels_, RW_LEVEL);
const Kernels RW_CONCAT(kernels_, RW_LEVEL) = {by_dtype<Stats, StatsCall>, by_dtype<TopStats, TopStatsCall>, by_dtype<Grad, GradCall>,
                                               by_dtype<LossGrad, LossGradCall>, stream};

}  // namespace reweight_ops
