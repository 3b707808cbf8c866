// The ids of a row's largest logits, found beside its sums: from a block of columns while the block is in the first cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "primitives.h"
#include "simd.h"

namespace reweight_ops {
namespace {

/// The `count` largest logits of the columns seen so far. Of equal ones, as -0 and 0 are, the lowest column; NaN is above all, as in torch.topk.
///
/// Candidates gather in room for several times `count`; when it is full, a selection leaves `count`, and the least of them bounds what may still
/// come in. So even an ascending row, in which every column is a candidate, costs a few steps a column.
template <class T>
class TopIds {
public:
    explicit TopIds(int count) : count_(count), full_(count * 4) {}

    /// Whether a block with this largest logit holds none of them.
    bool is_above(float top) const { return bounded_ && top <= bound_; }

    /// The columns from `begin` on, `n` of them, at `x`. Blocks come in the order of columns.
    __attribute__((noinline)) void see(const T* x, int64_t begin, int64_t n) {
        if (begin == 0) bound_by_groups(x, n);
        Vec a, b;
        for (int64_t i = 0; i < n; i += 2 * kWidth) {
            const bool whole = i + 2 * kWidth <= n;
            if (whole) {
                load2(x + i, a, b);
            } else {
                load2_partial(x + i, n - i, a, b);
            }
            const VecI out_a = a <= splat(bound_), out_b = b <= splat(bound_);
            if (bounded_ && !any(~(out_a & out_b))) continue;
            constexpr int kStep = kInterleaved<T> ? 2 : 1;
            take(a, out_a, kStep, begin + i, begin + n);
            take(b, out_b, kStep, begin + i + (kInterleaved<T> ? 1 : kWidth), begin + n);
            if (size_ >= full_) keep_largest();  // between two pairs: what equals the new bound in the next one comes later
        }
    }

    /// The ids, largest logit first; at least `count` columns were seen.
    void write(int64_t* ids, int64_t first_id) {
        std::partial_sort(keys_, keys_ + count_, keys_ + size_, std::greater<uint64_t>());
        for (int i = 0; i < count_; ++i) ids[i] = first_id + int32_t(~uint32_t(keys_[i]));
    }

private:
    static constexpr int kGroups = 16 * kWidth;
    static constexpr uint32_t kNaNOrder = UINT32_MAX, kSign = 1u << 31;

    /// Numbers in the order of logits, and of columns from the last to the first.
    static uint64_t key_of(float logit, int64_t column) {
        const uint32_t bits = bit_cast<uint32_t>(logit + 0.0f);  // -0 becomes 0
        const uint32_t order = logit != logit ? kNaNOrder : bits & kSign ? ~bits : bits | kSign;
        return uint64_t(order) << 32 | uint32_t(~uint32_t(column));
    }
    static float logit_of(uint64_t key) {
        const uint32_t order = uint32_t(key >> 32);
        return order == kNaNOrder ? kNaN : bit_cast<float>(order & kSign ? order ^ kSign : ~order);
    }

    /// A bound from the first columns: of groups of 8, `count` have a largest logit that is not below the bound.
    void bound_by_groups(const T* x, int64_t n) {
        float tops[kGroups] = {};
        int groups = 0;
        Vec a, b;
        for (int64_t i = 0; i + 8 * kWidth <= n && groups < kGroups; i += 8 * kWidth, groups += kWidth) {
            Vec top = splat(-kInf);
            for (int64_t j = i; j < i + 8 * kWidth; j += 2 * kWidth) {
                load2(x + j, a, b);
                top = max(top, max(a, b));
            }
            store(tops + groups, select(top == top, top, splat(-kInf)));
        }
        if (groups < count_) return;
        std::nth_element(tops, tops + count_ - 1, tops + groups, std::greater<float>());
        const float least = tops[count_ - 1];
        if (std::isinf(least)) return;
        bound_ = least - std::fmax(std::fabs(least) * 1e-6f, 1e-30f);  // below it: what equals it is in
        bounded_ = true;
    }

    /// Those of a vector that are not `out`; lane k is column `first` + `step`·k, if that is below `end`.
    void take(Vec v, VecI out, int step, int64_t first, int64_t end) {
        float lanes[kWidth];
        store(lanes, v);
        for (uint32_t left = bounded_ ? ~lane_bits(out) & ((1u << kWidth) - 1) : (1u << kWidth) - 1; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            const int64_t column = first + step * lane;
            if (column < end) keys_[size_++] = key_of(lanes[lane], column);
        }
    }

    void keep_largest() {
        std::nth_element(keys_, keys_ + count_ - 1, keys_ + size_, std::greater<uint64_t>());
        size_ = count_;
        bound_ = logit_of(keys_[count_ - 1]);
        bounded_ = true;
    }

    const int count_, full_;
    int size_ = 0;
    bool bounded_ = false;
    float bound_ = -kInf;
    uint64_t keys_[kMostTop * 4 + 2 * kWidth];
};

}  // namespace
}  // namespace reweight_ops
