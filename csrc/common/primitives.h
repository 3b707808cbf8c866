// Arguments of the three primitives as plain data, and the outputs of a row, for every compiled
// backend. Nothing is checked here or below: reweight_ops/_core/backends/native.py checks every
// argument once.
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

/// Arguments of every primitive: rows of logits, the target of each row, and the softmax
/// parameters.
struct Call {
    DType dtype;
    const void* logits;
    RowStrides strides;
    int64_t rows, columns;  // columns counts the tensor's columns: vocab_size plus padding
    int64_t vocab_size, vocab_start, vocab_total;
    float softcap;          // inf disables it
    const int64_t* bounds;  // null, or [2, rows]: begin and end of packed rows; vocab_size is then unused
    const int64_t* ids;
    const float* temperature;
    bool temperature_per_row;
    int threads;  // CPU
    int device;   // CUDA device; kernels launch on `stream`
    void* stream;
};

/// Outputs are [rows]. An output that is not requested is null.
struct StatsCall : Call {
    float *logp, *entropy, *lse, *lse_low, *log_sum_p_sq, *max_logp;
};

/// The most ids that `top_stats` finds in a row.
constexpr int kMostTop = 128;

/// Statistics, and the ids of the `top` largest logits of each row.
struct TopStatsCall : StatsCall {
    int top;
    int64_t* top_ids;  // [rows, top], largest first; kIgnoreIndex in ignored rows
};

struct GradCall : Call {
    const float *logp, *lse, *entropy, *log_sum_p_sq;  // entropy and log_sum_p_sq may be null without their derivative
    const float* lse_low;                              // null means 0
    const float *d_logp, *d_entropy, *d_lse, *d_p_sq;  // null means 0
    void* out;
    RowStrides out_strides;
};

struct LossGradCall : Call {
    ProgramTable table;
    const float* params;
    bool reads_p_sq;                                         // a rule or weight reads log_sum_p_sq
    bool entropy_gradient;                                   // a rule may have a derivative by the entropy
    const float* row_weights;                                // [terms, rows]
    int64_t row_weights_step;                                // between terms; 0 if all terms share one vector
    const float *old_logp, *adv, *ref_logp, *sampling_logp;  // null if not given
    float *logp, *entropy, *weighted_loss, *loss, *d_logp, *d_entropy;
    void* out;
    RowStrides out_strides;
};

/// The first element of a row of logits.
template <class T>
RW_HD inline const T* row_of(const Call& call, int64_t i) {
    return static_cast<const T*>(call.logits) + (call.bounds ? call.bounds[i] : call.strides.offset(i));
}
/// The number of columns of a row's softmax.
RW_HD inline int64_t columns_of(const Call& call, int64_t i) { return call.bounds ? call.bounds[call.rows + i] - call.bounds[i] : call.vocab_size; }
RW_HD inline float temperature_of(const Call& call, int64_t i) { return call.temperature[call.temperature_per_row ? i : 0]; }

/// Ignored: ids[i] == kIgnoreIndex.
RW_HD inline bool is_ignored(const Call& call, int64_t i) { return call.ids[i] == kIgnoreIndex; }
/// Nothing to compute: ignored, or an id outside the vocabulary.
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

/// The outputs of a row with nothing to compute: 0 if it is ignored, NaN if its id is outside the
/// vocabulary.
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
