// The float vector of the level that this file is compiled for, and the operations that the kernels need.
//
// It uses GCC/Clang vector extensions, so that everything builds for any processor, and intrinsics only where they pay.
// All names have internal linkage: this file is compiled for several instruction sets, and the linker must not merge
// the copies.
//
// 16-bit rows are read two vectors at a time. bf16 is split into even and odd columns: a conversion is then one shift or
// one mask. Stores interleave such a pair again. The lane of a column depends on the column alone, never on an address.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/constants.h"
#include "common/dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// For the bodies of loops. A body that stays a call keeps its sums in memory and takes a third
// longer.
#define RW_ALWAYS_INLINE __attribute__((always_inline))
#define RW_INLINE inline RW_ALWAYS_INLINE

namespace reweight_ops {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef double VecD __attribute__((vector_size(8 * kWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V = Vec>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would turn -0 into 0
inline VecU splat_u(uint32_t x) { return x + VecU{}; }
inline Vec select(VecI mask, Vec a, Vec b) { return (Vec)(((VecI)a & mask) | ((VecI)b & ~mask)); }
inline VecU select(VecI mask, VecU a, VecU b) { return (a & (VecU)mask) | (b & ~(VecU)mask); }

/// a > b ? a : b. This is b if either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
    return _mm_max_ps(a, b);
#else
    return select(a > b, a, b);
#endif
}

/// Whether fma rounds once.
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

/// a * b + c, with one rounding where the processor supports it. The compiler never chooses: two
/// kernels must round alike.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

template <int kLanes, class V>
inline double halve(const V& v) {
    double lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}
/// The sum of all lanes, in double. An fp32 sum would drop small lanes next to a large one.
inline double sum4(Vec a, Vec b, Vec c, Vec d) {
    const auto wide = [](Vec v) { return __builtin_convertvector(v, VecD); };
    return halve<kWidth>((wide(a) + wide(b)) + (wide(c) + wide(d)));
}
inline float largest(Vec v) {
    float lanes[kWidth], top = -kInf;
    store(lanes, v);
    for (float lane : lanes) top = lane > top ? lane : top;
    return top;
}

inline bool any(VecI v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t lanes[kWidth], seen = 0;
    store(lanes, v);
    for (int32_t lane : lanes) seen |= lane;
    return seen != 0;
#endif
}

/// A bit for each lane, of lanes that are all ones or all zeros.
inline uint32_t lane_bits(VecI v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)v));
#elif defined(__x86_64__)
    return uint32_t(_mm_movemask_ps((__m128)v));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= uint32_t(v[i] != 0) << i;
    return bits;
#endif
}

/// The largest integer <= t, for |t| < 2^22. NaN and -inf pass through.
inline Vec floor(Vec t) {
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return _mm256_floor_ps(t);
#elif defined(__SSE4_1__)
    return _mm_floor_ps(t);
#elif defined(__ARM_NEON)
    return vrndmq_f32(t);
#else
    const Vec magic = splat(12582912.0f), nearest = (t + magic) - magic;  // 1.5 * 2^23: the sum has no fraction bits
    return nearest - (Vec)((VecI)splat(1.0f) & (VecI)(nearest > t));
#endif
}

/// 2^n for an integer -127 <= n <= 127, where 2^-127 reads as 0.
inline Vec power_of_two(Vec n) { return (Vec)((__builtin_convertvector(n, VecI) + 127) << 23); }

// The polynomials come from csrc/cpu/fit_exp2.py, which also prints their errors.

/// Coefficients of 2^f on [0, 1] by degree. Degree 5 is exactly 1 at f = 0, so that the top token
/// of a sure row has p = 1.
constexpr double kExp2Coefs[6][6] = {
    {},
    {},
    {},
    {9.999252186e-01, 6.958335405e-01, 2.260671555e-01, 7.802452261e-02},
    {1.000002593e+00, 6.930038345e-01, 2.414427569e-01, 5.201146062e-02, 1.353416791e-02},
    {1.0, 6.931513118e-01, 2.401644502e-01, 5.579991310e-02, 9.017030322e-03, 1.867130070e-03},
};

/// factor·2^t for t <= 127. It is exactly 0 at -inf, NaN for NaN, and 0 or subnormal below 2^-126.
/// The relative error is 1e-4, 2.7e-6, 1.5e-7 for degree 3, 4, 5.
template <int kDegree>
struct Exp2 {
    Vec c[kDegree + 1];

    explicit Exp2(double factor) {
        for (int i = 0; i <= kDegree; ++i) c[i] = splat(float(factor * kExp2Coefs[kDegree][i]));
    }

    Vec operator()(Vec t) const {
#if defined(__AVX512F__)
        const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t), and 0 at -inf
#else
        t = max(splat(-127.0f), t);
        const Vec n = floor(t), f = t - n;
#endif
        Vec p = c[kDegree];
#pragma GCC unroll 8
        for (int i = kDegree - 1; i >= 0; --i) p = fma(p, f, c[i]);
#if defined(__AVX512F__)
        return _mm512_scalef_ps(p, t);  // p * 2^floor(t)
#else
        return p * power_of_two(n);
#endif
    }
};

/// tanh from E = expm1(2|u|) in base 2, so that small arguments keep their relative accuracy, and
/// its slope 4(1+E)/(2+E)². The slope comes from E too: 1 - tanh² would lose all digits as tanh
/// goes to 1.
inline Vec tanh(Vec u, Vec& slope) {
    const VecI sign = (VecI)u & INT32_MIN;
    const Vec magnitude = (Vec)((VecI)u & INT32_MAX);
    const Vec t = select(magnitude > splat(9.5f), splat(27.5f), magnitude * splat(2.885390082f));  // 2 log2(e); tanh(9.5) rounds to 1
    const Vec n = floor(t), f = t - n, scale = power_of_two(n);
    Vec p = splat(2.074557706e-04f);
    p = fma(p, f, splat(1.271005720e-03f));
    p = fma(p, f, splat(9.650651366e-03f));
    p = fma(p, f, splat(5.549656600e-02f));
    p = fma(p, f, splat(2.402271330e-01f));
    p = fma(p, f, splat(6.931471825e-01f));
    const Vec expm1 = fma(p * f, scale, scale - splat(1.0f));
    const Vec part = splat(2.0f) / (expm1 + splat(2.0f));
    slope = (expm1 + splat(1.0f)) * part * part;
    // Beyond 1/2, use one minus the small part: it rounds less than a quotient.
    return (Vec)((VecI)select(expm1 > splat(2.0f), splat(1.0f) - part, expm1 / (expm1 + splat(2.0f))) | sign);
}

// ---- two vectors of logits at a time

/// Whether of two vectors the first one holds the even columns, and not the first ones.
template <class T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<Bf16> = true;
#if !defined(__AVX2__)
template <>
constexpr bool kInterleaved<F16> = true;
#endif

inline void load2(const float* p, Vec& a, Vec& b) {
    a = load(p);
    b = load(p + kWidth);
}

inline void load2(const Bf16* p, Vec& even, Vec& odd) {
    const VecU pairs = load<VecU>(p);
    even = (Vec)(pairs << 16);
    odd = (Vec)(pairs & 0xffff0000u);
}

/// bf16 in the upper half of each lane, rounded to nearest even. NaN stays NaN.
inline VecU round_to_bf16(Vec v) {
    const VecU u = (VecU)v;
    return select(v == v, u + (0x7fffu + ((u >> 16) & 1u)), u | 0x400000u);
}
inline VecU pack(const Bf16*, Vec even, Vec odd) {
#if defined(__AVX512BF16__)
    // One instruction rounds both vectors. It leaves the even columns in the lower half, so
    // interleave. Results below 2^-126 become 0.
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return (VecU)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#else
    return (round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xffff0000u);
#endif
}

#if defined(__AVX512F__)
inline void load2(const F16* p, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(load<__m256i>(p));
    b = _mm512_cvtph_ps(load<__m256i>(p + 16));
}
inline VecU pack(const F16*, Vec a, Vec b) {
    const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    return (VecU)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#elif defined(__AVX2__)
inline void load2(const F16* p, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(load<__m128i>(p));
    b = _mm256_cvtph_ps(load<__m128i>(p + 8));
}
inline VecU pack(const F16*, Vec a, Vec b) {
    return (VecU)_mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Converts by bits: compilers do not vectorise _Float16 without hardware for it, and an element
// would take 40 ns.
inline Vec widen_f16(VecU half) {
    const VecU magnitude = (half & 0x7fffu) << 13;
    const Vec finite = (Vec)magnitude * splat(5.192296858534828e33f);  // 2^112, the difference of the exponent biases
    const VecU value = select((VecI)((half & 0x7c00u) == 0x7c00u), magnitude | 0x7f800000u, (VecU)finite);
    return (Vec)(value | (half & 0x8000u) << 16);
}
inline VecU narrow_f16(Vec v) {
    const VecU u = (VecU)v & 0x7fffffffu, sign = ((VecU)v >> 16) & 0x8000u;
    const VecU normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
    const VecU subnormal = (VecU)((Vec)u + splat(0.5f)) - 0x3f000000u;  // the unit in the last place of 0.5 is fp16's smallest step
    VecU half = select((VecI)(u < splat_u(0x38800000u)), subnormal, normal);
    half = select((VecI)(u >= splat_u(0x477ff000u)), splat_u(0x7c00u), half);
    return sign | select((VecI)(u > splat_u(0x7f800000u)), splat_u(0x7e00u), half);
}
inline void load2(const F16* p, Vec& even, Vec& odd) {
    const VecU pairs = load<VecU>(p);
    even = widen_f16(pairs & 0xffffu);
    odd = widen_f16(pairs >> 16);
}
inline VecU pack(const F16*, Vec even, Vec odd) { return narrow_f16(even) | narrow_f16(odd) << 16; }
#endif

inline void store2(float* p, Vec a, Vec b) {
    store(p, a);
    store(p + kWidth, b);
}
template <class T>
inline void store2(T* p, Vec a, Vec b) {
    store(p, pack(p, a, b));
}

/// Stores past the caches if the level can. p must be aligned to the vector.
template <class V>
inline void stream(void* p, V v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
    store(p, v);
#endif
}
inline void stream2(float* p, Vec a, Vec b) {
    stream(p, a);
    stream(p + kWidth, b);
}
template <class T>
inline void stream2(T* p, Vec a, Vec b) {
    stream(p, pack(p, a, b));
}
/// Makes streamed stores visible to other threads.
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/// Loads the first n < 2 * kWidth elements at p, and -inf for the others.
template <class T>
inline void load2_partial(const T* p, int64_t n, Vec& a, Vec& b) {
    T padded[2 * kWidth];
    store2(padded, splat(-kInf), splat(-kInf));
    std::memcpy(padded, p, n * sizeof(T));
    load2(padded, a, b);
}
template <class T>
inline void store2_partial(T* p, int64_t n, Vec a, Vec b) {
    T padded[2 * kWidth];
    store2(padded, a, b);
    std::memcpy(p, padded, n * sizeof(T));
}
template <class T>
inline float load1(const T* p) {
    Vec a, b;
    load2_partial(p, 1, a, b);
    return a[0];
}
template <class T>
inline void store1(T* p, float v) {
    store2_partial(p, 1, splat(v), splat(v));
}

}  // namespace
}  // namespace reweight_ops
