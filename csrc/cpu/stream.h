// A probe of this machine's memory bandwidth, for the benchmarks.
#pragma once

#include "parallel.h"
#include "primitives.h"
#include "simd.h"

namespace reweight_ops {
namespace {

/// One pass over n floats in equal parts per thread, with the widest loads and stores of this
/// level. `flush` drops them from every cache.
inline void stream(Stream kind, float* a, float* b, int64_t n, int threads) {
    constexpr int64_t kStep = 8 * kWidth;
    const int64_t steps = n / kStep;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t id = omp_get_thread_num(), parts = omp_get_num_threads();
#else
        const int64_t id = 0, parts = 1;
        (void)threads;
#endif
        const Vec grow = splat(1.0000001f);
        Vec seen = splat(-kInf);
        for (int64_t i = steps * id / parts * kStep, end = steps * (id + 1) / parts * kStep; i < end; i += kStep) {
            for (int64_t j = i; j < i + kStep; j += kWidth) {
                if (kind == Stream::read) seen = max(seen, load(a + j));
                if (kind == Stream::update) store(a + j, load(a + j) * grow);
                if (kind == Stream::copy) store(b + j, load(a + j));
#if defined(__x86_64__)
                if (kind == Stream::flush) _mm_clflush(a + j);
#endif
            }
        }
        if (largest(seen) == 1.2345e30f) a[0] = 0.0f;  // never true; it keeps the compiler from removing the reads
    }
}

}  // namespace
}  // namespace reweight_ops
