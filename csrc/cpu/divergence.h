// The primitives on two logits tensors at one instruction-set level, as function pointers.
#pragma once

#include "common/divergence.h"

namespace reweight_ops {

struct DivergenceKernels {
    void (*stats)(const DivergenceCall&);
    void (*grad)(const DivergenceCall&);
    void (*loss_grad)(const DivergenceCall&);
};

}  // namespace reweight_ops
