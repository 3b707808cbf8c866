// Chooses the kernels of a call by dtype. One rule chooses the ring or the streaming kernel for
// token_loss_grad, and one whether rows of two tensors are split over blocks.
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "device.h"
#include "divergence.h"
#include "scale.h"
#include "slices.h"
#include "variants.h"

namespace reweight_ops {
namespace {

constexpr int kNotSupported = 801;  // cudaErrorNotSupported
const char* const kChoices[] = {"auto", "streaming", "ring"};
enum Choice { automatic, streaming, ring };
std::atomic<int> choice{automatic};
const char* const kDivergenceChoices[] = {"auto", "whole", "split"};
enum DivergenceChoice { by_rows, whole, split };
std::atomic<int> divergence_choice{by_rows};

const StreamingKernels& streaming_for(const Call& call) {
    switch (call.dtype) {
        case DType::bf16: return streaming_bf16;
        case DType::f16: return streaming_f16;
        default: return streaming_f32;
    }
}

const RingKernels& ring_for(const Call& call) {
    switch (call.dtype) {
        case DType::bf16: return ring_bf16;
        case DType::f16: return ring_f16;
        default: return ring_f32;
    }
}

/// The launch of the ring kernel, or the reason why it cannot serve the call.
struct Plan {
    int status = 0;
    std::string ring_unsupported_reason;
    int tiles = 0, clusters = 0;
};

Plan plan(const LossGradCall& call) {
    Plan p;
    const Slices slices(int(call.vocab_size * bytes_of(call.dtype) / 16));
    const Device device = device_of(call.device);
    p.status = device.status;
    if (p.status) return p;
    p.tiles = (device.shared_bytes - kBytesBesides) / kBytesPerTile;
    if (device.major < 9) {
        p.ring_unsupported_reason = "the GPU is older than Hopper (compute capability 9.0)";
    } else if (!rows_are_aligned(call)) {
        p.ring_unsupported_reason = "rows of the logits do not all start at a multiple of 16 bytes";
    } else if (!rows_are_aligned(call.out, call.out_strides, call)) {
        p.ring_unsupported_reason = "rows of the gradient do not all start at a multiple of 16 bytes";
    } else if (const int needed = slices.tiles() + 1 + kStoresInFlight; needed > p.tiles) {  // plus a tile of the next row and the stores in flight
        p.ring_unsupported_reason = "a row of " + std::to_string(call.vocab_size) + " columns does not fit in the shared memory of " +
                                    std::to_string(slices.count) + " blocks (" + std::to_string(needed) + " tiles of 16 KiB in each, " +
                                    std::to_string(p.tiles) + " fit)";
    } else {
        p.status = ring_for(call).clusters(call, p.tiles, p.clusters);
        if (p.clusters == 0)
            p.ring_unsupported_reason = "the GPU cannot run a cluster of " + std::to_string(slices.count) + " blocks that keep rows on chip";
    }
    return p;
}

const DivergenceKernels& divergence_for(const Call& call) {
    switch (call.dtype) {
        case DType::bf16: return divergence_bf16;
        case DType::f16: return divergence_f16;
        default: return divergence_f32;
    }
}

/// Why the rows of two tensors are not split over blocks.
struct SplitPlan {
    int status = 0;
    std::string unsupported_reason;
};

/// Rows are split while they fill less than three quarters of the blocks that run at once: then a
/// part of the processors has nothing to do, or waits for too few loads.
SplitPlan split_plan(const DivergenceCall& call) {
    SplitPlan p;
    const int blocks = DivergenceSlices(int(call.vocab_size)).count;
    const auto because = [&](const std::string& why) {
        p.unsupported_reason = why;
        return p;
    };
    if (blocks == 1) return because("a row of " + std::to_string(call.vocab_size) + " columns is short enough for one block");
    const Device device = device_of(call.device);
    p.status = device.status;
    if (p.status) return p;
    if (device.major < 9) return because("the GPU is older than Hopper (compute capability 9.0)");
    const int64_t at_once = int64_t(device.processors) * kDivergenceBlocks;
    if (divergence_choice != split && 4 * call.rows >= 3 * at_once)
        return because(std::to_string(call.rows) + " rows are enough for the " + std::to_string(at_once) + " blocks that run at once");
    int clusters = 0;
    p.status = divergence_for(call).clusters(call, clusters);
    if (!p.status && clusters == 0) return because("the GPU cannot run a cluster of " + std::to_string(blocks) + " blocks");
    return p;
}

template <class Choices>
int find_choice(const Choices& choices, const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == choices[i]) return i;
    }
    throw std::invalid_argument("kernel " + name + ": expected " + choices[0] + ", " + choices[1] + " or " + choices[2]);
}

}  // namespace

int token_stats(const StatsCall& call) { return streaming_for(call).token_stats(call); }
int token_grad(const GradCall& call) { return streaming_for(call).token_grad(call); }

int token_loss_grad(const LossGradCall& call) {
    if (call.rows == 0) return 0;
    if (choice == streaming) return streaming_for(call).token_loss_grad(call);
    const Plan p = plan(call);
    if (p.status) return p.status;
    if (p.ring_unsupported_reason.empty()) return ring_for(call).token_loss_grad(call, p.tiles, p.clusters);
    return choice == ring ? kNotSupported : streaming_for(call).token_loss_grad(call);
}

int divergence(const DivergenceCall& call) {
    if (call.rows == 0) return 0;
    const DivergenceKernels& kernels = divergence_for(call);
    if (divergence_choice == whole) return kernels.whole(call);
    const SplitPlan p = split_plan(call);
    if (p.status) return p.status;
    if (p.unsupported_reason.empty()) return kernels.split(call);
    return divergence_choice == split ? kNotSupported : kernels.whole(call);
}

int scale(const ScaleCall& call) {
    switch (call.dtype) {
        case DType::bf16: return scale_bf16(call);
        case DType::f16: return scale_f16(call);
        default: return scale_f32(call);
    }
}

std::string ring_unsupported_reason(const LossGradCall& call) {
    if (choice == streaming) return "set_kernel chose the streaming kernel";
    const Plan p = plan(call);
    return p.status ? "no GPU is available" : p.ring_unsupported_reason;
}

std::string split_unsupported_reason(const DivergenceCall& call) {
    if (divergence_choice == whole) return "set_divergence_kernel chose whole rows";
    const SplitPlan p = split_plan(call);
    return p.status ? "no GPU is available" : p.unsupported_reason;
}

void set_kernel(const std::string& name) { choice = find_choice(kChoices, name); }
void set_divergence_kernel(const std::string& name) { divergence_choice = find_choice(kDivergenceChoices, name); }

}  // namespace reweight_ops
