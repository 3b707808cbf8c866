// One parallel region per call, rows handed out one chunk at a time.
//
// OpenMP, because PyTorch runs on it: the same worker threads serve both, and no second pool competes with threads that still spin.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace reweight_ops {
namespace {

/// Elements below which waking another thread costs more than it saves (about 30 us of work).
constexpr int64_t kSerialElements = 1 << 16;
/// Elements of one chunk: small enough to balance, large enough that taking one costs nothing.
constexpr int64_t kChunkElements = 1 << 14;

/// How many threads a call over rows x columns uses, at most `wanted`. One inside somebody else's parallel region.
inline int threads_for(int64_t rows, int64_t columns, int wanted) {
#ifdef _OPENMP
    if (wanted <= 1 || rows * columns < kSerialElements || omp_in_parallel()) return 1;
    return int(rows < wanted ? rows : wanted);
#else
    (void)rows, (void)columns, (void)wanted;
    return 1;
#endif
}

/// body(worker, row) for each row. Dynamic: masked rows cost nothing, others a full sweep, and a busy core must not hold up the rest.
template <class Body>
void for_each_row(int64_t rows, int64_t columns, int threads, const Body& body) {
    const int64_t chunk = columns < kChunkElements ? kChunkElements / (columns > 0 ? columns : 1) : 1;
    if (threads <= 1) {
        for (int64_t i = 0; i < rows; ++i) body(0, i, i + 1);
        return;
    }
#ifdef _OPENMP
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed); begin < rows;) {
        const int64_t following = next.fetch_add(chunk, std::memory_order_relaxed);
        const int64_t end = begin + chunk < rows ? begin + chunk : rows;
        for (int64_t i = begin; i < end; ++i) body(omp_get_thread_num(), i, i + 1 < end ? i + 1 : following);
        begin = following;
    }
#endif
}

}  // namespace
}  // namespace reweight_ops
