// One row of a call: its address and the evaluation of its statistics. The kernels share this code;
// they differ only in how they move a row.
#pragma once

#include "common/row_view.h"
#include "gradient.h"
#include "program.h"

namespace reweight_ops {
namespace {

template <class T>
struct Row : RowView<T, int> {
    float scale;  // scale is log2(e) / T

    RW_DEVICE Row(const Call& call, int64_t i) : Row(call, i, call.ids[i], temperature_of(call, i)) {}
    RW_DEVICE Row(const Call& call, int64_t i, int64_t id, float t) : RowView<T, int>(call, i, id, t), scale(kLog2ef / t) {}
};

/// The origin of a row from its sums. With t_top the exponent of the largest logit, p = 2^(t -
/// t_top) / (1 + rest).
RW_DEVICE Origin origin_of(const Partial& sums, float scale, bool full) {
    const float whole = float(-log_sum(sums) * kLog2e), inverse = 1.0f / (1.0f + sums.rest);
    if (full || !is_near(sums.top, scale)) return {false, sums.top, whole, inverse};
    const float base = sums.top * scale, t = fmaf(sums.top, scale, -base);
    return {true, base, whole - t, inverse * (1.0f + expm1f(-t * kLn2f))};
}

/// Computes a row's loss, its outputs (if `writes`) and the constants of its gradient from its
/// sums. All lanes of a warp call it. Lane 0 has the sums and the target, and only its result is
/// valid.
template <class T>
RW_DEVICE RowGradient loss_of_row(const LossGradCall& call, int64_t i, const Row<T>& row, const Partial& sums, const Target& target, bool writes,
                                  const Softcap& softcap, ProgramRegisters& program) {
    RowStats s{};
    if (thread_index() % 32 == 0) s = finish(sums, target, row.temperature, row.scale);
    const RowLoss l = evaluate(call, i, s, program.values);
    if (thread_index() % 32 != 0) return {};
    if (writes) put_row(call, i, s, l);
    const Derivatives<float> d{l.d_logp, l.d_entropy, 0.0f, l.d_p_sq, s.logp, s.entropy, s.log_sum_p_sq};
    const bool full = softcap.on || call.reads_p_sq;
    return row_gradient(d, row.temperature, row.scale, origin_of(sums, row.scale, full), target, full);
}

}  // namespace
}  // namespace reweight_ops
