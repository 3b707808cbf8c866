// The statistics of a row, and the numbers by which every backend's kernels judge them.
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RW_METHOD __host__ __device__ __forceinline__
#else
#define RW_METHOD inline
#endif

namespace reweight_ops {
namespace {  // one file is compiled for several instruction sets: the linker must not merge the copies

/// In natural units; `lse_low`: what rounding `lse` lost, and -inf in a row of nothing but -inf, for who merges the shards of a row.
struct RowStats {
    float logp, entropy, lse, lse_low, log_sum_p_sq, max_logp;
};

/// Up to this size the two fp32 numbers of a log-sum-exp give probabilities to the precision of fp32 at any temperature; beyond it, a log-prob of the
/// target above the other one does.
constexpr double kLargestLse = 1 << 24, kLeastLogp = -50;

/// Whether probabilities are measured from the target's log-prob, and not from the log-sum-exp.
RW_METHOD bool is_by_target(bool has_target, float lse, float logp) { return has_target && std::fabs(lse) > kLargestLse && logp > kLeastLogp; }

/// Whether a row whose other numbers are NaN holds nothing but -inf, from its largest and the sum of the others: no NaN and no +inf then.
template <class Real>
RW_METHOD bool is_empty(Real largest, Real others) {
    return largest < 0 && std::isinf(largest) && others == 0;
}

/// Rounding may leave the range by 1e-7 where p is 1; nobody expects a positive log-prob, or a -0. NaN stays.
template <class Real>
RW_METHOD float at_most_zero(Real x) {
    return x >= 0 ? 0.0f : float(x);
}

}  // namespace
}  // namespace reweight_ops
