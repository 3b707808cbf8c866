// Barriers in shared memory, and copies that take time.
#include <algorithm>

#include "fibers.h"

namespace reweight_ops::emulation {
namespace {

Fiber& self() { return *launch_now->running; }

void end_phase_if_over(BarrierState& b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.arrivals;
}

/// Called by the scheduler when the bytes have arrived.
void count_bytes(Block& block, size_t barrier, int bytes) {
    const auto found = block.barriers.find(barrier);
    if (found == block.barriers.end()) {
        launch_now->error = "a copy counts on a barrier that was not initialized";
        return;
    }
    found->second.bytes -= bytes;
    end_phase_if_over(found->second);
}

BarrierState& own_barrier(const Barrier* barrier) {
    Block& block = *self().block;
    const auto found = block.barriers.find(block.offset(barrier, sizeof(Barrier)));
    if (found == block.barriers.end()) fail("a barrier is used before it is initialized");
    return found->second;
}

void check_copy(const void* a, const void* b, int bytes) {
    if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | uintptr_t(bytes)) & 15) fail("a bulk copy of addresses or a size not a multiple of 16");
    if (bytes <= 0) fail("a bulk copy of nothing");
}

void start(Copy copy) {
    launch_now->copies.push_back(std::move(copy));
    if (launch_now->schedule == Schedule::eager) {
        while (!launch_now->copies.empty()) advance(0);
    }
}

}  // namespace

size_t Block::offset(const void* p, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < dynamic || at + bytes > dynamic + dynamic_bytes) fail("outside of the block's shared memory");
    return size_t(at - dynamic);
}

void initialize(const Barrier* b, int arrivals) { self().block->barriers[self().block->offset(b, sizeof(Barrier))] = {arrivals, arrivals, 0, 0}; }

void arrive(const Barrier* barrier, int bytes) {
    BarrierState& b = own_barrier(barrier);
    if (b.pending == 0) fail("more arrivals at a barrier than it counts");
    --b.pending;
    b.bytes += bytes;
    end_phase_if_over(b);
}

void wait(const Barrier* barrier, int parity) {
    const BarrierState* b = &own_barrier(barrier);
    wait_until([](const Fiber&, const void* on, uint64_t value) { return (static_cast<const BarrierState*>(on)->phase & 1) != value; }, b, uint64_t(parity),
               "a barrier in shared memory");
}

void send(Vector v, void* to, const Barrier* on, int rank) {
    Block& here = *self().block;
    if (rank < 0 || size_t(rank) >= launch_now->blocks.size()) fail("a message to a block that is not in the cluster");
    Block& there = *launch_now->blocks[size_t(rank)];
    Copy copy{Copy::message, nullptr, there.dynamic + here.offset(to, 16), 16, &there, here.offset(on, sizeof(Barrier)), &self(), 0, false, {}};
    copy.between.assign(reinterpret_cast<unsigned char*>(&v), reinterpret_cast<unsigned char*>(&v) + 16);
    start(std::move(copy));
}

void copy_in(void* shared, const void* global, int bytes, const Barrier* on) {
    check_copy(shared, global, bytes);
    Block& block = *self().block;
    const size_t offset = block.offset(shared, size_t(bytes));
    std::memset(shared, kPoison, size_t(bytes));
    std::fill_n(block.unfenced.begin() + long(offset / 16), bytes / 16, -1);
    auto* from = static_cast<unsigned char*>(const_cast<void*>(global));
    start({Copy::in, from, static_cast<unsigned char*>(shared), bytes, &block, block.offset(on, sizeof(Barrier)), &self(), 0, false, {}});
}

void copy_out(void* global, const void* shared, int bytes) {
    check_copy(global, shared, bytes);
    self().block->offset(shared, size_t(bytes));
    auto* from = static_cast<unsigned char*>(const_cast<void*>(shared));
    Copy copy{Copy::out, from, static_cast<unsigned char*>(global), bytes, self().block, 0, &self(), 0, false, {}};
    copy.number = self().copies_out++;
    start(std::move(copy));
}

void wait_for_copies(int pending, bool complete) {
    const auto all_but_last = [](const Fiber& f, const void* whole, uint64_t last) {
        return std::none_of(launch_now->copies.begin(), launch_now->copies.end(), [&](const Copy& c) {
            return c.kind == Copy::out && c.owner == &f && c.number < f.copies_out - int(last) && !(c.read && !whole);
        });
    };
    wait_until(all_but_last, complete ? launch_now : nullptr, uint64_t(pending), "its copies out");
}

void written_to_shared(const void* p, int bytes) {
    Block& block = *self().block;
    const size_t vector = block.offset(p, size_t(bytes)) / 16;
    block.unfenced[vector] = self().thread.index;
    self().written.push_back(vector);
}

void proxy_fence() {
    for (const size_t vector : self().written) {
        int& writer = self().block->unfenced[vector];
        if (writer == self().thread.index) writer = -1;
    }
    self().written.clear();
}

void advance(size_t index) {
    Copy& copy = launch_now->copies[index];
    if (copy.kind == Copy::out && !copy.read) {
        copy.between.assign(copy.from, copy.from + copy.bytes);
        const size_t first = size_t(copy.from - copy.block->dynamic) / 16;
        for (int i = 0; i < copy.bytes / 16; ++i) {
            if (copy.block->unfenced[first + size_t(i)] >= 0) std::memset(copy.between.data() + 16 * i, kPoison, 16);
        }
        copy.read = true;
        return;
    }
    Copy done = std::move(copy);
    launch_now->copies.erase(launch_now->copies.begin() + long(index));
    std::memcpy(done.to, done.kind == Copy::in ? done.from : done.between.data(), size_t(done.bytes));
    if (done.kind != Copy::out) count_bytes(*done.block, done.barrier, done.bytes);
}

void advance_any() {
    if (!launch_now->copies.empty()) advance(launch_now->random() % launch_now->copies.size());
}

}  // namespace reweight_ops::emulation
