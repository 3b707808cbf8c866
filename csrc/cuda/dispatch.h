// Chooses the kernels of a call. It only launches: it allocates nothing and does not synchronize.
// Every function returns a CUDA status; 0 is success.
#pragma once

#include <string>

#include "common/primitives.h"

namespace reweight_ops {

struct StreamingKernels {
    int (*token_stats)(const StatsCall&);
    int (*top_stats)(const TopStatsCall&);
    int (*token_grad)(const GradCall&);
    int (*token_loss_grad)(const LossGradCall&);
};
struct RingKernels {
    /// Sets `count` to the number of clusters that the device runs at once, with rings of `tiles`
    /// tiles.
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

/// The streaming kernels serve every call. The ring kernel serves token_loss_grad where it can.
/// Both give the same bits.
int token_stats(const StatsCall& call);
int top_stats(const TopStatsCall& call);
int token_grad(const GradCall& call);
int token_loss_grad(const LossGradCall& call);

/// Says why the streaming kernel would serve the call. Empty if the ring kernel would.
std::string ring_unsupported_reason(const LossGradCall& call);

/// Chooses "auto", or "streaming" or "ring" to compare them. With "ring", a call that the ring
/// cannot serve fails with cudaErrorNotSupported.
void set_kernel(const std::string& name);

}  // namespace reweight_ops
