// The statistics of a row, and the thresholds that every backend's kernels share.
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RW_METHOD __host__ __device__ __forceinline__
#else
#define RW_METHOD inline
#endif

namespace reweight_ops {
namespace {  // keeps the linker from merging copies for several instruction sets

/// In natural units. `lse_low` is what rounding `lse` lost. It is -inf in a row where every logit
/// is -inf: merging shards of a row needs that mark.
struct RowStats {
    float logp, entropy, lse, lse_low, log_sum_p_sq, max_logp;
};

/// Up to kLargestLse the two fp32 numbers of a log-sum-exp give probabilities to the precision of
/// fp32 at any temperature. Beyond it, the target's log-prob does, if that is above kLeastLogp.
constexpr double kLargestLse = 1 << 24, kLeastLogp = -50;

/// Whether probabilities are relative to the target's log-prob instead of the log-sum-exp.
RW_METHOD bool is_by_target(bool has_target, float lse, float logp) { return has_target && std::fabs(lse) > kLargestLse && logp > kLeastLogp; }

/// Whether a row with NaN statistics holds only -inf, by its largest logit and the sum of the
/// others: it then has no NaN and no +inf.
template <class Real>
RW_METHOD bool is_empty(Real largest, Real others) {
    return largest < 0 && std::isinf(largest) && others == 0;
}

/// Rounding may exceed the range by 1e-7 where p is 1. This removes positive log-probs and -0. It
/// keeps NaN.
template <class Real>
RW_METHOD float at_most_zero(Real x) {
    return x >= 0 ? 0.0f : float(x);
}

}  // namespace
}  // namespace reweight_ops
