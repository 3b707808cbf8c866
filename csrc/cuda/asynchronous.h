// Clusters of blocks, barriers in shared memory and bulk copies of sm_90 and later. As with
// platform.h, g++ compiles the emulator's version.
#pragma once

#include "platform.h"

namespace reweight_ops {

/// A barrier in shared memory. It counts arrivals and the bytes of announced copies. A phase ends
/// when all of them have come. A wait names the parity of its phase, 0 for the first.
struct alignas(8) Barrier {
    uint64_t state;
};

}  // namespace reweight_ops

#if defined(__CUDACC__)

#define RW_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace reweight_ops {
namespace {

RW_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

RW_DEVICE int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
/// Waits for all threads of the cluster, and orders their earlier writes to shared memory.
RW_DEVICE void cluster_barrier() { asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory"); }

RW_DEVICE void initialize(Barrier& b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(arrivals) : "memory");
}
/// Call this after the last initialize() and before a barrier of the cluster. Other blocks and
/// copies may then use the barriers.
RW_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
RW_DEVICE void arrive(Barrier& b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&b)) : "memory"); }
RW_DEVICE void arrive_expecting(Barrier& b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)), "r"(bytes) : "memory");
}
/// Waits for arrivals of this block and for copies.
RW_DEVICE void wait(const Barrier& b, int parity) {
    uint32_t over;
    do {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(over)
                     : "r"(shared_address(&b)), "r"(parity)
                     : "memory");
    } while (!over);
}
/// Waits for what other blocks send.
RW_DEVICE void wait_for_cluster(const Barrier& b, int parity) {
    uint32_t over;
    do {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(over)
                     : "r"(shared_address(&b)), "r"(parity)
                     : "memory");
    } while (!over);
}

/// Sends v to block `rank` of the cluster, at the address that `to` has in this block. It counts as
/// 16 bytes on that block's `on`.
RW_DEVICE void send(Vector v, void* to, Barrier& on, int rank) {
    uint32_t there, barrier_there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier_there) : "r"(shared_address(&on)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3]), "r"(barrier_there)
                 : "memory");
}

// Hints for the L2 cache. A policy accompanies a load or a store.
#define RW_POLICY(name)                                                                    \
    RW_DEVICE uint64_t name() {                                                            \
        uint64_t policy;                                                                   \
        asm volatile("createpolicy.fractional.L2::" #name ".b64 %0, 1.0;" : "=l"(policy)); \
        return policy;                                                                     \
    }
RW_POLICY(evict_first)
RW_POLICY(evict_normal)
RW_POLICY(evict_last)
RW_POLICY(evict_unchanged)
#undef RW_POLICY

/// Addresses and size are multiples of 16 bytes. `on` counts the bytes as they arrive.
RW_DEVICE void bulk_load(void* shared, const void* global, int bytes, Barrier& on, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(&on)), "l"(policy)
        : "memory");
}
/// Each store is a group by itself, for the two waits below.
RW_DEVICE void bulk_store(void* global, const void* shared, int bytes, uint64_t policy) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;\n\tcp.async.bulk.commit_group;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes), "l"(policy)
                 : "memory");
}
/// Waits until all but the thread's last N bulk stores have read their shared memory.
template <int N>
RW_DEVICE void wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
/// Waits until all but the thread's last N bulk stores are complete.
template <int N>
RW_DEVICE void wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

/// One arrival for a warp whose threads have read a slot. A bulk load may then fill it.
RW_DEVICE void release(Barrier& b) {
    warp_barrier();
    if (thread_index() % 32 == 0) arrive(b);
}
/// One arrival for a warp whose threads have written what a bulk store reads next. The fence, the
/// warp's barrier and the arrival belong together: without the fence, a bulk store may read the old
/// contents.
RW_DEVICE void release_written(Barrier& b) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    release(b);
}

/// Like store16, with a policy.
RW_DEVICE void store16(void* p, Vector v, uint64_t policy) {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(v.words[0]), "r"(v.words[1]),
                 "r"(v.words[2]), "r"(v.words[3]), "l"(policy)
                 : "memory");
}
/// Prefetches a cache line that a thread reads soon.
RW_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

RW_DEVICE Vector load_shared(const Vector* p) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return {v.x, v.y, v.z, v.w};
}
RW_DEVICE void store_shared(Vector* p, Vector v) { *reinterpret_cast<uint4*>(p) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]); }
template <class T>
RW_DEVICE void store_shared(T* p, T v) {
    *p = v;
}

}  // namespace
}  // namespace reweight_ops

#else
#include "emulated_async.h"
#endif
