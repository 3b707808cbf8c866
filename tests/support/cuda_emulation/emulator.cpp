// The fibers and their schedules. Fibers start with makecontext and then switch with
// setjmp/longjmp, which make no system call.
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace reweight_ops::emulation {

Launch* launch_now = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;

std::mutex one_at_a_time;
Schedule schedule = Schedule::eager;
uint64_t schedule_seed = 0;
Device the_device{0, 1, 1 << 20, 9, 227 << 10};
int the_clusters = 2;
int forced_status = 0;
std::string error_text;
std::vector<char*> stacks;  // reused by later launches

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack = nullptr;
size_t main_stack_size = 0;
#endif

/// Switches from a fiber to the scheduler. Returns when the scheduler resumes the fiber.
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
    --launch_now->running->block->running;
    suspend(true);
}

void resume(Fiber* fiber) {
    launch_now->running = fiber;
    fiber->ready = nullptr;
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
    launch_now->running = nullptr;
}

bool can_go_on(const Fiber& f) { return !f.done && (!f.ready || f.ready(f, f.waits_for, f.value)); }

void meet(Meeting& meeting, const char* reason) {
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    wait_until([](const Fiber&, const void* on, uint64_t value) { return static_cast<const Meeting*>(on)->generation != value; }, &meeting, generation, reason);
}

void add_block(Launch& l, const Shape& shape, int64_t index) {
    l.blocks.push_back(std::make_unique<Block>());
    Block& block = *l.blocks.back();
    block.rank = int(l.blocks.size()) - 1;
    block.index = index;
    block.running = shape.threads;
    block.fixed.assign(kStaticShared, kPoison);
    block.dynamic_bytes = size_t(shape.shared_bytes);
    block.store.assign(block.dynamic_bytes + 128, kPoison);
    block.dynamic = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.store.data()) + 127) / 128 * 128);
    block.unfenced.assign(block.dynamic_bytes / 16 + 1, -1);
    block.all.size = shape.threads;
    block.warps.resize(size_t((shape.threads + kWarp - 1) / kWarp));
    for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].size = std::min(kWarp, shape.threads - int(w) * kWarp);
    for (int t = 0; t < shape.threads; ++t) {
        const size_t stack = l.fibers.size();
        if (stacks.size() <= stack) {
            stacks.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
        }
        l.fibers.push_back(std::make_unique<Fiber>());
        l.fibers.back()->thread = {t, index, shape.blocks, 0};
        l.fibers.back()->block = &block;
        l.fibers.back()->stack = stacks[stack];
    }
}

void prioritize(Launch& l, std::vector<Fiber*>& order) {
    const uint64_t by = l.random() % 3;
    std::unordered_map<int64_t, uint64_t> keys;
    for (Fiber* f : order) {
        const int64_t who = by == 0 ? f->block->rank : by == 1 ? f->block->rank * 1024 + f->thread.index / kWarp : f->block->rank * 1024 + f->thread.index;
        const auto found = keys.find(who);
        f->priority = found != keys.end() ? found->second : (keys[who] = l.random());
    }
    std::stable_sort(order.begin(), order.end(), [](Fiber* a, Fiber* b) { return a->priority < b->priority; });
}

void check_end(Launch& l, const Fiber& f) {
    if (f.block->running) return;
    for (const Copy& c : l.copies) {
        if (c.block == f.block && !(c.kind == Copy::out && c.read)) l.error = "block " + std::to_string(f.block->index) + " ended before a copy of its shared memory";
    }
}

/// Runs one cluster to its end. Returns false and sets an error if it cannot.
bool run_cluster(Launch& l, const Shape& shape, int64_t first_block) {
    l.fibers.clear();
    l.blocks.clear();
    l.copies.clear();
    for (int rank = 0; rank < shape.cluster; ++rank) add_block(l, shape, first_block + rank);
    l.cluster = Meeting();
    l.cluster.size = shape.threads * shape.cluster;
    std::vector<Fiber*> order;
    for (auto& fiber : l.fibers) order.push_back(fiber.get());
    if (l.schedule == Schedule::late) std::reverse(order.begin(), order.end());
    if (l.schedule == Schedule::skew) prioritize(l, order);
    while (!order.empty()) {
        bool progress = false, ended = false;
        if (l.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), l.random);
        for (Fiber* fiber : order) {
            if (!can_go_on(*fiber)) continue;
            resume(fiber);
            if (fiber->done) check_end(l, *fiber);
            if (!l.error.empty()) return false;
            ended |= fiber->done;
            progress = true;
            if (l.schedule == Schedule::random && l.random() % 16 == 0) advance_any();
            if (l.schedule == Schedule::skew) break;  // again the first that can continue
        }
        if (l.schedule == Schedule::skew && progress && l.random() % 256 == 0) advance_any();
        if (l.schedule == Schedule::skew && l.random() % 4096 == 0) prioritize(l, order);
        if (ended) order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
        if (!progress && l.copies.empty()) {
            const Fiber& f = *order[0];
            l.error = "deadlock: thread " + std::to_string(f.thread.index) + " of block " + std::to_string(f.block->index) + " waits at " + f.reason;
        }
        if (!progress) advance_any();
        if (!l.error.empty()) return false;
    }
    while (!l.copies.empty()) advance_any();
    return l.error.empty();
}

}  // namespace

void wait_until(bool (*ready)(const Fiber&, const void*, uint64_t), const void* on, uint64_t value, const char* reason) {
    Fiber& f = *launch_now->running;
    const bool already = ready(f, on, value);
    if (already && (launch_now->schedule == Schedule::eager || launch_now->random() % 8)) return;  // some still yield
    f.ready = ready;
    f.waits_for = on;
    f.value = value;
    f.reason = reason;
    suspend(false);
}

const Thread& current() { return launch_now->running->thread; }

void* shared_memory(size_t bytes) {
    size_t& offset = launch_now->running->thread.shared_offset;
    if (offset + bytes > kStaticShared) fail("more than 48 KiB of shared memory");
    void* at = launch_now->running->block->fixed.data() + offset;
    offset += (bytes + 15) / 16 * 16;
    return at;
}

unsigned char* dynamic_shared_memory() { return launch_now->running->block->dynamic; }
int rank_in_cluster() { return launch_now->running->block->rank; }

void barrier_of_block() { meet(launch_now->running->block->all, "a barrier"); }
void barrier_of_cluster() { meet(launch_now->cluster, "a barrier of the cluster"); }

Meeting& own_warp() { return launch_now->running->block->warps[size_t(launch_now->running->thread.index / kWarp)]; }
void barrier_of_warp() { meet(own_warp(), "a barrier of its warp"); }

/// The values of the warp's threads, in each of them.
const float* bring(float value, const char* reason) {
    Meeting& warp = own_warp();
    float* values = warp.values[warp.generation % 2];
    values[launch_now->running->thread.index % kWarp] = value;
    meet(warp, reason);
    return values;
}

float exchange(float value, int lanes) { return bring(value, "a shuffle")[launch_now->running->thread.index % kWarp ^ lanes]; }
float take(float value, int lane) { return bring(value, "a shuffle")[lane]; }
uint32_t vote(bool holds) {
    const float* const values = bring(holds ? 1.0f : 0.0f, "a vote");
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) bits |= uint32_t(values[lane] != 0.0f) << lane;
    return bits;
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

void set_device(int major, int shared_bytes, int clusters) {
    the_device.major = major;
    the_device.shared_bytes = shared_bytes;
    the_clusters = clusters;
}

void set_status(int status) { forced_status = status; }

std::string last_error() { return error_text; }

Device device() { return the_device; }
int clusters() { return the_clusters; }

int run(const Shape& shape, Body body, const void* kernel, const void* call) {
    if (forced_status) return forced_status;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Launch l{};
    l.body = body;
    l.kernel = kernel;
    l.call = call;
    l.schedule = schedule;
    l.random.seed(schedule_seed);
    launch_now = &l;
    bool over = true;
    for (int64_t block = 0; block < shape.blocks && over; block += shape.cluster) over = run_cluster(l, shape, block);
    error_text = l.error;
    launch_now = nullptr;
    return over ? 0 : 719;  // "launch failed" of CUDA
}

}  // namespace reweight_ops::emulation
