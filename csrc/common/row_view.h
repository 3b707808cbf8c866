// One row of a call in memory.
#pragma once

#include "common/primitives.h"

namespace reweight_ops {
namespace {

/// Column is the integer type that counts columns.
template <class T, class Column>
struct RowView {
    const T* x;
    float temperature;
    Column target;  // -1 if another shard has it

    RW_METHOD RowView(const Call& call, int64_t i) : RowView(call, i, call.ids[i], temperature_of(call, i)) {}
    RW_METHOD RowView(const Call& call, int64_t i, int64_t id, float t) : x(row_of<T>(call, i)), temperature(t) {
        const int64_t local = id - call.vocab_start;
        target = local < 0 || local >= call.vocab_size ? Column(-1) : Column(local);
    }
};

}  // namespace
}  // namespace reweight_ops
