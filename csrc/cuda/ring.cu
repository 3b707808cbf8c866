// token_loss_grad with the row on chip, for sm_90 and later. It reads a logit once and writes its gradient once.
//
// A persistent cluster of blocks works on one row after another; each block has one slice of the row. The shared memory of
// a block is a ring of tiles. Bulk loads fill it across the ends of rows, as far ahead as the ring allows. In a block,
//   the load warp's thread  loads logits and stores gradients in their place, tile by tile;
//   8 computing warps       sweep the statistics of a row and write the gradient of the preceding row in place;
//   the rule warp           exchanges sums with the other blocks, evaluates the row's rules and provides the constants of
//                           the gradient at the same time.
// If a whole row fits ahead, the statistics of row k + 1 are complete before the gradient of row k: S(0) S(1) G(0) S(2)
// G(1) ... Otherwise the ring holds a row and the first n tiles of the next. The order is then S(k + 1) of those n tiles,
// G(k) without its last n tiles, S(k + 1) of its other tiles, and the rest of G(k): memory is busy while the blocks exchange
// the sums of row k + 1.
// Every wait is on a barrier in shared memory. After the start, no barrier spans all threads.
//
// Sums are added in the order of slices.h, and everything else is the streaming kernel's code: both give the same bits.
// The file is compiled once per dtype; RW_ELEMENT and RW_DTYPE name the dtype.
#include "ring.h"

#include "common/concat.h"
#include "dispatch.h"

namespace reweight_ops {
namespace {

// ---- the load warp

template <class T>
RW_DEVICE void move_tiles(const RingCall& call, const BlockSlice& slice, const Ring& ring) {
    if (slice.tiles == 0) return;
    const uint64_t loads = RW_RING_LOADS(), stores = RW_RING_STORED();
    const auto element = [&](const TileCursor& at) { return at.offset + (slice.begin + at.tile * kTileVectors) * int64_t(kPerVector<T>); };
    const auto load_next = [&](TileCursor& in) {
        if (!in.rows.more()) return;
        const int bytes = slice.tile_vectors(in.tile) * 16;
        Barrier& full = ring.full(in.state.index);
        arrive_expecting(full, bytes);
        bulk_load(ring.tile(in.state.index), static_cast<const T*>(call.logits) + element(in), bytes, full, loads);
        in.advance(call, slice, call.strides, ring.tiles);
    };
    TileCursor in(call, slice, call.strides), out(call, slice, call.out_strides);
    for (int i = 0; i < ring.tiles; ++i) load_next(in);
    for (int stored = 0; out.rows.more(); ++stored) {
        wait(ring.empty(out.state.index), out.state.phase);
        if constexpr (!kDirect) {
            bulk_store(static_cast<T*>(call.out) + element(out), ring.tile(out.state.index), slice.tile_vectors(out.tile) * 16, stores);
            wait_group_read<kStoresInFlight>();
        }
        if (stored >= kStoresInFlight) load_next(in);  // into the slot of the tile whose store is done
        out.advance(call, slice, call.out_strides, ring.tiles);
    }
    if constexpr (!kDirect) wait_group<0>();
}

// ---- the rule warp

template <class T>
RW_DEVICE void evaluate_rows(const RingCall& call, const BlockSlice& slice, const Ring& ring) {
    const Softcap softcap(call.softcap);
    const int lane = thread_index() % 32;
    const auto skip = [&](int64_t i) {
        if (slice.rank == 0 && lane == 0) put_invalid_row(call, i);
    };
    prepare_program(call, ring.program().values);
    PipelineState state;
    for (RowCursor rows(call, slice, skip); rows.more(); rows.advance(call, skip)) {
        const int64_t i = rows.now.row;
        RowStage& stage = ring.stage(state.index);
        prefetch_inputs(call, i, lane);
        const Row<T> row(call, i, rows.now.id, rows.now.temperature);
        // The block that will overwrite the target's logit reads it, before any thread can
        // overwrite it: all wait for the message that carries it.
        const int vector = row.target / kPerVector<T>;
        const int owner = vector < slice.slices.vectors ? vector / slice.slices.each : slice.slices.count - 1;
        const float target = row.target >= 0 && owner == slice.rank ? widen(row.x[row.target]) : -kInf;
        if (lane == 0) arrive_expecting(stage.cluster_full, slice.slices.count * int(sizeof(SlicePartial)));
        wait(stage.partials_full, state.phase);
        const Partial own = merge_slice(stage.partials, row.scale);
        if (lane < slice.slices.count) {
            send(as_vector(own), &stage.sent[slice.rank].sums, stage.cluster_full, lane);
            send({as_bits(target)}, &stage.sent[slice.rank].target, stage.cluster_full, lane);
        }
        Partial sums{-kInf, 0.0f, 0.0f, 0.0f};
        Target known;
        if (lane == 0) {
            wait_for_cluster(stage.cluster_full, state.phase);
            for (int from = 0; from < slice.slices.count; ++from) sums = merge(sums, as_partial(load_shared(&stage.sent[from].sums)), row.scale);
            if (row.target >= 0) known = Target(as_float(load_shared(&stage.sent[owner].target).words[0]), softcap);
        }
        const RowGradient gradient = loss_of_row(call, i, row, sums, known, slice.rank == 0, softcap, ring.program());
        if (lane == 0) {
            stage.gradient = gradient;
            stage.target = row.target;
            stage.row = i;
            arrive(stage.gradient_full);
        }
        warp_barrier();  // keeps lanes together: the others would spin for the next row's sums
        state.advance(kStages);
    }
}

// ---- the computing warps

/// Adds tiles [from, to) of the slice to a thread's sums.
template <class T, Sums kSums>
RW_DEVICE void sweep_tiles(const BlockSlice& slice, const Ring& ring, int from, int to, PipelineState& tile, Sweep& s, float scale,
                           const Softcap& softcap) {
    const int whole = to < slice.whole_tiles ? to : slice.whole_tiles;
    for (int t = from; t < whole; ++t) {
        wait(ring.full(tile.index), tile.phase);
        const Vector* const vectors = ring.tile(tile.index) + thread_index();
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) v[u] = load_shared(vectors + u * kThreads);
        absorb_tile<T, kSums>(s, v, scale, softcap);
        tile.advance(ring.tiles);
    }
    if (from > slice.whole_tiles || to <= slice.whole_tiles) return;
    wait(ring.full(tile.index), tile.phase);
    const Vector* const vectors = ring.tile(tile.index) + thread_index();
    const int left = slice.vectors - slice.whole_tiles * kTileVectors - thread_index();
    if (left > 0) {
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            v[u] = minus_infinities<T>();
            if (u * kThreads < left) v[u] = load_shared(vectors + u * kThreads);
        }
        absorb_tile<T, kSums>(s, v, scale, softcap);
    }
    tile.advance(ring.tiles);
}

/// Gives the warp's sums of a row whose first tile is at `first`. All tiles of the row are still in
/// the ring.
template <class T, Sums kSums>
RW_DEVICE void finish_sweep(const RingCall& call, const BlockSlice& slice, const Ring& ring, int64_t i, int first, Sweep& s, float scale,
                            RowStage& stage, const Softcap& softcap) {
    const int vocab = int(call.vocab_size);
    const bool has_tail = slice.is_last() && vocab % kPerVector<T> != 0;
    const T* const x = static_cast<const T*>(call.logits) + (has_tail ? call.strides.offset(i) : 0);
    if (has_tail) absorb_tail<T, kSums>(s, x, vocab, scale, softcap);
    const Partial sums = merge_warp<kSums>(s, scale, softcap, [&](int thread, const auto& f) {
        const auto load = [&](int vector) {
            const int tile = first + vector / kTileVectors;
            return load_shared(ring.tile(tile < ring.tiles ? tile : tile - ring.tiles) + vector % kTileVectors);
        };
        for_each_of<T>(thread, slice.vectors, load, f);
        const int tail = has_tail && thread_index() % 32 == 0 ? tail_of<T>(thread, vocab) : -1;
        if (tail >= 0) f(widen(x[tail]));
    });
    if (thread_index() % 32 == 0) {
        stage.partials[thread_index() / 32] = sums;
        arrive(stage.partials_full);
    }
}

/// A row whose gradient is being written: the gradient, the target's column or -1, and the
/// destination.
template <class T>
struct Output {
    RowGradient g;
    int target;
    T* slice;  // the block's first column, used only by direct stores
    uint64_t policy;
};

/// Writes the gradient of tiles [from, to) of the slice, in the place of their logits or directly
/// to memory.
template <class T, Terms kTerms>
RW_DEVICE void write_tiles(const BlockSlice& slice, const Ring& ring, int from, int to, PipelineState& tile, const Output<T>& out,
                           const Softcap& softcap) {
    constexpr int n = kPerVector<T>;
    const int in_slice = out.target - slice.begin * n;  // the target's column
    const bool has_target = out.target >= 0 && in_slice >= 0 && in_slice < slice.vectors * n && in_slice / n % kThreads == thread_index();
    const int target_tile = has_target ? in_slice / (kTileVectors * n) : -1;
    const auto write = [&](int t, int at, const Vector& v) {
        if constexpr (kDirect) {
            store16(out.slice + (int64_t(t) * kTileVectors + at) * n, v, out.policy);
        } else {
            store_shared(ring.tile(tile.index) + at, v);
        }
    };
    const auto finish_tile = [&](int t) {
        if (t == target_tile) {
            T value;
            narrow(out.g.target, value);
            const int at = in_slice - t * (kTileVectors * n);
            if constexpr (kDirect) {
                out.slice[in_slice] = value;
            } else {
                store_shared(reinterpret_cast<T*>(ring.tile(tile.index)) + at, value);
            }
        }
        if constexpr (kDirect) {
            release(ring.empty(tile.index));
        } else {
            release_written(ring.empty(tile.index));
        }
        tile.advance(ring.tiles);
    };
    const int whole = to < slice.whole_tiles ? to : slice.whole_tiles;
    for (int t = from; t < whole; ++t) {
        const Vector* const vectors = ring.tile(tile.index) + thread_index();
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) v[u] = load_shared(vectors + u * kThreads);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) write(t, thread_index() + u * kThreads, gradient_of<T, kTerms>(v[u], out.g, softcap));
        finish_tile(t);
    }
    if (from > slice.whole_tiles || to <= slice.whole_tiles) return;
    const int end = slice.vectors - slice.whole_tiles * kTileVectors;
#pragma unroll 1
    for (int at = thread_index(); at < end; at += kThreads) {
        write(slice.whole_tiles, at, gradient_of<T, kTerms>(load_shared(ring.tile(tile.index) + at), out.g, softcap));
    }
    finish_tile(slice.whole_tiles);
}

/// Writes the columns that no tile has: those after the last whole vector, and padding.
template <class T, Terms kTerms>
RW_DEVICE void write_tail(const RingCall& call, int64_t i, const RowGradient& g, int target, const Softcap& softcap) {
    const int vocab = int(call.vocab_size), tail = tail_of<T>(thread_index(), vocab);
    T* const out = static_cast<T*>(call.out) + call.out_strides.offset(i);
    if (tail >= 0) {
        const float logit = kTerms == Terms::fill ? 0.0f : widen(row_of<T>(call, i)[tail]);
        narrow(tail == target ? g.target : gradient_of<kTerms>(logit, g, softcap), out[tail]);
    }
    for (int64_t column = vocab + thread_index(); column < call.columns; column += kThreads) narrow(0.0f, out[column]);
}

/// Writes the gradient of tiles [from, to) of the row at `stage`. The last call also writes the
/// columns that no tile has.
template <class T, bool kFull>
RW_DEVICE void write_row(const RingCall& call, const BlockSlice& slice, const Ring& ring, int from, int to, bool last, PipelineState& tile,
                         const PipelineState& at, const Softcap& softcap) {
    const RowStage& stage = ring.stage(at.index);
    wait(stage.gradient_full, at.phase);
    Output<T> out{stage.gradient, stage.target, nullptr, 0};
    if constexpr (kDirect) {
        out.slice = static_cast<T*>(call.out) + call.out_strides.offset(stage.row) + int64_t(slice.begin) * kPerVector<T>;
        out.policy = RW_RING_STORED();
    }
    const bool has_tail = last && slice.is_last() && (call.columns > call.vocab_size || call.vocab_size % kPerVector<T>);
    with_terms<kFull>(out.g.terms, [&](auto terms) {
        constexpr Terms kTerms = decltype(terms)::value;
        write_tiles<T, kTerms>(slice, ring, from, to, tile, out, softcap);
        if (has_tail) write_tail<T, kTerms>(call, stage.row, out.g, out.target, softcap);
    });
}

/// Writes zeros to memory for a row with nothing to compute. Such a row is not in the ring.
template <class T>
RW_DEVICE void write_zeros(const RingCall& call, const BlockSlice& slice, int64_t i) {
    T* const out = static_cast<T*>(call.out) + call.out_strides.offset(i);
    for (int at = thread_index(); at < slice.vectors; at += kThreads) store16(out + (slice.begin + int64_t(at)) * kPerVector<T>, Vector{});
    if (slice.is_last()) write_tail<T, Terms::fill>(call, i, RowGradient{}, -1, Softcap(kInf));
}

template <class T, bool kFull>
RW_DEVICE void compute_rows(const RingCall& call, const BlockSlice& slice, const Ring& ring) {
    constexpr Sums kSums = kFull ? Sums::full : Sums::entropy;
    const Softcap softcap(call.softcap);
    const auto skip = [&](int64_t i) { write_zeros<T>(call, slice, i); };
    const Lookahead look(ring.tiles, slice.tiles);
    const int at_once = slice.tiles - look.kept;
    PipelineState swept, written, sums_stage, gradient_stage;  // tiles, and rows
    int pending = 0;                                           // rows with sums but without a gradient yet
    RowCursor rows(call, slice, skip);
    while (rows.more() || pending) {
        const bool sweeps = rows.more(), writes = pending == look.rows || !sweeps;
        const float scale = kLog2ef / rows.now.temperature;
        const int first = swept.index;
        Sweep s;
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if (sweeps) sweep_tiles<T, kSums>(slice, ring, half ? look.ahead : 0, half ? slice.tiles : look.ahead, swept, s, scale, softcap);
            if (sweeps && half) finish_sweep<T, kSums>(call, slice, ring, rows.now.row, first, s, scale, ring.stage(sums_stage.index), softcap);
            if (writes && (half || at_once)) {
                write_row<T, kFull>(call, slice, ring, half ? at_once : 0, half ? slice.tiles : at_once, half, written, gradient_stage, softcap);
            }
        }
        if (writes) {
            gradient_stage.advance(kStages);
            --pending;
        }
        if (sweeps) {
            sums_stage.advance(kStages);
            ++pending;
            rows.advance(call, skip);
        }
    }
}

template <class T, bool kFull>
RW_KERNEL(kRingThreads, 1) ring_kernel(RW_PARAMETER RingCall call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    RW_DYNAMIC_SHARED(bytes);
    const Ring ring{bytes, call.tiles};
    const BlockSlice slice(call, kPerVector<T>);
    const int warp = thread_index() / 32;
    if (thread_index() == 0) ring.initialize_barriers();
    cluster_barrier();
    if (warp < kWarps) {
        compute_rows<T, kFull>(call, slice, ring);
    } else if (warp == kRuleWarp) {
        evaluate_rows<T>(call, slice, ring);
    } else if (thread_index() == kLoadWarp * 32) {
        move_tiles<T>(call, slice, ring);
    }
    // No barrier is needed at the end: a block has waited for everything that is sent to it.
#endif
}

// ---- launches

using Kernel = void (*)(const RingCall);

Kernel kernel_for(const LossGradCall& call) {
    return call.reads_p_sq || call.softcap < kInf ? ring_kernel<RW_ELEMENT, true> : ring_kernel<RW_ELEMENT, false>;
}

Shape shape(const LossGradCall& call, int tiles, int64_t clusters) {
    const int blocks = Slices(int(call.vocab_size) / kPerVector<RW_ELEMENT>).count;
    return {clusters * blocks, kRingThreads, blocks, tiles * kBytesPerTile + kBytesBesides};
}

int count_clusters(const LossGradCall& call, int tiles, int& count) {
    return active_clusters(kernel_for(call), shape(call, tiles, 1), call.device, count);
}

int launch_loss_grad(const LossGradCall& call, int tiles, int64_t clusters) {
    RingCall ring{call, tiles};
    return launch(kernel_for(call), shape(call, tiles, call.rows < clusters ? call.rows : clusters), ring);
}

}  // namespace

const RingKernels RW_CONCAT(ring_, RW_DTYPE) = {count_clusters, launch_loss_grad};

}  // namespace reweight_ops
