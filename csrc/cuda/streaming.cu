// The three primitives for rows of any length. The grid is persistent, with one block per row. Statistics read from memory;
// gradients read what the L2 cache still holds. The file is compiled once per dtype; RW_ELEMENT and RW_DTYPE name the dtype.
#include "common/concat.h"
#include "common/primitives.h"
#include "dispatch.h"
#include "row.h"
#include "top_ids.h"
#include "variants.h"

namespace reweight_ops {
namespace {

/// Blocks per processor of the kernel that evaluates rules. With a softcap, and on Ampere, its
/// registers fit only once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <bool kFull>
constexpr int kRuleBlocks = 1;
#else
template <bool kFull>
constexpr int kRuleBlocks = kFull ? 1 : RW_RULE_BLOCKS;
#endif
/// With a softcap, registers do not suffice for more blocks.
constexpr int blocks_of(bool full, int blocks) { return full && blocks > 2 ? 2 : blocks; }

/// The target's logit, read from memory.
template <class T>
RW_DEVICE Target target_of(const Row<T>& row, const Softcap& softcap) {
    return row.target < 0 ? Target() : Target(widen(row.x[row.target]), softcap);
}

/// A thread's sums of a slice that begins at column `begin`: whole tiles, then the rest. load(i) gives vector i of the slice. `ids` sees
/// the vectors too.
template <class T, Sums kSums, class Load, class Ids>
RW_DEVICE Sweep sweep_slice(int begin, int vectors, float scale, const Softcap& softcap, const Load& load, Ids& ids) {
    const int whole = vectors / kTileVectors * kTileVectors;
    Sweep s;
    int i = thread_index();
    for (; i < whole; i += kTileVectors) {
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) v[u] = load(i + u * kThreads);
        absorb_tile<T, kSums>(s, v, scale, softcap);
        ids.template see_tile<T>(v, i, vectors, begin, s);
    }
    if (i / 32 * 32 < vectors) {  // the whole warp, which searches together
        Vector v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            v[u] = minus_infinities<T>();
            if (i + u * kThreads < vectors) v[u] = load(i + u * kThreads);
        }
        if (i < vectors) absorb_tile<T, kSums>(s, v, scale, softcap);
        ids.template see_tile<T>(v, i, vectors, begin, s);
    }
    return s;
}

/// Writes the sums of each warp to `partials`.
template <class T, Sums kSums, bool kAligned, class Ids>
RW_DEVICE void sweep_statistics(const T* x, int columns, const Slices& slices, float scale, const Softcap& softcap, RowPartials& partials, Ids& ids) {
    const ShiftedRow<T> shifted(x, slices.vectors);
    for (int slice = 0; slice < slices.count; ++slice) {
        const int begin = slices.begin(slice), vectors = slices.end(slice) - begin;
        const T* const from = x + int64_t(begin) * kPerVector<T>;
        const auto load = [&](int i) { return kAligned ? load16(from + int64_t(i) * kPerVector<T>) : shifted.load(begin + i); };
        Sweep swept = sweep_slice<T, kSums>(begin * kPerVector<T>, vectors, scale, softcap, load, ids);
        const bool last = slice == slices.count - 1;
        if (last) absorb_tail<T, kSums>(swept, x, columns, scale, softcap);
        const Partial s = merge_warp<kSums>(swept, scale, softcap, [&](int thread, const auto& f) {
            for_each_of<T>(thread, vectors, [&](int i) { return load_vector(from + int64_t(i) * kPerVector<T>, kAligned); }, f);
            const int tail = last && thread_index() % 32 == 0 ? tail_of<T>(thread, columns) : -1;
            if (tail >= 0) f(widen(x[tail]));
        });
        if (thread_index() % 32 == 0) partials[slice][thread_index() / 32] = s;
    }
    ids.see_tail(x, columns);
    ids.sort();
}

/// The sums of a row, in every thread of warp 0; other threads get an unspecified value. It has one
/// barrier. `partials` may be reused after the next one.
template <Sums kSums, bool kAligned, class T, class Ids = NoIds>
RW_DEVICE Partial sum_row(const Row<T>& row, int columns, const Slices& slices, const Softcap& softcap, RowPartials& partials, Ids&& ids = {}) {
    sweep_statistics<T, kSums, kAligned>(row.x, columns, slices, row.scale, softcap, partials, ids);
    barrier();
    Partial sums{-kInf, 0.0f, 0.0f, 0.0f};
    if (thread_index() < 32) {
        for (int slice = 0; slice < slices.count; ++slice) sums = merge(sums, merge_slice(partials[slice], row.scale), row.scale);
    }
    return sums;
}

template <class T>
RW_DEVICE void fill_zero(T* out, int64_t columns) {
    write_gradient<T, false, kUnroll>(GradientRow<T>{out, out, -1, {}}, int(columns), int(columns), Softcap(kInf));
}

// ---- token_stats

/// kAligned means that every row starts at a multiple of 16 bytes.
template <class T, Sums kSums, bool kAligned>
RW_KERNEL(kThreads, blocks_of(kSums == Sums::full || !kAligned, kStatsBlocks)) stats_kernel(RW_PARAMETER StatsCall call) {
    // Two buffers: while warp 0 merges the sums of one row, the others write those of the next.
    RW_SHARED(DoubleBuffer<RowPartials>, partials);
    const Softcap softcap(call.softcap);
    const Slices slices(int(call.vocab_size) / kPerVector<T>);
    int buffer = 0;
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        if (is_invalid(call, i)) {
            if (thread_index() == 0) put_invalid_row(call, i);
            continue;
        }
        const Row<T> row(call, i);
        const Partial sums = sum_row<kSums, kAligned>(row, int(call.vocab_size), slices, softcap, partials[buffer]);
        buffer ^= 1;
        if (thread_index() == 0) put_row(call, i, finish(sums, target_of(row, softcap), row.temperature, row.scale));
    }
}

// ---- top_stats

/// Blocks per processor of statistics that find ids.
constexpr int top_blocks_of(bool full, bool aligned) { return blocks_of(full || !aligned, kTopBlocks); }

/// The statistics have the bits of stats_kernel. A row whose id is no token has no statistics, but ids.
template <class T, Sums kSums, bool kAligned>
RW_KERNEL(kThreads, top_blocks_of(kSums == Sums::full, kAligned)) top_stats_kernel(RW_PARAMETER TopStatsCall call) {
    RW_SHARED(RowPartials, partials);
    RW_SHARED(TopKeys, keys);
    const Softcap softcap(call.softcap);
    const Slices slices(int(call.vocab_size) / kPerVector<T>);
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        int64_t* const out = call.top_ids + i * call.top;
        if (is_ignored(call, i)) {
            if (thread_index() == 0) put_invalid_row(call, i);
            for (int k = thread_index(); k < call.top; k += kThreads) out[k] = kIgnoreIndex;
            continue;
        }
        const Row<T> row(call, i);
        TopIds ids(keys[thread_index() / 32], call.top);
        const Partial sums = sum_row<kSums, kAligned>(row, int(call.vocab_size), slices, softcap, partials, ids);
        if (thread_index() == 0) {
            if (is_invalid(call, i)) {
                put_invalid_row(call, i);
            } else {
                put_row(call, i, finish(sums, target_of(row, softcap), row.temperature, row.scale));
            }
        }
        ids.write(keys, out, call.vocab_start);
        barrier();  // no thread reads the sums and the keys any more
    }
}

// ---- token_grad

template <class T>
RW_DEVICE RowGradient known_gradient(const GradCall& call, const Row<T>& row, int64_t i, const Softcap& softcap, bool full) {
    const auto get = [i](const float* from) { return from ? from[i] : 0.0f; };
    const Derivatives<float> d{get(call.d_logp), get(call.d_entropy), get(call.d_lse),       get(call.d_p_sq),
                               call.logp[i],     get(call.entropy),   get(call.log_sum_p_sq)};
    const Target target = d.all_zero() ? Target() : target_of(row, softcap);
    const double unit = double(row.temperature) * row.scale;  // log2(e) with the rounding of the scale
    const double lse = call.lse[i], low = get(call.lse_low), lse2 = unit * (lse + low);
    if (!full && fabs(lse2) <= kFar) {
        const float base = float(lse2), rest = float(base - lse2);
        return row_gradient(d, row.temperature, row.scale, {true, base, rest, exp2f(rest)}, target, full);
    }
    // Exponents are relative to a logit near lse.
    const bool by_target = is_by_target(row.target >= 0, call.lse[i], d.logp);
    const float base = float(by_target ? target.exact : lse * row.temperature);
    const double from = by_target ? (base - target.exact) * row.scale + unit * d.logp : (double(base) * row.scale - unit * lse) - unit * low;
    const float rest = float(from);
    return row_gradient(d, row.temperature, row.scale, {false, base, rest, exp2f(rest)}, target, full);
}

/// 8 warps write a row while one warp prepares the next: its chain of reads, divisions and fp64
/// would delay all of them.
constexpr int kGradThreads = kThreads + 32;

/// A row with nothing to compute is zeros.
template <class T>
RW_DEVICE GradientRow<T> known_row(const GradCall& call, int64_t i, const Softcap& softcap, bool full) {
    T* const out = static_cast<T*>(call.out) + call.out_strides.offset(i);
    if (is_invalid(call, i)) return {out, out, -1, {}};
    const Row<T> row(call, i);
    return {row.x, out, row.target, known_gradient(call, row, i, softcap, full)};
}

template <class T, bool kFull>
RW_KERNEL(kGradThreads, blocks_of(kFull, kGradBlocks)) grad_kernel(RW_PARAMETER GradCall call) {
    RW_SHARED(DoubleBuffer<GradientRow<T>>, known);
    const Softcap softcap(call.softcap);
    const bool writes = thread_index() < kThreads;
    const auto prepare = [&](int64_t i, int buffer) {
        if (thread_index() == kThreads && i < call.rows) known[buffer] = known_row<T>(call, i, softcap, kFull);
    };
    int buffer = 0;
    prepare(block_index(), buffer);
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        barrier();  // this row is ready, and no thread reads the preceding one any more
        prepare(i + block_count(), buffer ^ 1);
        if (writes) write_gradient<T, kFull, 2 * kUnroll>(known[buffer], int(call.vocab_size), int(call.columns), softcap);
        buffer ^= 1;
    }
}

// ---- token_loss_grad

template <class T, bool kFull, bool kAligned>
RW_KERNEL(kThreads, kRuleBlocks<kFull>) loss_grad_kernel(RW_PARAMETER LossGradCall call) {
    RW_SHARED(RowPartials, partials);
    RW_SHARED(GradientRow<T>, known);
    RW_SHARED(ProgramRegisters, program);
    if (thread_index() < 32) prepare_program(call, program.values);
    const Softcap softcap(call.softcap);
    const Slices slices(int(call.vocab_size) / kPerVector<T>);
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        T* out = static_cast<T*>(call.out) + call.out_strides.offset(i);
        if (is_invalid(call, i)) {
            if (thread_index() == 0) put_invalid_row(call, i);
            fill_zero(out, call.columns);
            continue;
        }
        const Row<T> row(call, i);
        constexpr Sums kSums = kFull ? Sums::full : Sums::entropy;
        const Partial sums = sum_row<kSums, kAligned>(row, int(call.vocab_size), slices, softcap, partials);
        if (thread_index() < 32) {
            const RowGradient found = loss_of_row(call, i, row, sums, target_of(row, softcap), true, softcap, program);
            if (thread_index() == 0) known = {row.x, out, row.target, found};
        }
        barrier();
        write_gradient<T, kFull, kUnroll>(known, int(call.vocab_size), int(call.columns), softcap);
    }
}

// ---- packed rows: a block each, of any address and length

/// Rows that a sampler keeps are short, so that their registers need not leave room for more
/// blocks.
constexpr int kPackedBlocks = 2;

template <class T, Sums kSums>
RW_KERNEL(kThreads, kPackedBlocks) packed_stats_kernel(RW_PARAMETER StatsCall call) {
    RW_SHARED(DoubleBuffer<RowPartials>, partials);
    const Softcap softcap(call.softcap);
    int buffer = 0;
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        if (is_invalid(call, i)) {
            if (thread_index() == 0) put_invalid_row(call, i);
            continue;
        }
        const int columns = int(columns_of(call, i));
        const Row<T> row(call, i);
        const Partial sums = sum_row<kSums, false>(row, columns, Slices(columns / kPerVector<T>), softcap, partials[buffer]);
        if (thread_index() == 0) put_row(call, i, finish(sums, target_of(row, softcap), row.temperature, row.scale));
        buffer ^= 1;  // the others begin the next row while warp 0 merges
    }
}

/// Rows with nothing to compute are not written.
template <class T, bool kFull>
RW_KERNEL(kThreads, kPackedBlocks) packed_grad_kernel(RW_PARAMETER GradCall call) {
    RW_SHARED(GradientRow<T>, known);
    const Softcap softcap(call.softcap);
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        if (is_invalid(call, i)) continue;
        const int columns = int(columns_of(call, i));
        if (thread_index() == 0) {
            const Row<T> row(call, i);
            known = {row.x, static_cast<T*>(call.out) + call.bounds[i], row.target, known_gradient(call, row, i, softcap, kFull)};
        }
        barrier();  // the row is ready
        write_gradient<T, kFull, kUnroll>(known, columns, columns, softcap);
        barrier();  // no thread reads it any more
    }
}

// ---- launches

/// Launches a persistent grid with `blocks_per_processor` blocks per processor.
template <class C>
int launch_rows(void (*kernel)(const C), const C& call, int blocks_per_processor, int threads = kThreads) {
    if (call.rows == 0) return 0;
    const Device device = device_of(call.device);
    if (device.status) return device.status;
    const int64_t blocks = int64_t(device.processors) * blocks_per_processor;
    return launch(kernel, {call.rows < blocks ? call.rows : blocks, threads}, call);
}

/// Calls f(full, aligned) with compile-time constants.
template <class F>
int with_kind(bool full, bool aligned, const F& f) {
    if (full) return aligned ? f(std::true_type(), std::true_type()) : f(std::true_type(), std::false_type());
    return aligned ? f(std::false_type(), std::true_type()) : f(std::false_type(), std::false_type());
}

int launch_stats(const StatsCall& call) {
    if (call.bounds) {
        const bool full = call.log_sum_p_sq || call.softcap < kInf;
        return launch_rows(full ? packed_stats_kernel<RW_ELEMENT, Sums::full> : packed_stats_kernel<RW_ELEMENT, Sums::entropy>, call, kPackedBlocks);
    }
    return with_kind(call.log_sum_p_sq || call.softcap < kInf, rows_are_aligned(call), [&](auto full, auto aligned) {
        constexpr Sums kSums = full.value ? Sums::full : Sums::entropy;
        return launch_rows(stats_kernel<RW_ELEMENT, kSums, aligned.value>, call, blocks_of(full.value || !aligned.value, kStatsBlocks));
    });
}

int launch_top_stats(const TopStatsCall& call) {
    return with_kind(call.log_sum_p_sq || call.softcap < kInf, rows_are_aligned(call), [&](auto full, auto aligned) {
        constexpr Sums kSums = full.value ? Sums::full : Sums::entropy;
        return launch_rows(top_stats_kernel<RW_ELEMENT, kSums, aligned.value>, call, top_blocks_of(full.value, aligned.value));
    });
}

int launch_grad(const GradCall& call) {
    const bool full = call.d_p_sq || call.softcap < kInf;
    if (call.bounds) {
        return launch_rows(full ? packed_grad_kernel<RW_ELEMENT, true> : packed_grad_kernel<RW_ELEMENT, false>, call, kPackedBlocks);
    }
    return launch_rows(full ? grad_kernel<RW_ELEMENT, true> : grad_kernel<RW_ELEMENT, false>, call, blocks_of(full, kGradBlocks), kGradThreads);
}

/// Launches as many blocks as fit. If their rows exceed the L2 cache, the second read comes from
/// memory, but enough loads are in flight.
int launch_loss_grad(const LossGradCall& call) {
    return with_kind(call.reads_p_sq || call.softcap < kInf, rows_are_aligned(call), [&](auto full, auto aligned) {
        return launch_rows(loss_grad_kernel<RW_ELEMENT, full.value, aligned.value>, call, full.value ? 2 : RW_RULE_BLOCKS);
    });
}

}  // namespace

const StreamingKernels RW_CONCAT(streaming_, RW_DTYPE) = {launch_stats, launch_top_stats, launch_grad, launch_loss_grad};

}  // namespace reweight_ops
