// Multiplies a gradient by a factor that only the device knows. It does nothing if the factor is exactly 1, and otherwise
// reads and writes once. Products are fp32, rounded once. The file is compiled once per dtype; RW_ELEMENT and RW_DTYPE name
// the dtype.
#include "scale.h"

#include "common/concat.h"
#include "elements.h"

namespace reweight_ops {
namespace {

constexpr int kScaleThreads = 256, kScaleBlocks = 4;  // per block, and per processor
constexpr int kInFlight = 4;                          // vectors per thread: 64 KiB of loads per processor
constexpr int64_t kScaleTile = kScaleThreads * kInFlight;

/// Tiles of a row, at least one. The block of the first tile also takes the columns outside of
/// vectors.
template <class T>
constexpr int64_t tiles_of_row(int64_t columns) {
    return columns < kPerVector<T> ? 1 : (columns / kPerVector<T> + kScaleTile - 1) / kScaleTile;
}

template <class T>
RW_DEVICE void scale_element(T* p, float factor) {
    narrow(widen(*p) * factor, *p);
}

/// Scales the columns before the first and after the last multiple of 16 bytes: fewer than two
/// vectors.
template <class T>
RW_DEVICE void scale_ends(T* x, int64_t head, int64_t tail, int64_t columns, float factor) {
    const int64_t i = thread_index();
    if (i < head) {
        scale_element(x + i, factor);
    } else if (tail + i - head < columns) {
        scale_element(x + tail + i - head, factor);
    }
}

template <class T>
RW_DEVICE void scale_vectors(T* body, int64_t first, int64_t vectors, float factor) {
    constexpr int n = kPerVector<T>;
    Vector v[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = first + u * kScaleThreads;
        if (i < vectors) v[u] = load16(body + i * n);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = first + u * kScaleThreads;
        if (i >= vectors) continue;
        float values[n];
        unpack<T>(v[u], values);
#pragma unroll
        for (int j = 0; j < n; ++j) values[j] *= factor;
        store16(body + i * n, pack<T>(values));
    }
}

template <class T>
RW_KERNEL(kScaleThreads, kScaleBlocks) scale_kernel(RW_PARAMETER ScaleCall call) {
    constexpr int n = kPerVector<T>;
    const float factor = *call.factor;
    if (factor == 1.0f) return;
    const int64_t tiles = tiles_of_row<T>(call.columns);
    for (int64_t tile = block_index(); tile < call.rows * tiles; tile += block_count()) {
        const int64_t row = call.rows == 1 ? 0 : tile / tiles, of_row = tile - row * tiles;
        T* const x = static_cast<T*>(call.data) + (row == 0 ? 0 : call.strides.offset(row));  // a gradient without gaps needs no division
        const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
        const int64_t head = before < call.columns ? before : call.columns;
        const int64_t vectors = (call.columns - head) / n;
        if (of_row == 0) scale_ends(x, head, head + vectors * n, call.columns, factor);
        scale_vectors(x + head, of_row * kScaleTile + thread_index(), vectors, factor);
    }
}

int launch_scale(const ScaleCall& call) {
    if (call.rows == 0 || call.columns == 0) return 0;
    const Device device = device_of(call.device);
    if (device.status) return device.status;
    const int64_t tiles = call.rows * tiles_of_row<RW_ELEMENT>(call.columns), blocks = int64_t(device.processors) * kScaleBlocks;
    return launch(scale_kernel<RW_ELEMENT>, {tiles < blocks ? tiles : blocks, kScaleThreads}, call);
}

}  // namespace

const ScaleLaunch RW_CONCAT(scale_, RW_DTYPE) = launch_scale;

}  // namespace reweight_ops
