// Multiplies a finished gradient by its upstream gradient in place. It only launches, as in
// dispatch.h, and returns a CUDA status.
#pragma once

#include "common/primitives.h"

namespace reweight_ops {

/// Rows may start at any element and have any stride. A gradient without gaps is one row. `factor`
/// is in device memory.
struct ScaleCall {
    DType dtype;
    void* data;
    RowStrides strides;
    int64_t rows, columns;
    const float* factor;
    int device;
    void* stream;
};

using ScaleLaunch = int (*)(const ScaleCall&);
extern const ScaleLaunch scale_f32, scale_bf16, scale_f16;

int scale(const ScaleCall& call);

}  // namespace reweight_ops
