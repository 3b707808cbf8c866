// The fibers and their schedules. Fibers start by makecontext and then switch by setjmp/longjmp, which make no system call.
#include "platform.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace reweight_ops::emulation {
namespace {

constexpr size_t kStack = 256 << 10, kSharedMemory = 48 << 10;
constexpr int kWarp = 32;

/// A rendezvous of `size` threads, and the values they bring: two sets, for a fast thread may be one rendezvous ahead.
struct Meeting {
    int size = 0, arrived = 0;
    uint64_t generation = 0;
    float values[2][kWarp];
};

struct Fiber {
    Thread thread;
    jmp_buf state;
    ucontext_t context;
    char* stack;
    bool started = false, done = false;
    Meeting* at = nullptr;       // waits there,
    uint64_t generation = 0;     // while this generation lasts
    const char* reason = "";
    uint64_t priority = 0;

    bool ready() const { return !done && (!at || at->generation != generation); }
};

struct Launch {
    Body body;
    const void *kernel, *call;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Meeting> warps;
    Meeting block;
    std::vector<unsigned char> shared;
    Fiber* running = nullptr;
    jmp_buf scheduler;
    std::string error;
};

enum class Schedule { eager, late, random, skew };

std::mutex one_at_a_time;
Launch* launch_now = nullptr;
Schedule schedule = Schedule::eager;
uint64_t schedule_seed = 0;
int forced_status = 0;
std::string error_text;
std::vector<char*> stacks;  // reused by later launches

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack = nullptr;
size_t main_stack_size = 0;
#endif

/// From a fiber back to the scheduler. Returns when the scheduler resumes the fiber.
void suspend(bool forever) {
    Fiber* self = launch_now->running;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake, main_stack, main_stack_size);
#else
    (void)forever;
#endif
    if (!_setjmp(self->state)) _longjmp(launch_now->scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &main_stack, &main_stack_size);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
    launch_now->body(launch_now->kernel, launch_now->call);
    launch_now->running->done = true;
    suspend(true);
}

void resume(Fiber* fiber) {
    launch_now->running = fiber;
    fiber->at = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack, kStack);
#endif
    if (!_setjmp(launch_now->scheduler)) {
        if (fiber->started) _longjmp(fiber->state, 1);
        fiber->started = true;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = kStack;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        setcontext(&fiber->context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void meet(Meeting& meeting, const char* reason) {
    Fiber* self = launch_now->running;
    self->generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    self->at = &meeting;
    self->reason = reason;
    suspend(false);
}

/// Runs one block to its end. False and an error if it cannot get there.
bool run_block(Launch& l, int threads, int64_t index, int64_t blocks, std::mt19937_64& random) {
    l.fibers.clear();
    l.warps.assign(size_t((threads + kWarp - 1) / kWarp), Meeting());
    for (size_t w = 0; w < l.warps.size(); ++w) l.warps[w].size = std::min(kWarp, threads - int(w) * kWarp);
    l.block = Meeting();
    l.block.size = threads;
    std::fill(l.shared.begin(), l.shared.end(), 0xff);  // NaN in every float
    for (int t = 0; t < threads; ++t) {
        if (stacks.size() <= size_t(t)) {
            stacks.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
        }
        l.fibers.push_back(std::make_unique<Fiber>());
        l.fibers[t]->thread = {t, index, blocks, 0};
        l.fibers[t]->stack = stacks[t];
    }
    std::vector<Fiber*> order;
    for (auto& fiber : l.fibers) order.push_back(fiber.get());
    if (schedule == Schedule::late) std::reverse(order.begin(), order.end());
    const auto prioritize = [&] {
        const bool by_warp = random() % 2;
        std::vector<uint64_t> keys(l.fibers.size());
        for (uint64_t& key : keys) key = random();
        for (Fiber* f : order) f->priority = keys[by_warp ? f->thread.index / kWarp : f->thread.index];
        std::stable_sort(order.begin(), order.end(), [](Fiber* a, Fiber* b) { return a->priority < b->priority; });
    };
    if (schedule == Schedule::skew) prioritize();
    while (!order.empty()) {
        bool progress = false;
        if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random);
        for (Fiber* fiber : order) {
            if (!fiber->ready()) continue;
            resume(fiber);
            if (!l.error.empty()) return false;
            progress = true;
            if (schedule == Schedule::skew) break;  // the first that can go on, again
        }
        if (schedule == Schedule::skew && random() % 4096 == 0) prioritize();
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
        if (!progress) {
            l.error = "deadlock: thread " + std::to_string(order[0]->thread.index) + " of block " + std::to_string(index) + " waits at " + order[0]->reason;
            return false;
        }
    }
    return true;
}

}  // namespace

const Thread& current() { return launch_now->running->thread; }

void* shared_memory(size_t bytes) {
    size_t& offset = launch_now->running->thread.shared_offset;
    if (offset + bytes > kSharedMemory) fail("more than 48 KiB of shared memory");
    void* at = launch_now->shared.data() + offset;
    offset += (bytes + 15) / 16 * 16;
    return at;
}

void barrier_of_block() { meet(launch_now->block, "a barrier"); }

float exchange(float value, int lanes) {
    const int lane = launch_now->running->thread.index % kWarp;
    Meeting& warp = launch_now->warps[size_t(launch_now->running->thread.index / kWarp)];
    float* values = warp.values[warp.generation % 2];
    values[lane] = value;
    meet(warp, "a shuffle");
    return values[lane ^ lanes];
}

void fail(const std::string& what) {
    launch_now->error = what + ", thread " + std::to_string(launch_now->running->thread.index);
    suspend(true);
    std::abort();
}

void set_schedule(const std::string& name, uint64_t seed) {
    const char* names[] = {"eager", "late", "random", "skew"};
    const auto found = std::find(names, names + 4, name);
    if (found == names + 4) throw std::invalid_argument("schedule " + name);
    schedule = static_cast<Schedule>(found - names);
    schedule_seed = seed;
}

void set_status(int status) { forced_status = status; }

std::string last_error() { return error_text; }

int processors() { return 1; }

int run(int64_t blocks, int threads, Body body, const void* kernel, const void* call) {
    if (forced_status) return forced_status;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Launch l{};
    l.body = body;
    l.kernel = kernel;
    l.call = call;
    l.shared.resize(kSharedMemory);
    launch_now = &l;
    std::mt19937_64 random(schedule_seed);
    int status = 0;
    for (int64_t block = 0; block < blocks && !status; ++block) {
        if (!run_block(l, threads, block, blocks, random)) status = 719;  // "launch failed" of CUDA
    }
    error_text = l.error;
    launch_now = nullptr;
    return status;
}

}  // namespace reweight_ops::emulation
