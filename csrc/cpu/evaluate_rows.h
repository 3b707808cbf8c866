// Evaluates a loss program over stored rows, without logits, in float or double.
#pragma once

#include "common/program_table.h"

namespace reweight_ops {

template <class Real>
struct EvaluateCall {
    ProgramTable table;
    const Real* params;
    const Real* leaves[kLeaves];  // [rows] each, null if not given
    const Real* row_weights;      // [terms, rows]
    int64_t row_weights_step;     // between terms; 0 if all terms share one vector
    const bool* keep;             // [rows] or null; a row that is not kept is 0 in every output
    const int* outputs;           // registers
    int output_count;
    Real* out;  // [outputs, rows]
    int64_t rows;
    int threads;
};

void evaluate_rows(const EvaluateCall<float>& call);
void evaluate_rows(const EvaluateCall<double>& call);

}  // namespace reweight_ops
