#include "rows.h"

#include <algorithm>
#include <limits>

#include "common/verbs.h"

namespace reweight_ops {
namespace {

int64_t sequences_of(int64_t rows, int64_t run) { return (rows + run - 1) / run; }

/// Calls `f(i, element)` for the first `count` elements of sequence `s`.
template <class T, class F>
void each(const RowNumbers& from, int64_t s, int64_t count, const F& f) {
    const T* const first = (const T*)from.data + s * from.sequence_stride;
    for (int64_t i = 0; i < count; ++i) f(i, first[i * from.step]);
}

/// Calls `f(i, whether it is not 0)`.
template <class F>
void each_truth(const RowNumbers& from, int64_t s, int64_t count, const F& f) {
    const auto of = [&](auto zero) {
        using T = decltype(zero);
        const T sign = from.is_signed ? T(T(1) << (8 * sizeof(T) - 1)) : T(0);
        each<T>(from, s, count, [&](int64_t i, T x) { f(i, (x & T(~sign)) != 0); });
    };
    switch (from.bytes) {
        case 1: return of(uint8_t());
        case 2: return of(uint16_t());
        case 4: return of(uint32_t());
        default: return of(uint64_t());
    }
}

}  // namespace

std::pair<int64_t, int64_t> mask_rows(const MaskCall& call) {
    const int64_t sequences = sequences_of(call.rows, call.run);
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t begin = s * call.run, count = std::min(call.run, call.rows - begin);
        int64_t* const ids = call.out_ids + begin;
        bool* const keep = call.keep + begin;
        const auto put = [&](int64_t i, int64_t id) { ids[i] = id; };
        call.ids.bytes == 4 ? each<int32_t>(call.ids, s, count, put) : each<int64_t>(call.ids, s, count, put);
        if (call.mask.data) {
            each_truth(call.mask, s, count, [&](int64_t i, bool in) { ids[i] = in ? ids[i] : kOut; });
        }
        int32_t kept = 0, counted = 0;
        for (int64_t i = 0; i < count; ++i) {
            keep[i] = ids[i] != kOut;
            kept += keep[i];
            low = std::min(low, keep[i] ? ids[i] : low);
            high = std::max(high, keep[i] ? ids[i] : high);
        }
        if (call.counted) {
            each_truth(call.denominator, s, count, [&](int64_t i, bool in) {
                call.counted[begin + i] = in;
                counted += in;
            });
        }
        call.lengths[s] = kept;
        call.lengths[sequences + s] = call.counted ? counted : kept;
    }
    return low > high ? std::pair<int64_t, int64_t>{0, -1} : std::pair<int64_t, int64_t>{low, high};
}

void weigh_rows(const WeighCall& call) {
    const int64_t sequences = sequences_of(call.rows, call.run);
    const int32_t* const lengths = call.lengths + sequences;
    float whole = 1.0f;
    if (call.divide == Divide::by_value) {
        whole /= call.divisor;
    } else if (call.divide != Divide::by_nothing) {
        int64_t count = 0;
        for (int64_t s = 0; s < sequences; ++s) count += call.divide == Divide::by_rows ? lengths[s] : lengths[s] > 0;
        whole /= float(std::max<int64_t>(count, 1));
    }
    for (int64_t s = 0; s < sequences; ++s) {
        float w = call.per_length ? whole / float(std::max(lengths[s], 1)) : whole;
        w = w / call.horizon * call.scale;
        const int64_t begin = s * call.run, end = std::min(begin + call.run, call.rows);
        for (int64_t i = begin; i < end; ++i) {
            call.out[i] = !call.keep[i] ? 0.0f : call.factor ? w * call.factor[i] : w;
            for (int k = 1; k < call.terms; ++k) call.out[k * call.rows + i] = call.keep[i] ? w : 0.0f;
        }
    }
}

}  // namespace reweight_ops
