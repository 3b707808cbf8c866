// The primitives on two logits tensors. They only launch, as in dispatch.h. Every function returns
// a CUDA status; 0 is success.
#pragma once

#include "common/divergence.h"

namespace reweight_ops {

/// One function for each dtype of the first tensor. The pointers decide what a call computes:
/// statistics if it has a table, a gradient if it has an out.
using DivergenceLaunch = int (*)(const DivergenceCall&);
extern const DivergenceLaunch divergence_f32, divergence_bf16, divergence_f16;

int divergence(const DivergenceCall& call);

}  // namespace reweight_ops
