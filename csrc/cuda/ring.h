// The parts of a block that keeps rows on chip, see ring.cu: what it holds in shared memory, and how it walks through rows and tiles.
#pragma once

#include "asynchronous.h"
#include "row.h"
#include "slices.h"

namespace reweight_ops {

struct RingCall : LossGradCall {
    int tiles;  // that fit in the ring: more than two rows' worth
};

namespace {

/// 8 warps compute, one moves tiles, one evaluates rows.
constexpr int kMover = kWarps, kEvaluator = kWarps + 1, kRingThreads = kThreads + 64;

/// What a block of the cluster tells the others of a row: the sums of its slice, and the target's logit if that is in its slice.
struct Message {
    Vector sums, target;
};

/// A row on its way through the block. Two rows are: a block sends row k after it has this block's message of row k - 1, which is sent when row
/// k - 2 is evaluated; and its warps have written the gradient of row k - 2 when they give the sums of row k.
struct Place {
    Message messages[kMaxSlices];
    SlicePartials partials;
    RowGradient gradient;
    int target;
    Barrier swept;      // the warps' sums are in
    Barrier exchanged;  // the messages of all blocks are in
    Barrier ready;      // the gradient's constants are in
};
constexpr int kPlaces = 2;

/// The place and the phase of something that comes round.
struct Turn {
    int index = 0, parity = 0;
    RW_DEVICE void next(int count) {
        if (++index < count) return;
        index = 0;
        parity ^= 1;
    }
};

static_assert(kBytesPerTile == kTileBytes + 2 * sizeof(Barrier) && kBytesBesides >= kPlaces * sizeof(Place));

/// Shared memory of a block.
struct Ring {
    unsigned char* bytes;  // aligned to 128
    int tiles;

    RW_DEVICE Vector* tile(int i) const { return reinterpret_cast<Vector*>(bytes + int64_t(i) * kTileBytes); }
    RW_DEVICE Place& place(int i) const { return reinterpret_cast<Place*>(bytes + int64_t(tiles) * kTileBytes)[i]; }
    RW_DEVICE Barrier& full(int i) const { return reinterpret_cast<Barrier*>(&place(kPlaces))[i]; }  // the logits are in
    RW_DEVICE Barrier& done(int i) const { return full(tiles + i); }                                  // the gradient is in

    RW_DEVICE void initialize_barriers() const {
        for (int i = 0; i < tiles; ++i) {
            initialize(full(i), 1);
            initialize(done(i), kWarps);
        }
        for (int i = 0; i < kPlaces; ++i) {
            initialize(place(i).swept, kWarps);
            initialize(place(i).exchanged, 1);
            initialize(place(i).ready, 1);
        }
        publish_barriers();
    }
};

/// A block's share: a slice of every row of its cluster.
struct Share {
    Slices slices;
    int rank, begin, vectors, tiles;
    int64_t cluster, clusters;

    RW_DEVICE Share(const Call& call, int per_vector) : slices(int(call.vocab_size) / per_vector) {
        rank = cluster_rank();
        begin = slices.begin(rank);
        vectors = slices.end(rank) - begin;
        tiles = (vectors + kTileVectors - 1) / kTileVectors;
        cluster = block_index() / slices.count;
        clusters = block_count() / slices.count;
    }
    RW_DEVICE bool is_last() const { return rank == slices.count - 1; }
    RW_DEVICE int tile_vectors(int tile) const { return vectors - tile * kTileVectors < kTileVectors ? vectors - tile * kTileVectors : kTileVectors; }

    /// The first of the cluster's rows from `row` on that has something to compute; `skip` is told of those before it.
    template <class Skip>
    RW_DEVICE int64_t from(const Call& call, int64_t row, const Skip& skip) const {
        for (; row < call.rows && is_invalid(call, row); row += clusters) skip(row);
        return row;
    }
    RW_DEVICE int64_t from(const Call& call, int64_t row) const {
        return from(call, row, [](int64_t) {});
    }
};

}  // namespace
}  // namespace reweight_ops
