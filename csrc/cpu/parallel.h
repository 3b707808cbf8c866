// One parallel region per call. Each thread takes a contiguous part of the rows.
//
// It uses OpenMP because PyTorch does: the same worker threads serve both, and no second pool competes with threads that
// still spin.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace reweight_ops {
namespace {

/// Below this number of elements, waking another thread costs more than it saves (about 30 us of
/// work).
constexpr int64_t kSerialElements = 1 << 16;
/// Elements of one chunk: few enough to balance threads, and enough to make taking a chunk cheap.
constexpr int64_t kChunkElements = 1 << 14;

/// The number of threads for a call over rows x columns, at most `wanted`. It is 1 inside another
/// parallel region.
inline int threads_for(int64_t rows, int64_t columns, int wanted) {
#ifdef _OPENMP
    if (wanted <= 1 || rows * columns < kSerialElements || omp_in_parallel()) return 1;
    return int(rows < wanted ? rows : wanted);
#else
    (void)rows, (void)columns, (void)wanted;
    return 1;
#endif
}

/// A run of chunks. Its owner takes from the front; idle threads take from the back.
class Run {
public:
    void reset(uint32_t begin, uint32_t end) { ends_.store(uint64_t(end) << 32 | begin, std::memory_order_relaxed); }

    /// Takes the next chunk from the front or from the back. Returns -1 if none is left.
    int64_t take(bool front) {
        uint64_t seen = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const uint32_t begin = uint32_t(seen), end = uint32_t(seen >> 32);
            if (begin >= end) return -1;
            const uint64_t left = front ? uint64_t(end) << 32 | (begin + 1) : uint64_t(end - 1) << 32 | begin;
            if (ends_.compare_exchange_weak(seen, left, std::memory_order_relaxed)) return front ? begin : end - 1;
        }
    }

private:
    alignas(64) std::atomic<uint64_t> ends_{0};
};

/// Calls body(row, next row) for each row. Every thread has a contiguous part, so that two threads
/// rarely touch one huge page (or fault it in and clear it in new memory). A thread that is done
/// helps the others: masked rows cost nothing and other rows a full sweep, and one busy core must
/// not delay the rest.
template <class Body>
void for_each_row(int64_t rows, int64_t columns, int threads, const Body& body) {
    if (threads <= 1) {
        for (int64_t i = 0; i < rows; ++i) body(i, i + 1);
        return;
    }
#ifdef _OPENMP
    constexpr int kMostThreads = 256;
    threads = threads < kMostThreads ? threads : kMostThreads;
    int64_t chunk = columns < kChunkElements ? kChunkElements / (columns > 0 ? columns : 1) : 1;
    while (rows / chunk >= int64_t(1) << 31) chunk *= 2;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    Run runs[kMostThreads];
    for (int t = 0; t < threads; ++t) runs[t].reset(uint32_t(chunks * t / threads), uint32_t(chunks * (t + 1) / threads));
#pragma omp parallel num_threads(threads)
    {
        const int self = omp_get_thread_num();
        const auto take = [&] {
            int64_t found = self < threads ? runs[self].take(true) : -1;
            for (int other = 1; found < 0 && other <= threads; ++other) found = runs[(self + other) % threads].take(false);
            return found;
        };
        for (int64_t now = take(); now >= 0;) {
            const int64_t following = take();  // taken early, to prefetch its first row
            const int64_t end = (now + 1) * chunk < rows ? (now + 1) * chunk : rows;
            for (int64_t i = now * chunk; i < end; ++i) body(i, i + 1 < end ? i + 1 : following < 0 ? rows : following * chunk);
            now = following;
        }
    }
#endif
}

}  // namespace
}  // namespace reweight_ops
