// Interpreter of a loss program: operations on numbered registers. It runs on host and device, in float and double.
//
// reweight_ops/_core/formula/table.py builds the table. Registers hold parameters, constants, values that depend on those
// alone ("uniform", computed once per call), a row's leaves and row weights, and intermediate values.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace reweight_ops {

/// Every operation of a table, in the order of its codes: its name, its name in the graph, and what
/// it computes from the operands a, b, c. A condition is 1 or 0. Cheap operations come first.
#define RW_CHEAP_OPERATIONS(X)        \
    X(add, "add", a + b)              \
    X(sub, "sub", a - b)              \
    X(mul, "mul", (a * b))            \
    X(min, "min", rw_min(a, b))       \
    X(max, "max", rw_max(a, b))       \
    X(clip, "clip", rw_clip(a, b, c)) \
    X(abs, "abs", rw_abs(a))          \
    X(lt, "lt", Real(a < b))          \
    X(le, "le", Real(a <= b))         \
    X(eq, "eq", Real(a == b))         \
    X(ne, "ne", Real(a != b))         \
    X(where, "where", a != 0 ? b : c)
#define RW_COSTLY_OPERATIONS(X)          \
    X(div, "div", a / b)                 \
    X(exp, "exp", rw_exp(a))             \
    X(expm1, "expm1", rw_expm1(a))       \
    X(log, "log", rw_log(a))             \
    X(log1p, "log1p", rw_log1p(a))       \
    X(sigmoid, "sigmoid", rw_sigmoid(a)) \
    X(tanh, "tanh", rw_tanh(a))
#define RW_OPERATIONS(X) RW_CHEAP_OPERATIONS(X) RW_COSTLY_OPERATIONS(X)

enum class Operation : int {
#define RW_CODE(name, text, value) name,
    RW_OPERATIONS(RW_CODE)
#undef RW_CODE
};

constexpr int kMaxRegisters = 1 << 12;
constexpr int kMaxSharedRegisters = 320;  // limit where registers are in a GPU's shared memory

/// The order of a row's inputs: LEAVES of reweight_ops/_core/formula/base.py. Row weights follow
/// them.
enum Leaf { kLogp, kOldLogp, kLogRatio, kRefLogp, kSamplingLogp, kAdv, kEntropy, kLogSumPSq, kLeaves };

constexpr int kLossOutputs = 5;
/// The row's contribution to the loss, its loss without row weights, and the derivatives of the
/// total by logp (also through the ratio), entropy and log_sum_p_sq.
struct RowLoss {
    float weighted_loss, loss, d_logp, d_entropy, d_p_sq;
};

/// An instruction is one word: 8 bits of code, then 12 bits for each register: the result, a, b and
/// c.
struct ProgramTable {
    const uint64_t* code;     // uniform instructions come first
    const double* constants;  // follow the code
    const int64_t* ends;      // follow the constants: the end of each level
    int parameters, constant_count, uniform_levels, levels, uniform, instructions, inputs, terms, registers;
    int outputs[kLossOutputs];
};

/// Runs instructions on kRows rows at once. Register i of row j is registers[i * kRows + j].
template <int kRows, class Real>
RW_HD inline void run_instructions(const uint64_t* code, int count, Real* registers) {
    for (int i = 0; i < count; ++i) {
        const uint64_t word = code[i];
        const auto at = [&](int shift) { return registers + ((word >> shift) & (kMaxRegisters - 1)) * kRows; };
        Real* const out = at(8);
        const Real *const pa = at(20), *const pb = at(32), *const pc = at(44);
        switch (static_cast<Operation>(word & 0xff)) {
#define RW_CASE(name, text, value)                      \
    case Operation::name:                               \
        for (int j = 0; j < kRows; ++j) {               \
            const Real a = pa[j], b = pb[j], c = pc[j]; \
            (void)a, (void)b, (void)c;                  \
            out[j] = value;                             \
        }                                               \
        break;
            RW_OPERATIONS(RW_CASE)
#undef RW_CASE
        }
    }
}

/// Computes the registers before a row's inputs. Their values are the same for every row of a call.
template <int kRows, class Real>
RW_HD inline void fill_uniform(const ProgramTable& table, const Real* params, Real* registers) {
    const auto put = [&](int i, Real value) {
        for (int j = 0; j < kRows; ++j) registers[i * kRows + j] = value;
    };
    for (int i = 0; i < table.parameters; ++i) put(i, params[i]);
    for (int i = 0; i < table.constant_count; ++i) put(table.parameters + i, Real(table.constants[i]));
    run_instructions<kRows>(table.code, table.uniform, registers);
}

}  // namespace reweight_ops
