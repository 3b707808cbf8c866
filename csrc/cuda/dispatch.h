// Which kernels serve a call. Launches only: no allocation, no synchronization; every function returns a CUDA status, 0 for success.
#pragma once

#include <string>

#include "common/primitives.h"

namespace reweight_ops {

struct StreamingKernels {
    int (*token_stats)(const StatsCall&);
    int (*token_grad)(const GradCall&);
    int (*token_loss_grad)(const LossGradCall&);
};
struct RingKernels {
    /// How many clusters the device runs at once, with rings of so many tiles.
    int (*clusters)(const LossGradCall&, int tiles, int& count);
    int (*token_loss_grad)(const LossGradCall&, int tiles, int64_t clusters);
};

extern const StreamingKernels streaming_f32, streaming_bf16, streaming_f16;
extern const RingKernels ring_f32, ring_bf16, ring_f16;

inline int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

/// Whether every row starts at a multiple of 16 bytes.
inline bool rows_are_aligned(const void* p, const RowStrides& strides, const Call& call) {
    const auto whole = [&](int64_t elements) { return elements * bytes_of(call.dtype) % 16 == 0; };
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (call.rows <= 1 || whole(strides.row_stride)) &&
           (call.rows <= strides.per_batch || whole(strides.batch_stride));
}
inline bool rows_are_aligned(const Call& call) { return rows_are_aligned(call.logits, call.strides, call); }

/// Streaming kernels serve every call; the ring kernel serves token_loss_grad where it can. Both give the same bits.
int token_stats(const StatsCall& call);
int token_grad(const GradCall& call);
int token_loss_grad(const LossGradCall& call);

/// Why the streaming kernel would serve the call; empty: the ring kernel would.
std::string ring_unsupported_reason(const LossGradCall& call);

/// "auto", or "streaming" or "ring" to compare them: "ring" makes a call that the ring cannot serve fail with cudaErrorNotSupported.
void set_kernel(const std::string& name);

}  // namespace reweight_ops
