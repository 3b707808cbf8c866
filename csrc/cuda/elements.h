// Rows as 16-byte vectors of fp32, bf16 or fp16. A row that is not aligned is read and written element by element, each by the thread that
// would otherwise have had its vector: which thread has which column never depends on an address.
#pragma once

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

/// One vector from `x`, of fp32.
template <class T>
RW_DEVICE void store_vector(T* p, const float* x, bool aligned) {
    if (aligned) {
        store16(p, pack<T>(x));
    } else {
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j) narrow(x[j], p[j]);
    }
}

template <class T>
RW_DEVICE Vector load_vector(const T* p, bool aligned) {
    if (aligned) return load16(p);
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

}  // namespace
}  // namespace reweight_ops
