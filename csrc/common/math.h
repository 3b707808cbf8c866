// The few functions that generated token rules call. Scalar fp32, once per row: exactness matters, speed does not.
//
// Include as "common/math.h"; never put csrc/common itself on the include path, <math.h> would find this file.
//
// NaN: every function returns NaN if an argument is NaN (rw_min and rw_max too, as torch.minimum and torch.maximum).
// Infinities: rw_exp(-inf) = 0, rw_exp(inf) = inf, rw_log(0) = -inf, rw_sigmoid(-inf) = 0, rw_sigmoid(inf) = 1.
// Do not compile with -ffast-math or -ffinite-math-only: both promise the compiler that neither exists.
#pragma once

#include <cmath>
#include <limits>

// `static`: one file may be compiled for several instruction sets, and the linker must not merge the copies.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define RW_HD static __host__ __device__ __attribute__((always_inline))
#else
#define RW_HD static
#endif

#define RW_INF (std::numeric_limits<float>::infinity())
#define RW_NAN (std::numeric_limits<float>::quiet_NaN())

RW_HD inline float rw_exp(float x) { return expf(x); }
RW_HD inline float rw_expm1(float x) { return expm1f(x); }
RW_HD inline float rw_log(float x) { return logf(x); }
RW_HD inline float rw_log1p(float x) { return log1pf(x); }
RW_HD inline float rw_tanh(float x) { return tanhf(x); }
RW_HD inline float rw_abs(float x) { return fabsf(x); }
RW_HD inline float rw_min(float a, float b) { return (a < b || a != a) ? a : b; }
RW_HD inline float rw_max(float a, float b) { return (a > b || a != a) ? a : b; }
RW_HD inline float rw_clip(float x, float low, float high) { return rw_min(rw_max(x, low), high); }

// The exponential of -|x| only: it cannot overflow, and both tails keep their relative accuracy.
RW_HD inline float rw_sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
