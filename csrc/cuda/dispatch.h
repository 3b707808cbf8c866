// Which kernels serve a call. Launches only: no allocation, no synchronization; every function returns a CUDA status, 0 for success.
#pragma once

#include "common/verbs.h"

namespace reweight_ops {

struct CudaKernels {
    int (*token_stats)(const StatsCall&);
    int (*token_grad)(const GradCall&);
    int (*token_loss_grad)(const LossGradCall&);
};

extern const CudaKernels streaming_f32, streaming_bf16, streaming_f16;

/// THE place for a choice of kernels by device and shape. Streaming kernels serve every call; a kernel that keeps rows on chip, for those
/// devices and lengths where it is faster, would be returned here (by device for a whole process: results must not depend on the batch).
inline const CudaKernels& kernels_for(const Call& call) {
    switch (call.dtype) {
        case DType::bf16: return streaming_bf16;
        case DType::f16: return streaming_f16;
        default: return streaming_f32;
    }
}

}  // namespace reweight_ops
