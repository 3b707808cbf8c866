// Rows as 16-byte vectors of fp32, bf16 or fp16. A vector of an unaligned row is cut out of the two
// aligned vectors that hold it: the thread that adds a column never depends on an address.
#pragma once

#include <type_traits>

#include "common/constants.h"
#include "platform.h"

namespace reweight_ops {
namespace {

template <class T>
constexpr int kPerVector = int(16 / sizeof(T));

RW_DEVICE float widen(float x) { return x; }
RW_DEVICE void narrow(float x, float& to) { to = x; }

RW_DEVICE bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

template <class T>
RW_DEVICE Vector minus_infinities();
template <>
RW_DEVICE Vector minus_infinities<float>() {
    return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
}
template <>
RW_DEVICE Vector minus_infinities<Bf16>() {
    return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
}
template <>
RW_DEVICE Vector minus_infinities<F16>() {
    return {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u};
}

template <class T>
RW_DEVICE void unpack(Vector v, float* x) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
            x[j] = as_float(v.words[j]);
        } else {
            x[2 * j] = widen(T{uint16_t(v.words[j])});
            x[2 * j + 1] = widen(T{uint16_t(v.words[j] >> 16)});
        }
    }
}

template <class T>
RW_DEVICE Vector pack(const float* x) {
    Vector v;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
            v.words[j] = as_bits(x[j]);
        } else {
            v.words[j] = narrow_pair<T>(x[2 * j], x[2 * j + 1]);
        }
    }
    return v;
}

/// The largest element, ignoring NaN. It is -inf or more.
template <class T, int n>
RW_DEVICE float largest(const Vector (&v)[n]) {
    float top = -kInf;
    if constexpr (sizeof(T) == 2) {
        uint32_t pair = v[0].words[0];
#pragma unroll
        for (int u = 0; u < n; ++u) {
#pragma unroll
            for (int j = 0; j < 4; ++j) pair = max_pair<T>(pair, v[u].words[j]);
        }
        return fmaxf(fmaxf(top, widen(T{uint16_t(pair)})), widen(T{uint16_t(pair >> 16)}));
    } else {
#pragma unroll
        for (int u = 0; u < n; ++u) {
#pragma unroll
            for (int j = 0; j < 4; ++j) top = fmaxf(top, as_float(v[u].words[j]));
        }
        return top;
    }
}

/// The exponential of -inf is 0, and 0 * -inf would be NaN. Bounding two bf16 at once by -1e20
/// costs half as much as bounding their exponents. fp16 has no finite number that can stand for
/// -inf.
template <class T>
constexpr bool kBoundsPairs = std::is_same_v<T, Bf16>;
constexpr float kLowest = 1e18f;  // below this magnitude of the largest logit, bounded logits have no mass

RW_DEVICE Vector bounded(Vector v) {
    constexpr uint32_t low = 0xe0ade0adu;  // -9.97e19
#pragma unroll
    for (int j = 0; j < 4; ++j) v.words[j] = max_pair_or_nan(v.words[j], low);
    return v;
}

template <class T>
RW_DEVICE void store_vector(T* p, const Vector& v, bool aligned) {
    if (aligned) {
        store16(p, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
            p[j] = as_float(v.words[j]);
        } else {
            p[2 * j].bits = uint16_t(v.words[j]);
            p[2 * j + 1].bits = uint16_t(v.words[j] >> 16);
        }
    }
}

template <class T>
RW_DEVICE Vector load_elements(const T* p) {
    Vector v;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
            v.words[j] = as_bits(p[j]);
        } else {
            v.words[j] = uint32_t(p[2 * j].bits) | uint32_t(p[2 * j + 1].bits) << 16;
        }
    }
    return v;
}

template <class T>
RW_DEVICE Vector load_vector(const T* p, bool aligned) {
    return aligned ? load16(p) : load_elements(p);
}

/// Reads vectors of a row at any address, and no memory outside the row's blocks.
template <class T>
struct ShiftedRow {
    const T* x;
    const Vector* blocks;  // the first is the aligned vector with the row's first byte
    int skip, vectors;     // bytes of that vector before the row

    RW_DEVICE ShiftedRow(const T* row, int whole_vectors) : x(row), skip(int(reinterpret_cast<uintptr_t>(row) & 15)), vectors(whole_vectors) {
        blocks = reinterpret_cast<const Vector*>(reinterpret_cast<uintptr_t>(row) - uintptr_t(skip));
    }
    RW_DEVICE Vector load(int i) const {
        if (i == 0 || i >= vectors - 1) return load_elements(x + int64_t(i) * kPerVector<T>);
        const Vector a = load16_cached(blocks + i), b = load16_cached(blocks + i + 1);
        uint32_t w[8] = {a.words[0], a.words[1], a.words[2], a.words[3], b.words[0], b.words[1], b.words[2], b.words[3]};
        if (skip & 8) {
#pragma unroll
            for (int j = 0; j < 6; ++j) w[j] = w[j + 2];
        }
        if (skip & 4) {
#pragma unroll
            for (int j = 0; j < 5; ++j) w[j] = w[j + 1];
        }
        const int bits = skip % 4 * 8;
        return {shift_pair(w[0], w[1], bits), shift_pair(w[1], w[2], bits), shift_pair(w[2], w[3], bits), shift_pair(w[3], w[4], bits)};
    }
};

}  // namespace
}  // namespace reweight_ops
