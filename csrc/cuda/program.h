// Evaluates a loss program for one row with the lanes of a warp. The lanes share the operations of a level. Registers are
// in shared memory.
//
// bench/NOTES.md has the model of its time. A lane fetches its instruction of the next level before it has the operands of
// this one.
#pragma once

#include "common/primitives.h"
#include "partial.h"

namespace reweight_ops {
namespace {

struct ProgramRegisters {
    float values[kMaxSharedRegisters];
};

/// The result of an instruction. Lanes that diverge wait for each other, so that each lane computes
/// every cheap operation and keeps its own.
RW_DEVICE float compute(Operation operation, float a, float b, float c) {
    using Real = float;
    float result = 0.0f;
#define RW_KEEP(name, text, value) result = operation == Operation::name ? float(value) : result;
    RW_CHEAP_OPERATIONS(RW_KEEP)
#undef RW_KEEP
    if (operation <= Operation::where) return result;
    switch (operation) {
#define RW_CASE(name, text, value) \
    case Operation::name: return value;
        RW_COSTLY_OPERATIONS(RW_CASE)
#undef RW_CASE
        default: return kNaN;
    }
}

/// Runs levels [from, to) with all lanes of a warp. The first level begins at instruction `begin`.
RW_DEVICE void run_levels(const ProgramTable& table, int from, int to, int begin, float* registers) {
    const int lane = thread_index() % 32;
    if (from >= to) return;
    int end = int(table.ends[from]);
    uint64_t next = begin + lane < end ? table.code[begin + lane] : 0;
    for (int level = from; level < to; ++level) {
        const uint64_t first = next;
        const int following = level + 1 < to ? int(table.ends[level + 1]) : end;
        if (end + lane < following) next = table.code[end + lane];
        for (int k = begin + lane; k < end; k += 32) {
            const uint64_t word = k < begin + 32 ? first : table.code[k];
            const auto at = [&](int shift) -> float& { return registers[word >> shift & (kMaxRegisters - 1)]; };
            at(8) = compute(static_cast<Operation>(word & 0xff), at(20), at(32), at(44));
        }
        warp_barrier();
        begin = end;
        end = following;
    }
}

/// Computes what is the same for every row. All lanes of a warp call it before the warp's first
/// row.
RW_DEVICE void prepare_program(const LossGradCall& call, float* registers) {
    const ProgramTable& table = call.table;
    const int lane = thread_index() % 32;
    for (int i = lane; i < table.parameters; i += 32) registers[i] = call.params[i];
    for (int i = lane; i < table.constant_count; i += 32) registers[table.parameters + i] = float(table.constants[i]);
    warp_barrier();
    run_levels(table, 0, table.uniform_levels, 0, registers);
}

/// Computes a row's loss and the derivatives of its gradient from the statistics, which lane 0 has.
/// All lanes of a warp call it, and must synchronize before they call it for the next row.
RW_DEVICE RowLoss evaluate(const LossGradCall& call, int64_t i, const RowStats& s, float* registers) {
    const ProgramTable& table = call.table;
    const int lane = thread_index() % 32;
    float* const inputs = registers + table.inputs;
    // Nothing reads an input that is not given. The program computes log_ratio itself.
    const float* const stored[] = {call.old_logp, call.ref_logp, call.sampling_logp, call.adv};
    constexpr int places[] = {kOldLogp, kRefLogp, kSamplingLogp, kAdv};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (lane == k + 1 && stored[k]) inputs[places[k]] = stored[k][i];
    }
    for (int k = lane - 5; k < table.terms; k += 27) {
        if (k >= 0) inputs[kLeaves + k] = call.row_weights[k * call.row_weights_step + i];
    }
    if (lane == 0) {
        inputs[kLogp] = s.logp;
        if (!call.old_logp) inputs[kOldLogp] = s.logp;
        inputs[kEntropy] = s.entropy;
        inputs[kLogSumPSq] = s.log_sum_p_sq;
    }
    warp_barrier();
    run_levels(table, table.uniform_levels, table.levels, table.uniform, registers);
    const int* const out = table.outputs;
    return {registers[out[0]], registers[out[1]], registers[out[2]], registers[out[3]], registers[out[4]]};
}

}  // namespace
}  // namespace reweight_ops
