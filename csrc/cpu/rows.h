// A call's rows rather than its logits: which of them are in, and what each weighs. What PyTorch does in a dozen operations is one pass.
#pragma once

#include <cstdint>
#include <utility>

namespace reweight_ops {

/// Where numbers of a `[sequences, run]` tensor are, in elements. Null data: not given.
struct RowNumbers {
    const void* data;
    int64_t sequence_stride, step;
    int bytes;       // of an element
    bool is_signed;  // its highest bit is a sign, of which 0 may have either: floating point
};

/// Which rows are in. `ids` are int32 or int64; a row is out if its id is OUT, or its mask 0.
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

}  // namespace reweight_ops
