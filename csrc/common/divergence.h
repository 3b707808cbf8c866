// The arguments of the verbs on two logits tensors as plain data. p is the softmax of the first tensor, q of the second.
#pragma once

#include "common/verbs.h"

namespace reweight_ops {

constexpr int kDivergenceTable = 8;  // rows of the table; reweight_ops/divergences/verbs.py names them

/// The call itself is p's.
struct DivergenceCall : Call {
    Call q;                  // where its rows are, dtype, soft cap, temperature; the rest is p's
    float* table;            // [8, rows]: written by stats and loss_grad
    const float* known;      // [8, rows]: read by grad
    const float* coefs;      // [3, rows]: read by grad
    const float* constants;  // [3], loss_grad: coefficient k is weights * constants[k]
    const float* weights;    // [rows]
    void* out;
    RowStrides out_strides;
};

}  // namespace reweight_ops
