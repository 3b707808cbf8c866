// Parts of a block that keeps rows on chip (see ring.cu): its shared memory, and its iteration over
// rows and tiles.
#pragma once

#include "asynchronous.h"
#include "row.h"
#include "slices.h"
#include "variants.h"

namespace reweight_ops {

struct RingCall : LossGradCall {
    int tiles;  // capacity of the ring
};

namespace {

/// 8 warps compute, one warp moves tiles, and one warp evaluates rows.
constexpr int kLoadWarp = kWarps, kRuleWarp = kWarps + 1, kRingThreads = kThreads + 64;

/// A block's message to its cluster about a row: the sums of its slice, and the target's logit if
/// its slice has it.
struct SlicePartial {
    Vector sums, target;
};

RW_DEVICE Vector as_vector(const Partial& s) { return {as_bits(s.top), as_bits(s.rest), as_bits(s.dot), as_bits(s.sum_sq)}; }
RW_DEVICE Partial as_partial(const Vector& v) { return {as_float(v.words[0]), as_float(v.words[1]), as_float(v.words[2]), as_float(v.words[3])}; }

/// The state of a row in the block. A block sends its message of row k after it has all messages of
/// row k - 1. Those are sent when row k - 2 is evaluated. A block's warps have written the gradient
/// of row k - kStages when they give the sums of row k.
struct RowStage {
    SlicePartial sent[kMaxSlices];
    SlicePartials partials;
    RowGradient gradient;
    int target;
    int64_t row;
    Barrier partials_full;  // the sums of the block's warps are written
    Barrier cluster_full;   // the messages of all blocks have arrived
    Barrier gradient_full;  // the constants of the gradient are written
};
constexpr int kStages = kRowsAhead + 1;

/// The index of the next of several buffers in rotation, and the parity of the phase to wait for.
struct PipelineState {
    int index = 0, phase = 0;
    RW_DEVICE void advance(int count) {
        if (++index < count) return;
        index = 0;
        phase ^= 1;
    }
};

static_assert(kBytesPerTile == kTileBytes + 2 * sizeof(Barrier) && kBytesBesides >= kStages * sizeof(RowStage) + sizeof(ProgramRegisters));

/// The shared memory of a block.
struct Ring {
    unsigned char* bytes;  // aligned to 128
    int tiles;

    RW_DEVICE Vector* tile(int i) const { return reinterpret_cast<Vector*>(bytes + i * kTileBytes); }
    RW_DEVICE RowStage& stage(int i) const { return reinterpret_cast<RowStage*>(bytes + tiles * kTileBytes)[i]; }
    RW_DEVICE ProgramRegisters& program() const { return *reinterpret_cast<ProgramRegisters*>(&stage(kStages)); }
    RW_DEVICE Barrier& full(int i) const { return reinterpret_cast<Barrier*>(&program() + 1)[i]; }  // the logits are loaded
    RW_DEVICE Barrier& empty(int i) const { return full(tiles + i); }  // the warps are done: the gradient is in the tile, or written

    RW_DEVICE void initialize_barriers() const {
        for (int i = 0; i < tiles; ++i) {
            initialize(full(i), 1);
            initialize(empty(i), kWarps);
        }
        for (int i = 0; i < kStages; ++i) {
            initialize(stage(i).partials_full, kWarps);
            initialize(stage(i).cluster_full, 1);
            initialize(stage(i).gradient_full, 1);
        }
        publish_barriers();
    }
};

/// A block's part: one slice of every row of its cluster.
struct BlockSlice {
    Slices slices;
    int rank, begin, vectors, tiles, whole_tiles;
    int64_t first, step, end;  // the cluster's rows

    RW_DEVICE BlockSlice(const Call& call, int per_vector) : slices(int(call.vocab_size) / per_vector) {
        rank = cluster_rank();
        begin = slices.begin(rank);
        vectors = slices.end(rank) - begin;
        tiles = (vectors + kTileVectors - 1) / kTileVectors;
        whole_tiles = vectors / kTileVectors;
        const int64_t cluster = block_index() / slices.count, clusters = block_count() / slices.count;
        if (kNeighbours) {
            first = call.rows * cluster / clusters;
            step = 1;
            end = call.rows * (cluster + 1) / clusters;
        } else {
            first = cluster;
            step = clusters;
            end = call.rows;
        }
    }
    RW_DEVICE bool is_last() const { return rank == slices.count - 1; }
    RW_DEVICE int tile_vectors(int tile) const { return vectors - tile * kTileVectors < kTileVectors ? vectors - tile * kTileVectors : kTileVectors; }
};

/// The distance between statistics and gradients. The sums of `rows` rows are sent before the
/// gradient of the oldest one begins. Of the next row, `ahead` tiles are swept before that
/// gradient. `kept` tiles of the gradient wait until the sums of that row are sent. kStoresInFlight
/// further tiles of the ring are being stored.
struct Lookahead {
    int rows, ahead, kept;

    RW_DEVICE Lookahead(int ring_tiles, int tiles) : rows(1) {
        const int room = ring_tiles - kStoresInFlight - tiles;
        ahead = room < tiles ? room : tiles;
        if (tiles > 0 && room >= tiles) rows = room / tiles < kRowsAhead ? room / tiles : kRowsAhead;
        kept = kKeep || ahead == tiles ? ahead : 0;
    }
};

/// A row, with the loads that decide whether it has anything to compute. Peeking one row ahead
/// hides their latency.
struct Peek {
    int64_t row, id = 0;
    float temperature = 1.0f;

    RW_DEVICE Peek(const Call& call, int64_t i, int64_t end) : row(i) {
        if (i >= end) return;
        id = call.ids[i];
        temperature = temperature_of(call, i);
    }
};

/// Iterates over the rows of a cluster that have something to compute. It calls `skip` for the
/// others.
struct RowCursor {
    int64_t step, end;
    Peek now, next;

    template <class Skip>
    RW_DEVICE RowCursor(const Call& call, const BlockSlice& slice, const Skip& skip)
        : step(slice.step), end(slice.end), now(call, slice.first, end), next(call, slice.first + step, end) {
        settle(call, skip);
    }
    RW_DEVICE bool more() const { return now.row < end; }
    template <class Skip>
    RW_DEVICE void advance(const Call& call, const Skip& skip) {
        now = next;
        next = Peek(call, now.row + step, end);
        settle(call, skip);
    }

private:
    template <class Skip>
    RW_DEVICE void settle(const Call& call, const Skip& skip) {
        while (more() && (now.id < 0 || now.id >= call.vocab_total)) {
            skip(now.row);
            now = next;
            next = Peek(call, now.row + step, end);
        }
    }
};

/// Prefetches the inputs of the row's rules, one input per lane.
RW_DEVICE void prefetch_inputs(const LossGradCall& call, int64_t i, int lane) {
    const float* const inputs[] = {call.old_logp, call.adv, call.ref_logp, call.sampling_logp};
    const float* at = nullptr;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (lane == k && inputs[k]) at = inputs[k] + i;
    }
    if (lane >= 4 && lane < 4 + call.table.terms) at = call.row_weights + (lane - 4) * call.row_weights_step + i;
    if (at) prefetch(at);
}

/// Iterates over the tiles of a block. An offset takes a division, once per row.
struct TileCursor {
    RowCursor rows;
    int64_t offset;  // offset of the row, in elements
    int tile = 0;
    PipelineState state;

    RW_DEVICE TileCursor(const Call& call, const BlockSlice& slice, const RowStrides& strides)
        : rows(call, slice, [](int64_t) {}), offset(strides.offset(rows.now.row)) {}
    RW_DEVICE void advance(const Call& call, const BlockSlice& slice, const RowStrides& strides, int ring_tiles) {
        state.advance(ring_tiles);
        if (++tile < slice.tiles) return;
        tile = 0;
        rows.advance(call, [](int64_t) {});
        offset = strides.offset(rows.now.row);
    }
};

}  // namespace
}  // namespace reweight_ops
