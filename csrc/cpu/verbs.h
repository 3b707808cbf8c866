// The arguments of the three verbs as plain data, and the table of their implementations at one instruction-set level.
// Nothing is checked here or below: reweight_ops/backends/cpu.py does that, once.
#pragma once

#include <cstdint>

#include "common/row_program.h"

namespace reweight_ops {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

/// Row i starts at (i / per_batch) * batch_stride + (i % per_batch) * row_stride elements.
struct RowStrides {
    int64_t per_batch, batch_stride, row_stride;
    int64_t offset(int64_t i) const { return (i / per_batch) * batch_stride + (i % per_batch) * row_stride; }
};

constexpr int64_t kOut = -100;  // the id of a row that is out of the loss

/// What every verb is given: rows of logits, the target of each, and how logits become a distribution.
struct Call {
    DType dtype;
    const void* logits;
    RowStrides strides;
    int64_t rows, columns;                           // columns: of the tensor, vocab_size and padding
    int64_t vocab_size, vocab_start, vocab_total;
    float softcap;                                   // inf: off
    const int64_t* ids;
    const float* temperature;
    bool temperature_per_row;
    int threads;
};

/// Outputs are [rows], or null where nobody asked.
struct StatsCall : Call {
    float *logp, *entropy, *lse, *log_sum_p_sq, *max_logp;
};

struct GradCall : Call {
    const float *logp, *lse, *entropy, *log_sum_p_sq;                // entropy, log_sum_p_sq: null without their coefficient
    const float *logp_coef, *entropy_coef, *lse_coef, *p_sq_coef;  // null: zero
    void* out;
    RowStrides out_strides;
};

struct LossGradCall : Call {
    RowProgram program;
    const float* params;
    bool reads_p_sq;        // some rule or weight reads log_sum_p_sq
    const float* row_weights;                        // [terms, rows]
    int64_t row_weights_step;                        // between terms, 0 if they share one vector
    const float *old_logp, *adv, *ref_logp, *sampling_logp;  // null: not given
    float *logp, *entropy, *weighted_loss, *loss, *coef, *entropy_coef;
    void* out;
    RowStrides out_strides;
};

enum class Stream : int { read = 0, update = 1, copy = 2, flush = 3 };

struct Kernels {
    void (*token_stats)(const StatsCall&);
    void (*token_grad)(const GradCall&);
    void (*token_loss_grad)(const LossGradCall&);
    void (*stream)(Stream, float*, float*, int64_t, int);  // a bandwidth probe for the benchmarks
};

}  // namespace reweight_ops
