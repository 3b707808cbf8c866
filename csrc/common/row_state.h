// Online softmax of one row in base 2: sums relative to a reference that may grow. Host and device.
//
// With t = log2(e)/T·x - ref the state holds sum = Σ 2^t, dot = Σ 2^t·t and sum_sq = Σ 4^t. Everything is relative to the reference: the
// textbook forms (Σ p·x, log Σ e^2x) lose four digits when the logits share a large offset. The largest column is not in the sums of a
// finished row: beside its 1, those of a sure row would vanish in rounding, and with them the log-prob and the gradient.
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

/// Up to this size the two fp32 numbers of a log-sum-exp give probabilities to the precision of fp32 at any temperature; beyond it, a log-prob of the
/// target above the other one does.
constexpr double kLargestLse = 1 << 24, kLeastLogp = -50;

/// The statistics of a row, in natural units; `lse_low`: what rounding `lse` lost.
struct RowStats {
    float logp, entropy, lse, lse_low, log_sum_p_sq, max_logp;
};

template <class Real>
struct RowState {
    Real ref = -std::numeric_limits<Real>::infinity();
    Real sum = 0, dot = 0, sum_sq = 0;

    /// The same sums relative to another reference.
    RW_METHOD void rebase(Real to) {
        if (to == ref) return;
        if (sum != 0) {  // an empty state may have ref = -inf: nothing to scale, and -inf - to would poison dot
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
        if (other.ref > ref) {
            rebase(other.ref);
        } else {
            other.rebase(ref);
        }
        update(other.sum, other.dot, other.sum_sq);
    }
};

/// A row: its largest x·log2(e)/T, and the sums of all columns but that one, relative to it. NaN where there is no distribution: a row that
/// holds NaN or +inf, or nothing but -inf.
template <class Real>
struct FinishedRow {
    Real top, log_total;  // log_total: the log-sum-exp relative to the largest, in natural units
    RowState<Real> rest;

    RW_METHOD FinishedRow(Real largest, const RowState<Real>& others) : top(largest), rest(others) {
        rest.rebase(top);
        log_total = top > -std::numeric_limits<Real>::infinity() ? std::log1p(rest.sum) : std::numeric_limits<Real>::quiet_NaN();
    }

    /// `target`: log2(e)/T·x of the target, -inf if it is not here. `largest`: x/T of the largest, of which log2(e) would take digits.
    RW_METHOD RowStats statistics(Real target, Real largest) const {
        const Real ln2 = Real(0.693147180559945309417);
        RowStats out;
        out.logp = at_most_zero((target - top) * ln2 - log_total);
        out.entropy = 0.0f - at_most_zero(rest.dot / (1 + rest.sum) * ln2 - log_total);  // and not -0
        out.lse = float(largest + log_total);
        out.lse_low = float((largest - out.lse) + log_total);
        out.log_sum_p_sq = at_most_zero(std::log1p(rest.sum_sq) - 2 * log_total);
        out.max_logp = at_most_zero(-log_total);
        return out;
    }

private:
    /// Rounding may leave the range by 1e-7 where p is 1; nobody expects a positive log-prob, or a -0. NaN stays.
    static RW_METHOD float at_most_zero(Real x) { return x >= 0 ? 0.0f : float(x); }
};

}  // namespace
}  // namespace reweight_ops
