// Masks and weights of a call's rows. One pass does what takes PyTorch a dozen operations.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/primitives.h"

namespace reweight_ops {

/// The layout of a `[sequences, run]` tensor, in elements. Null data means that it is not given.
struct RowNumbers {
    const void* data;
    int64_t sequence_stride, step;
    int bytes;       // per element
    bool is_signed;  // floating point: the highest bit is a sign, and 0 has two signs
};

/// How rows form sequences: runs of `length` rows, of which the last may be shorter, or packed
/// ones, whose row i is in sequence `index[i]`. `count` there marks a row of no sequence.
struct Runs {
    int64_t rows, count, length;
    const int64_t* index;  // null if the sequences are runs

    int64_t of(int64_t row) const { return index ? index[row] : row / length; }
};

/// Selects the rows of the loss. `ids` are int32 or int64, or 0 everywhere if not given. A row is
/// ignored if its id is kIgnoreIndex, its mask is 0, or it is in no sequence. Strides of packed
/// rows are those of one run.
struct MaskCall {
    RowNumbers ids, mask, denominator;
    Runs runs;
    int64_t* out_ids;
    bool *keep, *counted;  // counted is null without a denominator; keep then serves for it
    int32_t* lengths;      // [2, sequences]: the kept and the counted rows of each
};

/// Returns the smallest and the largest id of the kept rows; (0, -1) if there are none.
std::pair<int64_t, int64_t> mask_rows(const MaskCall& call);

/// Makes one sequence of all sequences of a prompt. `ids` are `[1, sequences]`, int32 or int64. An
/// id outside of `[0, prompts)` is `prompts`: the sequence is of no prompt.
struct RegroupCall {
    RowNumbers ids;
    const int32_t* lengths;  // [2, sequences]
    Runs runs;
    int64_t prompts;
    int64_t *prompt_of, *index;  // [sequences], [rows]: their prompts
    int32_t* out_lengths;        // [2, prompts]
};

void regroup_rows(const RegroupCall& call);

/// Fills `sums [sequences]` with those of the kept rows' `weight`. They are rounded once.
struct MeasureCall {
    const float* weight;
    const bool* keep;
    Runs runs;
    float* sums;
};

void measure_rows(const MeasureCall& call);

enum class Divide : int { by_nothing = 0, by_value = 1, by_rows = 2, by_sequences = 3 };

/// Fills `out [terms, rows]` with `weight / divisor / the sequence's length / horizon * scale`, in
/// term 0 times `factor`. It is 0 where a row is ignored. Without `weight` it is 1, and lengths count.
struct WeighCall {
    const bool* keep;
    const void* lengths;  // [sequences]: float with a weight, else int32_t
    const float* weight;  // or null
    Runs runs;
    Divide divide;
    float divisor;
    bool per_length;
    float horizon, scale;  // 1 means none
    const float* factor;   // or null
    int terms;
    float* out;
};

void weigh_rows(const WeighCall& call);

/// An argument of rows: its address and stride, in floats. Null `data` means that it is not given,
/// and a constant where `is_number`.
struct RowArgument {
    int64_t sequence_stride, step;
    bool is_given, is_number;
};

/// A one-pass loss without its tensors: masks, weights and loss in one call. `inputs` are
/// advantages, stored log-probs of the old, the reference and the sampling policy, and two factors
/// of the weights.
struct OnePass {
    static constexpr int kInputs = 6, kStored = 4;
    LossGradCall loss;
    MaskCall mask;
    WeighCall weigh;
    std::array<RowArgument, kInputs> inputs;
    std::vector<float> params;

    /// Offsets of its parts in a buffer, in bytes.
    struct Layout {
        int64_t ids, weights, inputs, lengths, keep, counted, bytes;
    };
    Layout layout() const;
};

/// The tensors and numbers of one call.
struct OnePassValues {
    const void *logits, *ids, *mask, *denominator;
    std::array<const float*, OnePass::kInputs> inputs;
    std::array<float, OnePass::kInputs> numbers;
    float temperature, divisor, scale;
    char* buffer;  // has the layout's size, aligned to 8
    float* table;  // [6, rows]
    void* out;
    RowStrides out_strides;
    int threads;
};

/// Fills the buffer for `loss`. Returns false, and does nothing else, if the id of a kept row is
/// outside `loss.vocab_size`.
bool fill_rows(OnePass& call, const OnePassValues& values);

}  // namespace reweight_ops
