// How a row is divided among blocks and threads: by its length and dtype alone, so that every kernel on every device adds in the same order.
//
// A row is cut into slices, one for each block of a cluster that keeps the row on chip; a slice into tiles. Of a tile, vector i belongs to
// thread i % kThreads. A thread adds its vectors of a slice in order, then a warp its threads, a slice its warps, and the row its slices.
#pragma once

#include "common/row_stats.h"

namespace reweight_ops {

/// Threads that share a slice.
constexpr int kThreads = 256, kWarps = kThreads / 32;
/// Vectors of 16 bytes that a thread has of a tile, and after which it looks for a new maximum.
constexpr int kUnroll = 4;
constexpr int kTileVectors = kThreads * kUnroll, kTileBytes = kTileVectors * 16;
/// The longest slice, in tiles. 14 fit in the 227 KiB that a block has on sm_90: such a slice, 3 tiles of the next row, and one in motion.
constexpr int kMaxTiles = 10;
constexpr int kMaxSlices = 8;  // the largest cluster that every device with clusters can run

/// Shared memory of a block that keeps rows on chip, for each tile and besides.
constexpr int kBytesPerTile = kTileBytes + 16, kBytesBesides = 2816;

struct Slices {
    int vectors;      // whole vectors of the row; the columns after them belong to the last slice
    int count, each;  // slices, and vectors of each but the last

    RW_METHOD explicit Slices(int whole_vectors) : vectors(whole_vectors), count(1) {
        while (count < kMaxSlices && share() > kMaxTiles * kTileVectors) count *= 2;
        each = share();
    }
    RW_METHOD int begin(int slice) const { return slice * each < vectors ? slice * each : vectors; }
    RW_METHOD int end(int slice) const { return begin(slice + 1); }
    RW_METHOD int tiles() const { return (each + kTileVectors - 1) / kTileVectors; }  // of the longest slice

private:
    /// Whole cache lines of 128 bytes.
    RW_METHOD int share() const { return ((vectors + count - 1) / count + 7) / 8 * 8; }
};

}  // namespace reweight_ops
