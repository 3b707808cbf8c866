// The arguments of the three primitives as plain data, and what becomes of a row's statistics, for every compiled backend. Nothing is checked here
// or below: reweight_ops/_core/backends/native.py does that, once.
#pragma once

#include <cstdint>

#include "common/program_table.h"
#include "common/row_stats.h"

namespace reweight_ops {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

/// Row i starts at (i / per_batch) * batch_stride + (i % per_batch) * row_stride elements.
struct RowStrides {
    int64_t per_batch, batch_stride, row_stride;
    RW_METHOD int64_t offset(int64_t i) const { return (i / per_batch) * batch_stride + (i % per_batch) * row_stride; }
};

constexpr int64_t kIgnoreIndex = -100;  // the id of an ignored row

/// What every primitive is given: rows of logits, the target of each, and how logits become a distribution.
struct Call {
    DType dtype;
    const void* logits;
    RowStrides strides;
    int64_t rows, columns;  // columns: of the tensor, vocab_size and padding
    int64_t vocab_size, vocab_start, vocab_total;
    float softcap;          // inf: off
    const int64_t* bounds;  // null, or [2, rows]: where rows of different lengths begin and end, one dimension of logits; vocab_size is then no row's
    const int64_t* ids;
    const float* temperature;
    bool temperature_per_row;
    int threads;  // CPU
    int device;   // CUDA, and the stream to launch on
    void* stream;
};

/// Outputs are [rows], or null where nobody asked.
struct StatsCall : Call {
    float *logp, *entropy, *lse, *lse_low, *log_sum_p_sq, *max_logp;
};

struct GradCall : Call {
    const float *logp, *lse, *entropy, *log_sum_p_sq;  // entropy, log_sum_p_sq: null without their coefficient
    const float* lse_low;                              // null: 0
    const float *d_logp, *d_entropy, *d_lse, *d_p_sq;  // null: zero
    void* out;
    RowStrides out_strides;
};

struct LossGradCall : Call {
    ProgramTable table;
    const float* params;
    bool reads_p_sq;                                         // some rule or weight reads log_sum_p_sq
    bool entropy_gradient;                                   // some rule may have a derivative by the entropy
    const float* row_weights;                                // [terms, rows]
    int64_t row_weights_step;                                // between terms, 0 if they share one vector
    const float *old_logp, *adv, *ref_logp, *sampling_logp;  // null: not given
    float *logp, *entropy, *weighted_loss, *loss, *d_logp, *d_entropy;
    void* out;
    RowStrides out_strides;
};

/// Where a row of logits starts.
template <class T>
RW_HD inline const T* row_of(const Call& call, int64_t i) {
    return static_cast<const T*>(call.logits) + (call.bounds ? call.bounds[i] : call.strides.offset(i));
}
/// The columns of a row's softmax.
RW_HD inline int64_t columns_of(const Call& call, int64_t i) { return call.bounds ? call.bounds[call.rows + i] - call.bounds[i] : call.vocab_size; }
RW_HD inline float temperature_of(const Call& call, int64_t i) { return call.temperature[call.temperature_per_row ? i : 0]; }

/// Whether the row holds nothing to compute: it is out of the loss, or its id is no token.
RW_HD inline bool is_ignored(const Call& call, int64_t i) { return call.ids[i] == kIgnoreIndex; }
RW_HD inline bool is_invalid(const Call& call, int64_t i) { return call.ids[i] < 0 || call.ids[i] >= call.vocab_total; }

// ---- the outputs of a row

RW_HD inline void put_row(const StatsCall& call, int64_t i, const RowStats& s) {
    const auto put = [i](float* to, float value) {
        if (to) to[i] = value;
    };
    put(call.logp, s.logp);
    put(call.entropy, s.entropy);
    put(call.lse, s.lse);
    put(call.lse_low, s.lse_low);
    put(call.log_sum_p_sq, s.log_sum_p_sq);
    put(call.max_logp, s.max_logp);
}

RW_HD inline void put_row(const LossGradCall& call, int64_t i, const RowStats& s, const RowLoss& l) {
    call.logp[i] = s.logp;
    call.entropy[i] = s.entropy;
    call.weighted_loss[i] = l.weighted_loss;
    call.loss[i] = l.loss;
    call.d_logp[i] = l.d_logp;
    call.d_entropy[i] = l.d_entropy;
}

/// Of a row that holds nothing to compute: 0 if it is out of the loss, NaN if its id is no token.
RW_HD inline float value_of_invalid(const Call& call, int64_t i) { return is_ignored(call, i) ? 0.0f : RW_NAN; }
RW_HD inline void put_invalid_row(const StatsCall& call, int64_t i) {
    const float v = value_of_invalid(call, i);
    put_row(call, i, {v, v, v, v, v, v});
}
RW_HD inline void put_invalid_row(const LossGradCall& call, int64_t i) {
    const float v = value_of_invalid(call, i);
    put_row(call, i, {v, v, v, v, v, v}, {v, v, v, v, v});
}

}  // namespace reweight_ops
