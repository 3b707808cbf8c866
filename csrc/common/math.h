// The functions that token rules use. They run in scalar fp32 (fp64 for checking), once per row: exactness matters,
// speed does not.
//
// Include this file as "common/math.h". Never put csrc/common itself on the include path: <math.h> would find it.
//
// NaN: every function returns NaN if an argument is NaN, as torch.minimum and torch.maximum do.
// Infinities: rw_exp(-inf) = 0, rw_exp(inf) = inf, rw_log(0) = -inf, rw_sigmoid(-inf) = 0, rw_sigmoid(inf) = 1.
// Do not compile with -ffast-math or -ffinite-math-only: both let the compiler assume that neither occurs.
#pragma once

#include <cmath>
#include <limits>

// `static` keeps the linker from merging copies of a file that is compiled for several instruction sets.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define RW_HD static __host__ __device__ __attribute__((always_inline))
#else
#define RW_HD static
#endif

#define RW_INF (std::numeric_limits<float>::infinity())
#define RW_NAN (std::numeric_limits<float>::quiet_NaN())

// These take float and double: the standard library overloads by type.
template <class Real>
RW_HD inline Real rw_exp(Real x) {
    return std::exp(x);
}
template <class Real>
RW_HD inline Real rw_expm1(Real x) {
    return std::expm1(x);
}
template <class Real>
RW_HD inline Real rw_log(Real x) {
    return std::log(x);
}
template <class Real>
RW_HD inline Real rw_log1p(Real x) {
    return std::log1p(x);
}
template <class Real>
RW_HD inline Real rw_tanh(Real x) {
    return std::tanh(x);
}
template <class Real>
RW_HD inline Real rw_abs(Real x) {
    return std::fabs(x);
}
template <class Real>
RW_HD inline Real rw_min(Real a, Real b) {
    return (a < b || a != a) ? a : b;
}
template <class Real>
RW_HD inline Real rw_max(Real a, Real b) {
    return (a > b || a != a) ? a : b;
}
template <class Real>
RW_HD inline Real rw_clip(Real x, Real low, Real high) {
    return rw_min(rw_max(x, low), high);
}

// Takes the exponential of -|x| only: it cannot overflow, and both tails keep their relative
// accuracy.
template <class Real>
RW_HD inline Real rw_sigmoid(Real x) {
    const Real e = std::exp(-std::fabs(x));
    return (x < 0 ? e : Real(1)) / (1 + e);
}
