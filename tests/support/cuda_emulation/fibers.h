// Shared by emulator.cpp (fibers and schedules) and asynchronous.cpp (barriers in shared memory,
// copies).
#pragma once

#include <ucontext.h>

#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "asynchronous.h"

namespace reweight_ops::emulation {

constexpr size_t kStaticShared = 48 << 10;
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype

/// A rendezvous of `size` threads, and the values that they bring. It has two sets, because a fast
/// thread may be one rendezvous ahead.
struct Meeting {
    int size = 0, arrived = 0;
    uint64_t generation = 0;
    float values[2][kWarp];
};

struct BarrierState {
    int arrivals, pending;
    int64_t bytes;  // announced and not yet arrived; negative if they arrived before they were announced
    uint64_t phase;
};

struct Block {
    int rank;
    int64_t index;
    int running;  // threads
    std::vector<unsigned char> fixed, store;
    unsigned char* dynamic;  // in store, aligned
    size_t dynamic_bytes;
    Meeting all;
    std::vector<Meeting> warps;
    std::unordered_map<size_t, BarrierState> barriers;  // by their offset in dynamic
    std::vector<int> unfenced;                          // for each 16 bytes of dynamic: the thread whose write copies do not see yet, or -1

    size_t offset(const void* p, size_t bytes);
};

struct Fiber {
    Thread thread;
    Block* block;
    jmp_buf state;
    ucontext_t context;
    char* stack;
    bool started = false, done = false;
    bool (*ready)(const Fiber&, const void*, uint64_t) = nullptr;  // null: the fiber does not wait
    const void* waits_for = nullptr;
    uint64_t value = 0;
    const char* reason = "";
    uint64_t priority = 0;
    std::vector<size_t> written;  // what it has written since its last fence
    int copies_out = 0;
};

struct Copy {
    enum { in, out, message } kind;
    unsigned char *from, *to;
    int bytes;
    Block* block;     // whose shared memory is read or written
    size_t barrier;   // of in and message
    Fiber* owner;
    int number = 0;   // of out
    bool read = false;
    std::vector<unsigned char> between;
};

enum class Schedule { eager, late, random, skew };

struct Launch {
    Body body;
    const void *kernel, *call;
    Schedule schedule;
    std::mt19937_64 random;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Copy> copies;
    Meeting cluster;
    Fiber* running = nullptr;  // null: the scheduler runs
    jmp_buf scheduler;
    std::string error;
};

extern Launch* launch_now;

/// Suspends the running fiber until ready(it, on, value).
void wait_until(bool (*ready)(const Fiber&, const void*, uint64_t), const void* on, uint64_t value, const char* reason);
/// One step of a copy.
void advance(size_t copy);
void advance_any();

}  // namespace reweight_ops::emulation
