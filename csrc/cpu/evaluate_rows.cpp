#include "evaluate_rows.h"

#include <vector>

namespace reweight_ops {
namespace {

/// Rows per pass over the instructions: enough to make the lookup of the next operation cheap in
/// comparison.
constexpr int kRows = 16;
/// Below this number of rows, waking another thread costs more than it saves.
constexpr int64_t kSerialRows = 2048;

template <class Real>
class RowsEvaluator {
public:
    explicit RowsEvaluator(const EvaluateCall<Real>& call) : call_(call), registers_(size_t(call.table.registers) * kRows) {
        fill_uniform<kRows>(call.table, call.params, registers_.data());
    }

    void operator()(int64_t begin) {
        const ProgramTable& table = call_.table;
        const int64_t left = call_.rows - begin;
        const int count = int(left < kRows ? left : kRows);
        Real* inputs = registers_.data() + size_t(table.inputs) * kRows;
        for (const Real* leaf : call_.leaves) load(inputs, leaf ? leaf + begin : nullptr, count);
        for (int k = 0; k < table.terms; ++k) load(inputs, call_.row_weights + k * call_.row_weights_step + begin, count);
        run_instructions<kRows>(table.code + table.uniform, table.instructions - table.uniform, registers_.data());
        for (int k = 0; k < call_.output_count; ++k) {
            const Real* const from = registers_.data() + size_t(call_.outputs[k]) * kRows;
            Real* const to = call_.out + k * call_.rows + begin;
            for (int j = 0; j < count; ++j) to[j] = call_.keep && !call_.keep[begin + j] ? Real(0) : from[j];
        }
    }

private:
    /// Nothing reads an input that is not given.
    static void load(Real*& inputs, const Real* from, int count) {
        for (int j = 0; j < kRows; ++j) inputs[j] = from && j < count ? from[j] : Real(RW_NAN);
        inputs += kRows;
    }

    const EvaluateCall<Real>& call_;
    std::vector<Real> registers_;
};

template <class Real>
void evaluate(const EvaluateCall<Real>& call) {
    const int64_t blocks = (call.rows + kRows - 1) / kRows;
    const int threads = call.rows < kSerialRows ? 1 : call.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        RowsEvaluator<Real> run(call);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) run(block * kRows);
    }
    (void)threads;
}

}  // namespace

void evaluate_rows(const EvaluateCall<float>& call) { evaluate(call); }
void evaluate_rows(const EvaluateCall<double>& call) { evaluate(call); }

}  // namespace reweight_ops
