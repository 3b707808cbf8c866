// A call's rows rather than its logits: which of them are in, and what each weighs. What PyTorch does in a dozen operations is one pass.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/primitives.h"

namespace reweight_ops {

/// Where numbers of a `[sequences, run]` tensor are, in elements. Null data: not given.
struct RowNumbers {
    const void* data;
    int64_t sequence_stride, step;
    int bytes;       // of an element
    bool is_signed;  // its highest bit is a sign, of which 0 may have either: floating point
};

/// Which rows are in. `ids` are int32 or int64; a row is ignored if its id is kIgnoreIndex, or its mask 0.
struct MaskCall {
    RowNumbers ids, mask, denominator;
    int64_t run, rows;
    int64_t* out_ids;
    bool *keep, *counted;  // counted: null without a denominator, which is then keep
    int32_t* lengths;      // [2, sequences]: rows that are in, and that count
};

/// Returns the least and the largest id of the rows that are in; (0, -1) without any.
std::pair<int64_t, int64_t> mask_rows(const MaskCall& call);

enum class Divide : int { by_nothing = 0, by_value = 1, by_rows = 2, by_sequences = 3 };

/// `out [terms, rows]`: `1 / divisor / the sequence's length / horizon * scale`, in term 0 times `factor`; 0 where a row is out.
struct WeighCall {
    const bool* keep;
    const int32_t* lengths;
    int64_t run, rows;
    Divide divide;
    float divisor;
    bool per_length;
    float horizon, scale;  // 1: none
    const float* factor;   // or null
    int terms;
    float* out;
};

void weigh_rows(const WeighCall& call);

/// What a row has of an argument: where it is, in floats; `data` null: not given, and constant where `is_number`.
struct RowArgument {
    int64_t sequence_stride, step;
    bool is_given, is_number;
};

/// A one-pass loss, all but its tensors: rows, weights and loss in one call. `inputs`: advantages, stored log-probs of the old, the reference and the
/// sampling policy, and two factors of the weights.
struct OnePass {
    static constexpr int kInputs = 6, kStored = 4;
    LossGradCall loss;
    MaskCall mask;
    WeighCall weigh;
    std::array<RowArgument, kInputs> inputs;
    std::vector<float> params;

    /// Where its parts are in a buffer of bytes.
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
    char* buffer;  // of the layout's size, aligned to 8
    float* table;  // [6, rows]
    void* out;
    RowStrides out_strides;
    int threads;
};

/// Fills the buffer; false, and nothing else is done, if the id of a row that is in is none of `loss.vocab_size`. Then `loss` does the rest.
bool fill_rows(OnePass& call, const OnePassValues& values);

}  // namespace reweight_ops
