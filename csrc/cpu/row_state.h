// Online softmax of one row in base 2. Sums are relative to a reference that may grow.
//
// With t = log2(e)/T·x - ref the state holds sum = Σ 2^t, dot = Σ 2^t·t and sum_sq = Σ 4^t. Everything is relative to
// the reference: the textbook forms (Σ p·x, log Σ e^2x) lose four digits when the logits share a large offset. The sums
// of a finished row exclude the largest column: added to its 1, the sums of a sure row would vanish in rounding, and the
// log-prob and the gradient with them.
#pragma once

#include <cmath>
#include <limits>

#include "common/constants.h"
#include "common/row_stats.h"

namespace reweight_ops {
namespace {

template <class Real>
struct RowState {
    Real ref = -std::numeric_limits<Real>::infinity();
    Real sum = 0, dot = 0, sum_sq = 0;

    /// Makes the sums relative to another reference.
    void rebase(Real to) {
        if (to == ref) return;
        if (sum != 0) {  // an empty state may have ref = -inf, and -inf - to would make dot NaN
            const Real shift = ref - to, factor = std::exp2(shift);
            dot = factor * (dot + shift * sum);
            sum *= factor;
            sum_sq *= factor * factor;
        }
        ref = to;
    }

    /// Adds sums that are relative to this state's reference.
    void update(Real more_sum, Real more_dot, Real more_sum_sq) {
        sum += more_sum;
        dot += more_dot;
        sum_sq += more_sum_sq;
    }

    void merge(RowState other) {
        if (other.ref > ref) {
            rebase(other.ref);
        } else {
            other.rebase(ref);
        }
        update(other.sum, other.dot, other.sum_sq);
    }
};

/// A row: its largest x·log2(e)/T, and the sums of all other columns relative to it. They are NaN
/// without a distribution: where the row holds NaN or +inf, or only -inf.
template <class Real>
struct FinishedRow {
    Real top, log_total;  // log_total is the log-sum-exp relative to the largest, in natural units
    RowState<Real> rest;

    FinishedRow(Real largest, const RowState<Real>& others) : top(largest), rest(others) {
        rest.rebase(top);
        log_total = top > -std::numeric_limits<Real>::infinity() ? std::log1p(rest.sum) : std::numeric_limits<Real>::quiet_NaN();
    }

    /// `target` is log2(e)/T·x of the target, -inf if another shard has it. `largest` is x/T of the
    /// largest column: a product with log2(e) would lose digits.
    RowStats statistics(Real target, Real largest) const {
        RowStats out;
        out.logp = at_most_zero((target - top) * Real(kLn2) - log_total);
        out.entropy = 0.0f - at_most_zero(rest.dot / (1 + rest.sum) * Real(kLn2) - log_total);  // avoids -0
        out.lse = float(largest + log_total);
        out.lse_low = float((largest - out.lse) + log_total);
        if (is_empty(top, rest.sum)) out.lse_low = -std::numeric_limits<float>::infinity();
        out.log_sum_p_sq = at_most_zero(std::log1p(rest.sum_sq) - 2 * log_total);
        out.max_logp = at_most_zero(-log_total);
        return out;
    }
};

}  // namespace
}  // namespace reweight_ops
