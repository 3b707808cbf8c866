// token_loss_grad with the row on chip, for sm_90 and later: a logit is read once and its gradient written once.
//
// A persistent cluster of blocks works on one row after another, each block on its slice. The shared memory of a block is a ring of tiles,
// filled by bulk copies that run across the ends of rows as far ahead as the ring allows. In a block,
//   the mover's thread    copies logits in, and gradients out where logits were, tile by tile;
//   8 computing warps     sweep statistics of a row, then the gradient of the row before it, in place: S(0) S(1) G(0) S(2) G(1) ...
//   the evaluator's warp  exchanges sums with the other blocks, evaluates the row's rules and gives the gradient its constants, meanwhile.
// Every wait is on a barrier in shared memory; after the start no barrier is for all threads.
//
// Sums are added in the order of slices.h, and the rest is the streaming kernel's own code: both give the same bits.
// Compiled once per dtype, with RW_ELEMENT and RW_DTYPE naming it.
#include "ring.h"

#include "dispatch.h"

namespace reweight_ops {
namespace {

// ---- the mover

/// The tiles of a block, in order.
struct Walk {
    int64_t row;
    int tile = 0;
    Turn turn;

    RW_DEVICE explicit Walk(int64_t first) : row(first) {}
    RW_DEVICE void next(const Call& call, const Share& share, int tiles) {
        turn.next(tiles);
        if (++tile < share.tiles) return;
        tile = 0;
        row = share.from(call, row + share.clusters);
    }
};

template <class T>
RW_DEVICE void move_tiles(const RingCall& call, const Share& share, const Ring& ring) {
    if (share.tiles == 0) return;
    const uint64_t policy = evict_first();
    const int64_t first = share.from(call, share.cluster);
    const auto column = [&](const Walk& w) { return (share.begin + int64_t(w.tile) * kTileVectors) * kPerVector<T>; };
    const auto load_next = [&](Walk& in) {
        if (in.row >= call.rows) return;
        const int bytes = share.tile_vectors(in.tile) * 16;
        Barrier& full = ring.full(in.turn.index);
        arrive_expecting(full, bytes);
        copy_in(ring.tile(in.turn.index), static_cast<const T*>(call.logits) + call.strides.offset(in.row) + column(in), bytes, full, policy);
        in.next(call, share, ring.tiles);
    };
    Walk in(first), out(first);
    for (int i = 0; i < ring.tiles; ++i) load_next(in);
    for (bool refill = false; out.row < call.rows; refill = true) {
        wait(ring.done(out.turn.index), out.turn.parity);
        copy_out(static_cast<T*>(call.out) + call.out_strides.offset(out.row) + column(out), ring.tile(out.turn.index), share.tile_vectors(out.tile) * 16, policy);
        if (refill) {  // the tile before this one
            wait_until_read_but_last();
            load_next(in);
        }
        out.next(call, share, ring.tiles);
    }
    wait_until_copied();
}

// ---- the evaluator

RW_DEVICE Vector as_vector(const Partial& s) { return {as_bits(s.top), as_bits(s.sum), as_bits(s.dot), as_bits(s.sum_sq)}; }
RW_DEVICE Partial as_partial(const Vector& v) { return {as_float(v.words[0]), as_float(v.words[1]), as_float(v.words[2]), as_float(v.words[3])}; }

template <class T>
RW_DEVICE void evaluate_rows(const RingCall& call, const Share& share, const Ring& ring) {
    const Softcap softcap(call.softcap);
    const int lane = thread_index() % 32;
    const auto skip = [&](int64_t i) {
        if (share.rank == 0 && lane == 0) put_invalid_row(call, i);
    };
    Turn turn;
    for (int64_t i = share.from(call, share.cluster, skip); i < call.rows; i = share.from(call, i + share.clusters, skip)) {
        Place& place = ring.place(turn.index);
        const Row<T> row(call, i);
        // The target's logit is read by the block that will overwrite it, and before anybody can: they wait for the message that has it.
        const int vector = row.target / kPerVector<T>;
        const int owner = vector < share.slices.vectors ? vector / share.slices.each : share.slices.count - 1;
        const float target = row.target >= 0 && owner == share.rank ? widen(row.x[row.target]) : -kInf;
        if (lane == 0) arrive_expecting(place.exchanged, share.slices.count * int(sizeof(Message)));
        wait(place.swept, turn.parity);
        const Partial own = merge_slice(place.partials, row.scale);
        if (lane < share.slices.count) {
            send(as_vector(own), &place.messages[share.rank].sums, place.exchanged, lane);
            send({as_bits(target)}, &place.messages[share.rank].target, place.exchanged, lane);
        }
        if (lane == 0) {
            wait_for_cluster(place.exchanged, turn.parity);
            Partial sums{-kInf, 0.0f, 0.0f, 0.0f};
            for (int slice = 0; slice < share.slices.count; ++slice) sums = merge(sums, as_partial(load_shared(&place.messages[slice].sums)), row.scale);
            const Target known = row.target < 0 ? Target() : Target(as_float(load_shared(&place.messages[owner].target).words[0]), softcap);
            place.gradient = loss_of_row(call, i, row, with_exact_top(sums, row.scale), known, share.rank == 0, softcap);
            place.target = row.target;
            arrive(place.ready);
        }
        warp_barrier();  // the others would wait for the next row's sums in this warp's time
        turn.next(kPlaces);
    }
}

// ---- the computing warps

template <class T, Sums kSums>
RW_DEVICE void sweep_row(const RingCall& call, const Share& share, const Ring& ring, int64_t i, Turn& tile, Place& place, const Softcap& softcap) {
    const Row<T> row(call, i);
    Partial s{-kInf, 0.0f, 0.0f, 0.0f};
    for (int t = 0; t < share.tiles; ++t) {
        const int end = share.tile_vectors(t);
        wait(ring.full(tile.index), tile.parity);
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int at = thread_index() + u * kThreads;
            v[u] = minus_infinities<T>();
            if (at < end) v[u] = load_shared(ring.tile(tile.index) + at);
        }
        if (thread_index() < end) absorb_tile<T, kSums>(s, v, row.scale, softcap);
        tile.next(ring.tiles);
    }
    if (share.is_last()) absorb_tail<T, kSums>(s, row.x, int(call.vocab_size), row.scale, softcap);
    s = merge_lanes<32>(s, row.scale);
    if (thread_index() % 32 == 0) {
        place.partials[thread_index() / 32] = s;
        arrive(place.swept);
    }
}

/// The gradient of a slice in the place of its logits. `target`: its column, or -1.
template <class T, Terms kTerms>
RW_DEVICE void write_tiles(const Share& share, const Ring& ring, Turn& tile, const RowGradient& g, int target, const Softcap& softcap) {
    constexpr int n = kPerVector<T>;
    for (int t = 0; t < share.tiles; ++t) {
        Vector* const vectors = ring.tile(tile.index);
        const int end = share.tile_vectors(t);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int at = thread_index() + u * kThreads;
            if (at >= end) continue;
            float values[n] = {};
            if constexpr (kTerms != Terms::fill) unpack<T>(load_shared(vectors + at), values);
#pragma unroll
            for (int j = 0; j < n; ++j) values[j] = gradient_of<kTerms>(values[j], g, softcap);
            store_shared(vectors + at, pack<T>(values));
        }
        const int in_tile = target < 0 ? -1 : target - (share.begin + t * kTileVectors) * n;
        if (in_tile >= 0 && in_tile < end * n && in_tile / n % kThreads == thread_index()) {
            T value;
            narrow(g.target, value);
            store_shared(reinterpret_cast<T*>(vectors) + in_tile, value);
        }
        release_to_copies(ring.done(tile.index));
        tile.next(ring.tiles);
    }
}

/// The columns that no copy brings: those after the last whole vector, and padding.
template <class T, Terms kTerms>
RW_DEVICE void write_tail(const RingCall& call, int64_t i, const RowGradient& g, int target, const Softcap& softcap) {
    const int vocab = int(call.vocab_size), tail = vocab / kPerVector<T> * kPerVector<T> + thread_index();
    T* const out = static_cast<T*>(call.out) + call.out_strides.offset(i);
    if (tail < vocab) {
        const T* const x = static_cast<const T*>(call.logits) + call.strides.offset(i);
        const float logit = kTerms == Terms::fill ? 0.0f : widen(x[tail]);
        narrow(tail == target ? g.target : gradient_of<kTerms>(logit, g, softcap), out[tail]);
    }
    for (int64_t column = vocab + thread_index(); column < call.columns; column += kThreads) narrow(0.0f, out[column]);
}

template <class T, bool kFull>
RW_DEVICE void write_row(const RingCall& call, const Share& share, const Ring& ring, int64_t i, Turn& tile, Place& place, int parity, const Softcap& softcap) {
    wait(place.ready, parity);
    const RowGradient g = place.gradient;
    const int target = place.target;
    const auto write = [&](auto terms) {
        constexpr Terms kTerms = decltype(terms)::value;
        write_tiles<T, kTerms>(share, ring, tile, g, target, softcap);
        if (share.is_last()) write_tail<T, kTerms>(call, i, g, target, softcap);
    };
    if (g.terms == Terms::fill) {
        write(std::integral_constant<Terms, Terms::fill>());
    } else if constexpr (kFull) {
        write(std::integral_constant<Terms, Terms::full>());
    } else if (g.terms == Terms::entropy) {
        write(std::integral_constant<Terms, Terms::entropy>());
    } else {
        write(std::integral_constant<Terms, Terms::plain>());
    }
}

/// A row that holds nothing to compute is not in the ring: zeros, written to memory.
template <class T>
RW_DEVICE void write_zeros(const RingCall& call, const Share& share, int64_t i) {
    T* const out = static_cast<T*>(call.out) + call.out_strides.offset(i);
    for (int at = thread_index(); at < share.vectors; at += kThreads) store16(out + (share.begin + int64_t(at)) * kPerVector<T>, Vector{});
    if (share.is_last()) write_tail<T, Terms::fill>(call, i, RowGradient{}, -1, Softcap(kInf));
}

template <class T, bool kFull>
RW_DEVICE void compute_rows(const RingCall& call, const Share& share, const Ring& ring) {
    const Softcap softcap(call.softcap);
    const auto skip = [&](int64_t i) { write_zeros<T>(call, share, i); };
    Turn swept, written, place, place_before;
    int64_t before = -1;
    for (int64_t i = share.from(call, share.cluster, skip);; i = share.from(call, i + share.clusters, skip)) {
        if (i < call.rows) sweep_row<T, kFull ? Sums::full : Sums::entropy>(call, share, ring, i, swept, ring.place(place.index), softcap);
        if (before >= 0) write_row<T, kFull>(call, share, ring, before, written, ring.place(place_before.index), place_before.parity, softcap);
        if (i >= call.rows) break;
        before = i;
        place_before = place;
        place.next(kPlaces);
    }
}

template <class T, bool kFull>
RW_KERNEL(kRingThreads, 1) ring_kernel(RW_PARAMETER RingCall call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    RW_DYNAMIC_SHARED(bytes);
    const Ring ring{bytes, call.tiles};
    const Share share(call, kPerVector<T>);
    const int warp = thread_index() / 32;
    if (thread_index() == 0) ring.initialize_barriers();
    cluster_barrier();
    if (warp < kWarps) {
        compute_rows<T, kFull>(call, share, ring);
    } else if (warp == kEvaluator) {
        evaluate_rows<T>(call, share, ring);
    } else if (thread_index() == kMover * 32) {
        move_tiles<T>(call, share, ring);
    }
    // No barrier at the end: whatever is sent to a block, it has waited for.
#endif
}

// ---- launches

using Kernel = void (*)(const RingCall);

Kernel kernel_for(const LossGradCall& call) { return call.reads_p_sq || call.softcap < kInf ? ring_kernel<RW_ELEMENT, true> : ring_kernel<RW_ELEMENT, false>; }

Shape shape(const LossGradCall& call, int tiles, int64_t clusters) {
    const int blocks = Slices(int(call.vocab_size) / kPerVector<RW_ELEMENT>).count;
    return {clusters * blocks, kRingThreads, blocks, tiles * kBytesPerTile + kBytesBesides};
}

int count_clusters(const LossGradCall& call, int tiles, int& count) { return active_clusters(kernel_for(call), shape(call, tiles, 1), call.device, count); }

int launch_loss_grad(const LossGradCall& call, int tiles, int64_t clusters) {
    RingCall ring{call, tiles};
    return launch(kernel_for(call), shape(call, tiles, call.rows < clusters ? call.rows : clusters), ring);
}

}  // namespace

#define RW_CONCAT_(a, b) a##b
#define RW_CONCAT(a, b) RW_CONCAT_(a, b)
const RingKernels RW_CONCAT(ring_, RW_DTYPE) = {count_clusters, launch_loss_grad};

}  // namespace reweight_ops
