// Divides a row among blocks and threads, by its length and dtype alone: every kernel on every device adds in the same
// order.
//
// A row is cut into slices, one for each block of a cluster that keeps the row on chip. A slice is cut into tiles. Vector i
// of a tile belongs to thread i % kThreads. A thread adds its vectors of a slice in order; then a warp adds its threads, a
// slice its warps, and the row its slices.
#pragma once

#include "common/row_stats.h"

namespace reweight_ops {

/// The threads that share a slice.
constexpr int kThreads = 256, kWarps = kThreads / 32;
/// 16-byte vectors of a tile per thread. A thread looks for a new maximum after each group of them.
constexpr int kUnroll = 4;
constexpr int kTileVectors = kThreads * kUnroll, kTileBytes = kTileVectors * 16;
/// The longest slice, in tiles. On sm_90 a block has 227 KiB, which hold 14 tiles: such a slice, 3
/// tiles of the next row, and one in flight.
constexpr int kMaxTiles = 10;
constexpr int kMaxSlices = 8;  // the largest cluster that every device with clusters can run

/// Shared memory of a block that keeps rows on chip: per tile, and in addition to the tiles.
constexpr int kBytesPerTile = kTileBytes + 16, kBytesBesides = 2816;

struct Slices {
    int vectors;      // whole vectors of the row; the last slice also has the columns after them
    int count, each;  // number of slices, and vectors in each but the last

    RW_METHOD explicit Slices(int whole_vectors) : vectors(whole_vectors), count(1) {
        while (count < kMaxSlices && share() > kMaxTiles * kTileVectors) count *= 2;
        each = share();
    }
    RW_METHOD int begin(int slice) const { return slice * each < vectors ? slice * each : vectors; }
    RW_METHOD int end(int slice) const { return begin(slice + 1); }
    RW_METHOD int tiles() const { return (each + kTileVectors - 1) / kTileVectors; }  // tiles of the longest slice

private:
    /// A share is whole cache lines of 128 bytes.
    RW_METHOD int share() const { return ((vectors + count - 1) / count + 7) / 8 * 8; }
};

}  // namespace reweight_ops
