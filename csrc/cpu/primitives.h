// The primitives at one instruction-set level, as function pointers.
#pragma once

#include "common/primitives.h"

namespace reweight_ops {

enum class Stream : int { read = 0, update = 1, copy = 2, flush = 3 };

struct Kernels {
    void (*token_stats)(const StatsCall&);
    void (*top_stats)(const TopStatsCall&);
    void (*token_grad)(const GradCall&);
    void (*token_loss_grad)(const LossGradCall&);
    void (*stream)(Stream, float*, float*, int64_t, int);  // a bandwidth probe for the benchmarks
};

}  // namespace reweight_ops
