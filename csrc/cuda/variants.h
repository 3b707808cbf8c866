// Build options. All but RW_DIVERGENCE_SURE change speed only, never a bit of a result. Releases use the defaults.
// `make gpu-kernels` builds other variants side by side and times them: bench/gpu_variants.py names them, and
// bench/NOTES.md has the prediction and the measurement of each. Give the same flags to both compilers.
#pragma once

/// 1: the last tiles of a gradient wait until the next row's sums are sent. They are written and
/// replaced during that exchange.
#ifndef RW_RING_KEEP
#define RW_RING_KEEP 1
#endif
/// 1: gradients go from registers to global memory. A tile's slot is free as soon as it is read,
/// without a shared store, proxy fence or bulk store.
#ifndef RW_RING_DIRECT
#define RW_RING_DIRECT 0
#endif
/// Bulk stores that may still read shared memory when the next tile is stored. Each takes one slot
/// of the ring.
#ifndef RW_RING_STORES
#define RW_RING_STORES 1
#endif
/// L2 cache hints of loads and of stores: evict_first, evict_normal, evict_last or evict_unchanged.
#ifndef RW_RING_LOADS
#define RW_RING_LOADS evict_first
#endif
#ifndef RW_RING_STORED
#define RW_RING_STORED evict_first
#endif
/// 1: a cluster works on neighbouring rows. 0: it takes every n-th row of n clusters.
#ifndef RW_RING_NEIGHBOURS
#define RW_RING_NEIGHBOURS 0
#endif
/// Rows whose sums are sent before the gradient of the preceding row begins, if they fit in the
/// ring.
#ifndef RW_RING_ROWS_AHEAD
#define RW_RING_ROWS_AHEAD 1
#endif
/// Blocks of 256 threads per processor: of the statistics kernel, and of the gradient kernel. The
/// latter has 32 more threads and twice as much in flight: with 3 blocks it spills.
#ifndef RW_STATS_BLOCKS
#define RW_STATS_BLOCKS 4
#endif
#ifndef RW_GRAD_BLOCKS
#define RW_GRAD_BLOCKS 2
#endif
/// The same for statistics that find the likeliest ids.
#ifndef RW_TOP_BLOCKS
#define RW_TOP_BLOCKS 3
#endif
/// The same for the streaming kernel that evaluates rules.
#ifndef RW_RULE_BLOCKS
#define RW_RULE_BLOCKS 3
#endif
/// 0: the kernel on two tensors sums nothing again next to a sure token, whose digits are lost. Only
/// to time what the second sum costs.
#ifndef RW_DIVERGENCE_SURE
#define RW_DIVERGENCE_SURE 1
#endif

namespace reweight_ops {

constexpr bool kKeep = RW_RING_KEEP != 0, kDirect = RW_RING_DIRECT != 0, kNeighbours = RW_RING_NEIGHBOURS != 0,
               kDivergenceSure = RW_DIVERGENCE_SURE != 0;
constexpr int kRowsAhead = RW_RING_ROWS_AHEAD, kStatsBlocks = RW_STATS_BLOCKS, kGradBlocks = RW_GRAD_BLOCKS, kTopBlocks = RW_TOP_BLOCKS;
/// Slots of the ring that are still being stored while the block waits for the next tile.
constexpr int kStoresInFlight = kDirect ? 0 : RW_RING_STORES;
static_assert(kStoresInFlight >= 0 && kStoresInFlight <= 4 && (kRowsAhead == 1 || kRowsAhead == 2));

}  // namespace reweight_ops
