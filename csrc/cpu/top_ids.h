// The ids of a row's largest logits, found beside its sums: from a block of columns while the block is in the first cache.
#pragma once

#include <algorithm>

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
    explicit TopIds(int count) : count_(count), room_(count * kRoom) {}

    /// Whether a block with this largest logit holds none of them.
    bool is_above(float top) const { return bounded_ && top <= bound_; }

    /// The columns from `begin` on, `n` of them, at `x`. Blocks come in the order of columns.
    __attribute__((noinline)) void see(const T* x, int64_t begin, int64_t n) {
        Vec a, b;
        for (int64_t i = 0; i < n; i += 2 * kWidth) {
            const bool whole = i + 2 * kWidth <= n;
            if (whole) {
                load2(x + i, a, b);
            } else {
                load2_partial(x + i, n - i, a, b);
            }
            if (!bounded_ || any(~(a <= splat(bound_)) | ~(b <= splat(bound_)))) take(a, b, begin + i, whole ? 2 * kWidth : n - i);
        }
    }

    /// The ids, largest logit first; at least `count` columns were seen.
    void write(int64_t* ids, int64_t first_id) {
        std::partial_sort(found_, found_ + count_, found_ + size_, before);
        for (int i = 0; i < count_; ++i) ids[i] = first_id + found_[i].column;
    }

private:
    static constexpr int kRoom = 4;

    struct Candidate {
        float logit;
        int32_t column;
    };
    static bool before(const Candidate& a, const Candidate& b) {
        const bool a_nan = a.logit != a.logit, b_nan = b.logit != b.logit;
        if (a_nan != b_nan) return a_nan;
        return a.logit > b.logit || (!(a.logit < b.logit) && a.column < b.column);
    }

    /// Of one pair of vectors, in the order of columns: a later one that equals the bound is out.
    void take(Vec a, Vec b, int64_t begin, int64_t n) {
        float lanes[2][kWidth];
        store(lanes[0], a);
        store(lanes[1], b);
        for (int64_t j = 0; j < n; ++j) {
            const float logit = kInterleaved<T> ? lanes[j % 2][j / 2] : lanes[j / kWidth][j % kWidth];
            if (bounded_ && logit <= bound_) continue;
            found_[size_++] = {logit, int32_t(begin + j)};
            if (size_ < room_) continue;
            std::nth_element(found_, found_ + count_ - 1, found_ + size_, before);
            size_ = count_;
            bound_ = found_[count_ - 1].logit;
            bounded_ = true;
        }
    }

    const int count_, room_;
    int size_ = 0;
    bool bounded_ = false;
    float bound_ = -kInf;
    Candidate found_[kMostTop * kRoom];
};

}  // namespace
}  // namespace reweight_ops
