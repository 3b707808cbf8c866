// The primitives on two logits tensors. They only launch, as in dispatch.h. Every function returns
// a CUDA status; 0 is success.
#pragma once

#include <string>

#include "common/divergence.h"
#include "slices.h"

namespace reweight_ops {

/// Columns of both tensors that a thread takes at once, for every dtype: one 16-bit vector or two
/// 32-bit vectors.
constexpr int kColumns = 8;
/// Blocks per processor of the kernels on two tensors.
constexpr int kDivergenceBlocks = 2;

/// Divides the groups of kColumns columns of a row among slices, by the number of columns alone.
struct DivergenceSlices {
    int groups;       // whole groups of the row; the last slice also has the columns after them
    int count, each;  // number of slices, and groups in each but the last

    RW_METHOD explicit DivergenceSlices(int columns) : groups(columns / kColumns), count(1) {
        constexpr int kLongest = 32768 / kColumns;  // groups, while there are less than kMaxSlices
        while (count < kMaxSlices && share() > kLongest) count *= 2;
        each = share();
    }
    RW_METHOD int begin(int slice) const { return slice * each < groups ? slice * each : groups; }
    RW_METHOD int end(int slice) const { return begin(slice + 1); }

private:
    /// A share is whole cache lines of 128 bytes.
    RW_METHOD int share() const { return ((groups + count - 1) / count + 7) / 8 * 8; }
};

/// The kernels for one dtype of the first tensor. The pointers decide what a call computes:
/// statistics if it has a table, a gradient if it has an out.
struct DivergenceKernels {
    int (*whole)(const DivergenceCall&);  // a block takes whole rows
    /// Sets `count` to the number of clusters of the next kernel that the device runs at once.
    int (*clusters)(const DivergenceCall&, int& count);
    int (*split)(const DivergenceCall&);  // a cluster of blocks shares a row
};
extern const DivergenceKernels divergence_f32, divergence_bf16, divergence_f16;

int divergence(const DivergenceCall& call);

/// Says why a block would take whole rows. Empty if a cluster would share each row. Both give the
/// same bits.
std::string split_unsupported_reason(const DivergenceCall& call);

/// Chooses "auto", or "whole" or "split" to compare them. With "split", a call whose rows cannot be
/// split fails with cudaErrorNotSupported.
void set_divergence_kernel(const std::string& name);

}  // namespace reweight_ops
