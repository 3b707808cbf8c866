// The verbs on two logits tensors at one instruction-set level. p is the softmax of the first, q of the second.
#pragma once

#include "common/verbs.h"

namespace reweight_ops {

constexpr int kDivergenceTable = 8;  // rows of the table; reweight_ops/divergences/verbs.py names them

struct DivergenceCall {
    Call p, q;                 // q: where its rows are, dtype, soft cap, temperature; the rest is p's
    float* table;              // [8, rows]: written by stats and loss_grad
    const float* known;        // [8, rows]: read by grad
    const float* coefs;        // [3, rows]: read by grad
    float constants[3];        // loss_grad: coefficient k is weights * constants[k]
    const float* weights;      // [rows]
    void* out;
    RowStrides out_strides;
};

struct DivergenceKernels {
    void (*stats)(const DivergenceCall&);
    void (*grad)(const DivergenceCall&);
    void (*loss_grad)(const DivergenceCall&);
};

}  // namespace reweight_ops
