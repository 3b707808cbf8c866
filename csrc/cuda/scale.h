// A finished gradient times its upstream gradient, in place. Launches only, as in dispatch.h; returns a CUDA status, 0 for success.
#pragma once

#include "common/primitives.h"

namespace reweight_ops {

/// Rows may start at any element and have any stride; a gradient without gaps is one row. `factor` is on the device.
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
