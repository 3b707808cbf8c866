// Turns the derivatives of the loss by a row's statistics into its gradient by the row's logits.
#pragma once

#include <cmath>

#include "common/row_stats.h"

namespace reweight_ops {
namespace {

/// T·dL/dlogit = p·(constant + log·l + p_coef·p) away from the target, before the softcap's slope.
/// l is log p, or log p plus a constant.
template <class Real>
struct GradCoefs {
    Real constant, log, p_coef;
};

/// The derivatives of the loss by the row's statistics, and the statistics that they multiply.
template <class Real>
struct Derivatives {
    float d_logp, d_entropy, d_lse, d_p_sq;
    float logp, entropy, log_sum_p_sq;

    RW_METHOD bool all_zero() const { return d_logp == 0 && d_entropy == 0 && d_lse == 0 && d_p_sq == 0; }

    /// `entropy_of_l` is -Σ p·l. It is the entropy where l is log p.
    RW_METHOD GradCoefs<Real> coefs(Real entropy_of_l) const {
        GradCoefs<Real> c{-Real(d_logp) + d_lse, 0, 0};
        if (d_entropy != 0) {
            c.constant -= Real(d_entropy) * entropy_of_l;
            c.log = -Real(d_entropy);
        }
        if (d_p_sq != 0) {
            c.constant -= 2 * d_p_sq;
            c.p_coef = 2 * d_p_sq / std::exp(Real(log_sum_p_sq));
        }
        return c;
    }

    /// The target's own element. It takes p - 1 from the log-prob: a rounded p loses all digits of
    /// p - 1 as p goes to 1.
    RW_METHOD float at_target() const {
        const Real y = logp, p = std::exp(y);
        Real g = -d_logp * std::expm1(y) + d_lse * p;
        if (d_entropy != 0 && p > 0) g -= d_entropy * p * (y + entropy);
        if (d_p_sq != 0) g += 2 * d_p_sq * p * (p / std::exp(Real(log_sum_p_sq)) - 1);
        return float(g);
    }
};

}  // namespace
}  // namespace reweight_ops
