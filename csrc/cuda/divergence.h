// The primitives on two logits tensors. Launches only, as in dispatch.h; every function returns a CUDA status, 0 for success.
#pragma once

#include "common/divergence.h"

namespace reweight_ops {

/// By the dtype of the first tensor. What a call does follows from the pointers it has: statistics for a table, a gradient for an out.
using DivergenceLaunch = int (*)(const DivergenceCall&);
extern const DivergenceLaunch divergence_f32, divergence_bf16, divergence_f16;

int divergence(const DivergenceCall& call);

}  // namespace reweight_ops
