// Runs the kernels of csrc/cuda on the CPU. Every CUDA thread is a fiber. Every wait switches fibers, in an order that a
// schedule chooses: code that is right under every order does not depend on one. One cluster of blocks runs at a time,
// because clusters share nothing.
//
// The memory model between barriers, speed and registers are not modeled. The hardware's approximate exponential is: it is
// exact if its argument is an integer, and otherwise wrong by up to 2^-22, the documented bound, by a hash of the argument.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <string>

#include "device.h"

#define RW_DEVICE inline
#define RW_KERNEL(threads, blocks) void
#define RW_PARAMETER const
#define RW_SHARED(Type, name) auto& name = *static_cast<Type*>(emulation::shared_memory(sizeof(Type)))

namespace reweight_ops {
namespace emulation {

// ---- for kernels

struct Thread {
    int index;
    int64_t block, blocks;
    size_t shared_offset;
};
const Thread& current();
void* shared_memory(size_t bytes);
void barrier_of_block();
void barrier_of_warp();
float exchange(float value, int lanes);
float take(float value, int lane);
uint32_t vote(bool holds);
/// Ends the launch with an error. Does not return.
[[noreturn]] void fail(const std::string& what);

// ---- for tests

/// Schedules: "eager" runs the lowest thread that can continue, and copies at once. "late" runs the
/// highest, and copies when nothing else can continue. "random" runs any. "skew" runs one block,
/// warp or thread as far ahead of the others as its waits allow.
void set_schedule(const std::string& name, uint64_t seed);
/// Sets what the host sees: one processor, and so few clusters at once that each gets several rows.
void set_device(int major, int shared_bytes, int clusters);
/// Sets a status that launches return instead of running.
void set_status(int status);
std::string last_error();

Device device();
int clusters();
using Body = void (*)(const void* kernel, const void* call);
int run(const Shape& shape, Body body, const void* kernel, const void* call);

}  // namespace emulation

inline int thread_index() { return emulation::current().index; }
inline int64_t block_index() { return emulation::current().block; }
inline int64_t block_count() { return emulation::current().blocks; }
inline void barrier() { emulation::barrier_of_block(); }
inline void warp_barrier() { emulation::barrier_of_warp(); }
inline float shuffle_xor(float value, int lanes) { return emulation::exchange(value, lanes); }

inline float broadcast(float value, int lane) { return emulation::take(value, lane); }
inline uint32_t ballot(bool holds) { return emulation::vote(holds); }
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(int(bits)) - 1; }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float exp2_approximate(float x) {
    if (std::fabs(x) < 1.1754944e-38f) x = 0.0f;
    float y = std::exp2(x);
    if (x != std::rint(x)) {
        const uint32_t hash = (as_bits(x) * 2654435761u) >> 8;  // 24 bits
        y = float(double(y) * (1.0 + (double(hash) / (1 << 23) - 1.0) / (1 << 22)));
    }
    return y < 1.1754944e-38f ? 0.0f : y;
}

inline void check_alignment(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) & 15) emulation::fail("16 bytes at an address that is not a multiple of 16");
}
inline Vector load16(const void* p) {
    check_alignment(p);
    Vector v;
    std::memcpy(&v, p, 16);
    return v;
}
inline Vector load16_cached(const void* p) { return load16(p); }
inline uint32_t shift_pair(uint32_t low, uint32_t high, int bits) { return uint32_t((uint64_t(high) << 32 | low) >> bits); }
inline void store16(void* p, Vector v) {
    check_alignment(p);
    std::memcpy(p, &v, 16);
}

inline float widen(Bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widen(F16 x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return float(half);
}
inline void narrow(float x, Bf16& to) {
    const uint32_t bits = as_bits(x);
    to.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, F16& to) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(&to, &half, 2);
}
template <class T>
uint32_t narrow_pair(float first, float second) {
    T a, b;
    narrow(first, a);
    narrow(second, b);
    return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}

template <class T>
uint32_t max_pair(uint32_t a, uint32_t b) {
    const auto one = [](uint32_t x, uint32_t y) {
        const float p = widen(T{uint16_t(x)}), q = widen(T{uint16_t(y)});
        return (q != q || p >= q ? x : y) & 0xffffu;
    };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
}

inline uint32_t max_pair_or_nan(uint32_t a, uint32_t b) {
    const auto one = [](uint32_t x, uint32_t y) {
        const float p = widen(Bf16{uint16_t(x)}), q = widen(Bf16{uint16_t(y)});
        return p != p || q != q ? 0x7fffu : (p >= q ? x : y) & 0xffffu;
    };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
}

inline Device device_of(int) { return emulation::device(); }

template <class Call>
int active_clusters(void (*)(const Call), const Shape&, int, int& count) {
    count = emulation::clusters();
    return 0;
}

template <class Call>
int launch(void (*kernel)(const Call), const Shape& shape, const Call& call) {
    const emulation::Body body = [](const void* k, const void* c) {
        reinterpret_cast<void (*)(const Call)>(const_cast<void*>(k))(*static_cast<const Call*>(c));
    };
    return emulation::run(shape, body, reinterpret_cast<const void*>(kernel), &call);
}

}  // namespace reweight_ops
