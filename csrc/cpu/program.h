// A loss program for one row after another: the table of common/program_table.h, as the sweeps of a row need it.
#pragma once

#include <cstring>

#include "common/primitives.h"
#include "common/program_table.h"

namespace reweight_ops {
namespace {

/// The program of a call, with everything computed that is the same for every row.
class LossEvaluator {
public:
    explicit LossEvaluator(const LossGradCall& call) : call_(call) { fill_uniform<1>(call.table, call.params, uniform_); }

    /// From the row's statistics to its loss and the coefficients of its gradient.
    RowLoss operator()(int64_t i, const RowStats& s) const {
        const ProgramTable& table = call_.table;
        float registers[kMaxRegisters];
        std::memcpy(registers, uniform_, table.inputs * sizeof(float));
        // What was not given, nothing reads; of log_ratio the program computes its own.
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
