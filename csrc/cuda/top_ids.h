// The ids of a row's largest logits, found beside its sums: from vectors while they are in registers.
//
// Each warp keeps the largest logits of the columns that it sweeps, without waiting for another warp. Candidates gather behind
// them in shared memory; when the warp's room is full, a sort leaves the largest, and the least of them bounds what may still come
// in. At the end of a row, a key's place is the number of larger ones in the lists of all warps.
#pragma once

#include "common/primitives.h"
#include "statistics.h"

namespace reweight_ops {
namespace {

/// The keys of all warps of a block. A key is a logit in its order, then the column from the last to the first; 0 is no key.
constexpr int kKeys = 2 * kMostTop;
using TopKeys = uint64_t[kWarps][kKeys];

/// What a sweep without ids calls instead of TopIds.
struct NoIds {
    template <class T>
    RW_DEVICE void see_tile(const Vector (&)[kUnroll], int, int, int, const Sweep&) {}
    template <class T>
    RW_DEVICE void see_tail(const T*, int) {}
    RW_DEVICE void sort() {}
};

/// A warp's search. All lanes call every function but write(), and have the same state. Of equal logits, as -0 and 0 are, the
/// lowest column is the largest; NaN is above all.
class TopIds {
public:
    /// `keys` of the warp. Between a sort and the last key of a full room there is a candidate of each lane.
    RW_DEVICE TopIds(uint64_t* keys, int count) : keys_(keys), count_(count), room_(64) {
        while (room_ < 2 * count) room_ *= 2;
    }

    /// The warp's vectors of a tile, of which `sums` has been told. Vector u is vector `at` + u·kThreads of a slice of `vectors`, which
    /// begins at column `begin`.
    template <class T>
    RW_DEVICE void see_tile(const Vector (&v)[kUnroll], int at, int vectors, int begin, const Sweep& sums) {
        // A warp's columns ascend from tile to tile, so that what equals the bound is out. A NaN is in the sum for the rest of the row.
        if (!ballot(largest<T>(v) > least_ || bound_ == 0 || sums.sum != sums.sum)) return;
#pragma unroll 1
        for (int u = 0; u < kUnroll; ++u, at += kThreads) see<T>(select(v, u), begin + at * kPerVector<T>, at < vectors ? kPerVector<T> : 0);
    }

    /// The columns after the last whole vector, one per thread of the first warp.
    template <class T>
    RW_DEVICE void see_tail(const T* x, int columns) {
        if (thread_index() >= 32 || columns % kPerVector<T> == 0) return;
        const int tail = tail_of<T>(thread_index(), columns);
        Vector v{};
        if (tail >= 0) v.words[0] = sizeof(T) == 4 ? as_bits(widen(x[tail])) : first_word(x[tail]);
        see<T>(v, tail, tail >= 0);
    }

    /// Leaves the largest keys, largest first, and zeros where there are fewer.
    RW_DEVICE void sort() {
        const int lane = thread_index() % 32;
        int n = 32;
        while (n < size_) n *= 2;
        for (int i = size_ + lane; i < room_; i += 32) keys_[i] = 0;
        warp_barrier();
#pragma unroll 1
        for (int run = 2; run <= n; run *= 2) {
#pragma unroll 1
            for (int step = run / 2; step; step /= 2) {
                for (int i = lane; i < n / 2; i += 32) {
                    const int a = 2 * i - (i & (step - 1)), b = a + step;
                    const uint64_t x = keys_[a], y = keys_[b];
                    if ((x < y) == ((a & run) == 0)) {
                        keys_[a] = y;
                        keys_[b] = x;
                    }
                }
                warp_barrier();
            }
        }
        if (size_ < count_) return;
        size_ = count_;
        bound_ = keys_[count_ - 1];
        least_ = logit_of(bound_);
    }

    /// Writes the ids that this thread knows the places of. Every warp has sorted, and a barrier of the block was since then.
    RW_DEVICE void write(const TopKeys& all, int64_t* ids, int64_t first_id) const {
        const int warp = thread_index() / 32;
        for (int k = thread_index() % 32; k < count_; k += 32) {
            const uint64_t key = keys_[k];
            int place = key ? k : count_;
            for (int other = 0; other < kWarps && place < count_; ++other) {
                if (other != warp) place += larger_than(key, all[other]);
            }
            if (place < count_) ids[place] = first_id + int32_t(~uint32_t(key));
        }
    }

private:
    static constexpr uint32_t kNaNOrder = 0xffffffffu, kSign = 0x80000000u;

    RW_DEVICE static uint64_t key_of(float logit, int column) {
        const uint32_t bits = as_bits(logit + 0.0f);  // -0 becomes 0
        const uint32_t order = logit != logit ? kNaNOrder : bits & kSign ? ~bits : bits | kSign;
        return uint64_t(order) << 32 | uint32_t(~uint32_t(column));
    }
    RW_DEVICE static float logit_of(uint64_t key) {
        const uint32_t order = uint32_t(key >> 32);
        return order == kNaNOrder ? kNaN : as_float(order & kSign ? order ^ kSign : ~order);
    }

    template <class T>
    RW_DEVICE static uint32_t first_word(T x) {
        if constexpr (sizeof(T) == 2) return x.bits;
        return 0;
    }
    /// v[u], without the address of a register.
    RW_DEVICE static Vector select(const Vector (&v)[kUnroll], int u) {
        Vector out = v[0];
#pragma unroll
        for (int k = 1; k < kUnroll; ++k) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out.words[j] = u == k ? v[k].words[j] : out.words[j];
        }
        return out;
    }
    template <class T>
    RW_DEVICE static float element(const Vector& v, int j) {
        const int at = sizeof(T) == 4 ? j : j / 2;
        uint32_t word = v.words[0];
#pragma unroll
        for (int k = 1; k < 4; ++k) word = at == k ? v.words[k] : word;
        if constexpr (sizeof(T) == 4) {
            return as_float(word);
        } else {
            return widen(T{uint16_t(j % 2 ? word >> 16 : word)});
        }
    }

    /// Each lane has a vector whose first `valid` elements are columns from `first` on. In each turn it brings one candidate.
    template <class T>
    RW_DEVICE void see(const Vector& v, int first, int valid) {
        float x[kPerVector<T>];
        unpack<T>(v, x);
        uint32_t mine = 0;
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j) mine |= uint32_t(!(x[j] < least_)) << j;
        mine &= (1u << valid) - 1;
#pragma unroll 1
        for (uint32_t lanes = ballot(mine); lanes; lanes = ballot(mine)) {
            const int j = lowest_bit(mine);
            const uint64_t key = mine ? key_of(element<T>(v, j), first + j) : 0;
            mine &= mine - 1;
            if (size_ + count_bits(lanes) > room_) sort();
            const bool in = key > bound_;
            const uint32_t votes = ballot(in);
            if (in) keys_[size_ + count_bits(votes & ((1u << (thread_index() % 32)) - 1))] = key;
            size_ += count_bits(votes);
        }
    }

    RW_DEVICE int larger_than(uint64_t key, const uint64_t (&sorted)[kKeys]) const {
        int low = 0, high = count_;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (sorted[middle] > key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    uint64_t* const keys_;
    const int count_;
    int room_, size_ = 0;
    uint64_t bound_ = 0;   // keys up to this one are out
    float least_ = -kInf;  // so are logits below this one
};

}  // namespace
}  // namespace reweight_ops
