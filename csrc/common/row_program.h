// Evaluates a whole loss for one row: every term with its weights, and the derivatives by the row's statistics. Host and device.
#pragma once

#include "common/math.h"
#include "common/rules.inc"

namespace reweight_ops {

constexpr int kMaxTerms = 4, kMaxWeights = 4;

/// A loss as ids into the generated rules, with the place of each part's parameters in `params`.
/// params[0], params[1]: bounds of the log-ratio. params[rule_params[k] - 1]: the coefficient of term k.
struct RowProgram {
    int terms, weights;
    int rule[kMaxTerms], rule_params[kMaxTerms];
    int weight[kMaxWeights], weight_params[kMaxWeights];
    bool weight_all[kMaxWeights];  // scope "all"; else it multiplies term 0, the surrogate, only
};

/// The total's derivatives by logp (through the ratio too), entropy and log_sum_p_sq, and the row's share of the total.
struct RowLoss {
    float weighted_loss, loss, coef, entropy_coef, p_sq_coef;
};

/// `t.log_ratio` is computed here, the other leaves are inputs. `row_weights[k * step]` is the row weight of term k.
RW_HD inline RowLoss evaluate_row(const RowProgram& program, const float* params, Leaves t, const float* row_weights, long long step) {
    const float raw = t.logp - t.old_logp, low = params[0], high = params[1];
    const bool clamped = raw < low || raw > high;  // false for NaN, which has to reach the gradient
    t.log_ratio = raw < low ? low : raw > high ? high : raw;

    float on_all = 1.0f, on_surrogate = 1.0f;
    for (int j = 0; j < program.weights; ++j) {
        const float u = apply_weight(program.weight[j], t, params + program.weight_params[j]);
        (program.weight_all[j] ? on_all : on_surrogate) *= u;
    }

    RowLoss out{};
    for (int k = 0; k < program.terms; ++k) {
        float factor = params[program.rule_params[k] - 1] * on_all;
        if (k == 0) factor *= on_surrogate;
        const float share = row_weights[k * step] * factor;
        if (share == 0.0f) continue;  // selects zero: never 0 * inf
        const RuleOut r = apply_rule(program.rule[k], t, params + program.rule_params[k]);
        out.loss += factor * r.loss;
        out.weighted_loss += share * r.loss;
        out.coef += share * (clamped ? r.d_logp : r.d_logp + r.d_log_ratio);
        out.entropy_coef += share * r.d_entropy;
        out.p_sq_coef += share * r.d_log_sum_p_sq;
        if (t.logp != t.logp) out.coef = t.logp;  // whatever the rule's comparisons make of a NaN
        if (t.entropy != t.entropy && out.entropy_coef != 0.0f) out.entropy_coef = t.entropy;
    }
    return out;
}

}  // namespace reweight_ops
