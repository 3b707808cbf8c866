// Evaluates a loss program row by row with the table of common/program_table.h.
#pragma once

#include <cstring>

#include "common/primitives.h"
#include "common/program_table.h"

namespace reweight_ops {
namespace {

/// The program of a call. It computes everything that is the same for every row once.
class LossEvaluator {
public:
    explicit LossEvaluator(const LossGradCall& call) : call_(call) { fill_uniform<1>(call.table, call.params, uniform_); }

    /// Computes the row's loss and the derivatives of its gradient from the row's statistics.
    RowLoss operator()(int64_t i, const RowStats& s) const {
        const ProgramTable& table = call_.table;
        float registers[kMaxRegisters];
        std::memcpy(registers, uniform_, table.inputs * sizeof(float));
        // Nothing reads an input that is not given. The program computes log_ratio itself.
        const auto get = [i](const float* from, float otherwise) { return from ? from[i] : otherwise; };
        float* const inputs = registers + table.inputs;
        inputs[kLogp] = s.logp;
        inputs[kOldLogp] = get(call_.old_logp, s.logp);
        inputs[kLogRatio] = RW_NAN;
        inputs[kRefLogp] = get(call_.ref_logp, RW_NAN);
        inputs[kSamplingLogp] = get(call_.sampling_logp, RW_NAN);
        inputs[kAdv] = get(call_.adv, RW_NAN);
        inputs[kEntropy] = s.entropy;
        inputs[kLogSumPSq] = s.log_sum_p_sq;
        for (int k = 0; k < table.terms; ++k) inputs[kLeaves + k] = call_.row_weights[k * call_.row_weights_step + i];
        run_instructions<1>(table.code + table.uniform, table.instructions - table.uniform, registers);
        const int* const out = table.outputs;
        return {registers[out[0]], registers[out[1]], registers[out[2]], registers[out[3]], registers[out[4]]};
    }

private:
    const LossGradCall& call_;
    float uniform_[kMaxRegisters];
};

}  // namespace
}  // namespace reweight_ops
