// Everything that differs between nvcc and g++. Kernels use only these names: the same source runs on a GPU and, compiled
// by g++ against tests/support/cuda_emulation/emulator.h, on the CPU.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace reweight_ops {

/// 16 bytes, which one thread loads or stores at once.
struct alignas(16) Vector {
    uint32_t words[4];
};

/// Two buffers: while some threads still read one, others write the next.
template <class T>
using DoubleBuffer = T[2];

}  // namespace reweight_ops

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.h"

#define RW_DEVICE __device__ __forceinline__
#define RW_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Parameters stay in constant memory, even if they are indexed at run time.
#define RW_PARAMETER const __grid_constant__
#define RW_SHARED(Type, name) __shared__ Type name

namespace reweight_ops {

RW_DEVICE int thread_index() { return int(threadIdx.x); }
RW_DEVICE int64_t block_index() { return blockIdx.x; }
RW_DEVICE int64_t block_count() { return gridDim.x; }
RW_DEVICE void barrier() { __syncthreads(); }
RW_DEVICE void warp_barrier() { __syncwarp(); }
RW_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

RW_DEVICE float broadcast(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
/// A bit for each lane of the warp for which the condition holds.
RW_DEVICE uint32_t ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
RW_DEVICE int lowest_bit(uint32_t bits) { return __ffs(int(bits)) - 1; }
RW_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

/// 2^x with a relative error of at most 2^-22. It is 0 below 2^-126.
RW_DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Neither uses L1: a row is far larger, and a second read of a row comes from L2.
RW_DEVICE Vector load16(const void* p) {
    Vector v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(p)
                 : "memory");
    return v;
}
/// Uses L1, for code that reads every vector twice.
RW_DEVICE Vector load16_cached(const void* p) {
    Vector v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(p)
                 : "memory");
    return v;
}
RW_DEVICE void store16(void* p, Vector v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]),
                 "r"(v.words[3])
                 : "memory");
}

/// The 32 bits that begin at bit `bits` of two words, the lower word first.
RW_DEVICE uint32_t shift_pair(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, uint32_t(bits)); }
RW_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
RW_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
RW_DEVICE float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
RW_DEVICE float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
RW_DEVICE void narrow(float x, Bf16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
RW_DEVICE void narrow(float x, F16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

/// The first of a pair is in the low half of the word.
template <class T>
RW_DEVICE uint32_t narrow_pair(float first, float second);
template <>
RW_DEVICE uint32_t narrow_pair<Bf16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
template <>
RW_DEVICE uint32_t narrow_pair<F16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

/// The maximum of two pairs, each half by itself. It ignores NaN.
template <class T>
RW_DEVICE uint32_t max_pair(uint32_t a, uint32_t b);
template <>
RW_DEVICE uint32_t max_pair<Bf16>(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
}
template <>
RW_DEVICE uint32_t max_pair<F16>(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
}
/// The same, but it keeps NaN.
RW_DEVICE uint32_t max_pair_or_nan(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
}

}  // namespace reweight_ops

#else
#include "emulator.h"
#endif
