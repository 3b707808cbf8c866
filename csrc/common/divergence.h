// Arguments of the primitives on two logits tensors, as plain data, and the statistics of a row's
// sums. p is the softmax of the first tensor, q of the second.
#pragma once

#include "common/constants.h"
#include "common/primitives.h"

namespace reweight_ops {

constexpr int kDivergenceTable = 8;  // rows of the table, named in reweight_ops/_core/rows/primitives.py

/// The base class describes p.
struct DivergenceCall : Call {
    Call q;                    // q's rows, dtype, soft cap and temperature; the other fields are unused
    float* table;              // [8, rows], written by stats and loss_grad
    const float* known;        // [8, rows], read by grad
    const float* derivatives;  // [3, rows], read by grad
    const float* constants;    // [3], read by loss_grad: coefficient k is weights * constants[k]
    const float* weights;      // [rows]
    void* out;
    RowStrides out_strides;
};

/// The sums of one tensor's row. t is log2 of an exponential relative to a reference, and e = 2^t.
struct DivergenceSums {
    double sum, dot, cross;  // Σ e, Σ e·t, Σ e·(own t - the other's t)
    double log_sum, lse;     // log2 Σ e, NaN without a distribution; the log-sum-exp in natural units
    bool zero;               // a column has probability 0 in this tensor and not in the other
};

/// A row's statistics in natural units. A `low` in the table is what rounding a log-sum-exp to fp32
/// loses.
struct DivergenceStats {
    double forward, reverse, entropy, other_entropy, p_lse, q_lse;
};

RW_HD inline double at_least_zero(double v) { return v < 0 ? 0.0 : v; }  // keeps NaN

RW_HD inline DivergenceStats stats_of_sums(const DivergenceSums& p, const DivergenceSums& q) {
    constexpr double nan = kNaN, inf = kInf;
    if (p.log_sum != p.log_sum || q.log_sum != q.log_sum) return {nan, nan, nan, nan, nan, nan};
    return {p.zero ? inf : at_least_zero((q.cross / q.sum - q.log_sum + p.log_sum) * kLn2),
            q.zero ? inf : at_least_zero((p.cross / p.sum - p.log_sum + q.log_sum) * kLn2),
            at_least_zero((p.log_sum - p.dot / p.sum) * kLn2),
            at_least_zero((q.log_sum - q.dot / q.sum) * kLn2),
            p.lse,
            q.lse};
}

/// The row's column of the table.
RW_HD inline void round_to_table(const DivergenceStats& s, float (&values)[kDivergenceTable]) {
    const double exact[] = {s.forward, s.reverse, s.entropy, s.other_entropy, s.p_lse, s.p_lse - float(s.p_lse), s.q_lse, s.q_lse - float(s.q_lse)};
    for (int k = 0; k < kDivergenceTable; ++k) values[k] = float(exact[k]);
}

RW_HD inline void put_column(float* table, int64_t rows, int64_t i, const float (&values)[kDivergenceTable]) {
    for (int k = 0; k < kDivergenceTable; ++k) table[k * rows + i] = values[k];
}

}  // namespace reweight_ops
