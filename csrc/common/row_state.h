// Online softmax of one row in base 2: sums relative to a reference that may grow. Host and device.
//
// With t = log2(e)·x - ref the state holds sum = Σ 2^t, dot = Σ 2^t·t and sum_sq = Σ 4^t. Everything is relative to the reference: the
// textbook forms (Σ p·x, log Σ e^2x) lose four digits when the logits share a large offset.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RW_METHOD __host__ __device__ __forceinline__
#else
#define RW_METHOD inline
#endif

namespace reweight_ops {
namespace {  // one file is compiled for several instruction sets: the linker must not merge the copies

/// The statistics of a row, in natural units.
struct RowStats {
    float logp, entropy, lse, log_sum_p_sq, max_logp;
};

template <class Real>
struct RowState {
    Real ref = -std::numeric_limits<Real>::infinity();
    Real sum = 0, dot = 0, sum_sq = 0;

    /// The same sums relative to another reference.
    RW_METHOD void rebase(Real to) {
        if (sum != 0) {  // an empty state has ref = -inf: nothing to scale, and -inf - to would poison dot
            const Real shift = ref - to, factor = std::exp2(shift);
            dot = factor * (dot + shift * sum);
            sum *= factor;
            sum_sq *= factor * factor;
        }
        ref = to;
    }

    /// Add sums that are relative to this state's reference.
    RW_METHOD void update(Real more_sum, Real more_dot, Real more_sum_sq) {
        sum += more_sum;
        dot += more_dot;
        sum_sq += more_sum_sq;
    }

    RW_METHOD void merge(RowState other) {
        const Real top = other.ref > ref ? other.ref : ref;
        rebase(top);
        other.rebase(top);
        update(other.sum, other.dot, other.sum_sq);
    }

    /// log2 of the sum. NaN for a row that holds NaN or +inf, and for one that is all -inf: there is no distribution.
    RW_METHOD Real log_sum() const { return sum > 0 ? std::log2(sum) : std::numeric_limits<Real>::quiet_NaN(); }

    /// `target` and `top`: log2(e)·x of the target (-inf if it is not here) and of the largest logit.
    RW_METHOD RowStats finish(Real target, Real top) const {
        const Real ln2 = Real(0.693147180559945309417), log_s = log_sum();
        RowStats out;
        out.logp = at_most_zero(((target - ref) - log_s) * ln2);
        out.entropy = 0.0f - at_most_zero((dot / sum - log_s) * ln2);  // and not -0
        out.lse = float((ref + log_s) * ln2);
        out.log_sum_p_sq = at_most_zero((std::log2(sum_sq) - 2 * log_s) * ln2);
        out.max_logp = at_most_zero(((top - ref) - log_s) * ln2);
        return out;
    }

  private:
    /// Rounding may leave the range by 1e-7 where p is 1; nobody expects a positive log-prob. NaN stays.
    static RW_METHOD float at_most_zero(Real x) { return x > 0 ? 0.0f : float(x); }
};

}  // namespace
}  // namespace reweight_ops
