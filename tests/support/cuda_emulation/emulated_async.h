// Clusters, barriers in shared memory and bulk copies, on the CPU: see csrc/cuda/asynchronous.h.
//
// A copy moves its bytes when the schedule says so: at once (eager), when nothing else can continue (late) or at any time.
// Until a copy into shared memory is complete, its destination is NaN. A copy out reads its source late, and reads NaN
// where a thread has written without the proxy fence. The order in which other blocks see writes without a barrier is
// not modeled.
#pragma once

#define RW_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared_memory()

namespace reweight_ops {
namespace emulation {

unsigned char* dynamic_shared_memory();
int rank_in_cluster();
void barrier_of_cluster();

void initialize(const Barrier* b, int arrivals);
void arrive(const Barrier* b, int bytes);
void wait(const Barrier* b, int parity);
void send(Vector v, void* to, const Barrier* on, int rank);
void copy_in(void* shared, const void* global, int bytes, const Barrier* on);
void copy_out(void* global, const void* shared, int bytes);
/// Waits until all but the thread's last `pending` copies out have been read, or are complete.
void wait_for_copies(int pending, bool complete);
/// Records that the thread has written here. Copies do not see it before the thread's next fence.
void written_to_shared(const void* p, int bytes);
void proxy_fence();

}  // namespace emulation

inline int cluster_rank() { return emulation::rank_in_cluster(); }
inline void cluster_barrier() { emulation::barrier_of_cluster(); }
inline void initialize(Barrier& b, int arrivals) { emulation::initialize(&b, arrivals); }
inline void publish_barriers() {}
inline void arrive(Barrier& b) { emulation::arrive(&b, 0); }
inline void arrive_expecting(Barrier& b, int bytes) { emulation::arrive(&b, bytes); }
inline void wait(const Barrier& b, int parity) { emulation::wait(&b, parity); }
inline void wait_for_cluster(const Barrier& b, int parity) { emulation::wait(&b, parity); }
inline void send(Vector v, void* to, Barrier& on, int rank) { emulation::send(v, to, &on, rank); }
inline uint64_t evict_first() { return 0; }
inline uint64_t evict_normal() { return 0; }
inline uint64_t evict_last() { return 0; }
inline uint64_t evict_unchanged() { return 0; }
inline void bulk_load(void* shared, const void* global, int bytes, Barrier& on, uint64_t) { emulation::copy_in(shared, global, bytes, &on); }
inline void bulk_store(void* global, const void* shared, int bytes, uint64_t) { emulation::copy_out(global, shared, bytes); }
template <int N>
void wait_group_read() {
    emulation::wait_for_copies(N, false);
}
template <int N>
void wait_group() {
    emulation::wait_for_copies(N, true);
}
inline void release(Barrier& b) {
    warp_barrier();
    if (thread_index() % 32 == 0) arrive(b);
}
inline void release_written(Barrier& b) {
    emulation::proxy_fence();
    release(b);
}
inline void store16(void* p, Vector v, uint64_t) { store16(p, v); }
inline void prefetch(const void*) {}

inline Vector load_shared(const Vector* p) { return load16(p); }
inline void store_shared(Vector* p, Vector v) {
    store16(p, v);
    emulation::written_to_shared(p, 16);
}
template <class T>
void store_shared(T* p, T v) {
    *p = v;
    emulation::written_to_shared(p, sizeof(T));
}

}  // namespace reweight_ops
