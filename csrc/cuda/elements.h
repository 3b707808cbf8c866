// Rows as 16-byte vectors of fp32, bf16 or fp16. A row that is not aligned is read and written element by element, each by the thread that
// would otherwise have had its vector: which thread has which column never depends on an address.
#pragma once

#include <limits>
#include <type_traits>

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

/// The largest element, a NaN being none: -inf or more.
template <class T, int n>
RW_DEVICE float largest(const Vector (&v)[n]) {
    float top = -std::numeric_limits<float>::infinity();
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

/// -inf has an exponential of 0, and 0 * -inf would be NaN. Bounding two bf16 at once by -1e20 costs half as much as bounding their exponents; fp16 has
/// no number that is as good as -inf.
template <class T>
constexpr bool kBoundsPairs = std::is_same_v<T, Bf16>;
constexpr float kLowest = 1e18f;  // a row whose largest logit is within this has none of it where logits were bounded

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
