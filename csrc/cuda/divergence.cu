// Divergences of the softmaxes of two logits tensors, and the gradient by the first. Each tensor is read once for
// statistics and once for a gradient. The file is compiled once per dtype of the first tensor; RW_ELEMENT and RW_DTYPE
// name the dtype.
//
// A row is cut into slices, by its length alone, so that two launches of one kernel give the same bits. Either the grid is
// persistent, and a block takes whole rows. Or, for few long rows on sm_90 and later, a cluster has a block for each slice
// of one row: the blocks send each other the sums of their warps, and each writes its part of the gradient.
#include "divergence.h"

#include "asynchronous.h"
#include "common/concat.h"
#include "divergence_sums.h"
#include "variants.h"

namespace reweight_ops {
namespace {

/// Groups of columns in flight. Two fp32 tensors, and rows that are read element by element, leave
/// registers for only one. The order of additions does not depend on it.
template <class T, class U, bool kAligned>
constexpr int kInFlight = kAligned && sizeof(T) + sizeof(U) < 8 ? 2 : 1;

/// The groups of columns of one tensor's row, from x on. kAligned: x is a multiple of 16 bytes.
template <class T, bool kAligned>
struct Groups {
    static constexpr int kVectors = kColumns / kPerVector<T>;
    using Group = Vector[kVectors];
    ShiftedRow<T> row;

    RW_DEVICE Groups(const T* x, int columns) : row(x, columns / kPerVector<T>) {}
    RW_DEVICE void load(Group& v, int group) const {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const int i = group * kVectors + k;
            v[k] = kAligned ? load16(row.x + int64_t(i) * kPerVector<T>) : row.load(i);
        }
    }
    RW_DEVICE static void unpack_to(const Group& v, float* x) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) unpack<T>(v[k], x + k * kPerVector<T>);
    }
};

/// A row of both tensors.
template <class T, class U>
struct Rows {
    const T* x;
    const U* y;
    float p_temperature, q_temperature;
    Scales scales;

    RW_DEVICE Rows(const DivergenceCall& call, int64_t i) {
        x = row_of<T>(call, i);
        y = row_of<U>(call.q, i);
        p_temperature = temperature_of(call, i);
        q_temperature = temperature_of(call.q, i);
        scales = {kLog2ef / p_temperature, kLog2ef / q_temperature};
    }
};

/// Loads the groups at, at + kThreads, ... that are in flight together, then calls f(group, columns
/// of one tensor, of the other) for each that is below `end`.
template <class T, class U, bool kAligned, class F>
RW_DEVICE void for_each_group(const Groups<T, kAligned>& of_x, const Groups<U, kAligned>& of_y, int at, int end, const F& f) {
    constexpr int kGroups = kInFlight<T, U, kAligned>;
    typename Groups<T, kAligned>::Group x[kGroups];
    typename Groups<U, kAligned>::Group y[kGroups];
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
        const int i = at + u * kThreads;
        if (i >= end) continue;
        of_x.load(x[u], i);
        of_y.load(y[u], i);
    }
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
        const int i = at + u * kThreads;
        if (i >= end) continue;
        float a[kColumns], b[kColumns];
        of_x.unpack_to(x[u], a);
        of_y.unpack_to(y[u], b);
        f(i, a, b);
    }
}

/// A thread's sums of a slice: its groups in the order of columns. The last slice also has the
/// columns after the last whole group, one per thread.
template <class T, class U, bool kCapped, bool kAligned>
RW_DEVICE State sweep_slice(const Rows<T, U>& row, int columns, const DivergenceSlices& slices, int slice, const Softcap& p_cap,
                            const Softcap& q_cap) {
    State s;
    const Groups<T, kAligned> x(row.x, columns);
    const Groups<U, kAligned> y(row.y, columns);
    const int end = slices.end(slice);
    for (int at = slices.begin(slice) + thread_index(); at < end; at += kInFlight<T, U, kAligned> * kThreads) {
        for_each_group<T, U, kAligned>(x, y, at, end, [&](int, auto& a, auto& b) { absorb<kCapped>(s, a, b, row.scales, p_cap, q_cap); });
    }
    const int tail = slices.groups * kColumns + thread_index();
    if (slice == slices.count - 1 && tail < columns) {
        float a[1] = {widen(row.x[tail])}, b[1] = {widen(row.y[tail])};
        absorb<kCapped>(s, a, b, row.scales, p_cap, q_cap);
    }
    return s;
}

/// Where most of a warp's mass is in its largest column of a tensor, the thread with this column has
/// lost its others to rounding: the warp sums that thread's columns again.
template <class T, bool kCapped>
RW_DEVICE void sum_again(Side& own, const Side& merged, const T* x, int columns, const DivergenceSlices& slices, int slice, float scale,
                         const Softcap& cap) {
    if (!(merged.sum < kRoundedAway) || merged.top == -kInf) return;
    const int lane = thread_index() % 32, owner = thread_index() - lane + lowest_bit(leaders(own, merged.top));
    const Partial again = sum_again<kCapped ? Sums::full : Sums::entropy>(merged.top, scale, cap, [&](const auto& f) {
        for (int group = slices.begin(slice) + owner + lane * kThreads; group < slices.end(slice); group += 32 * kThreads) {
            for (int j = 0; j < kColumns; ++j) f(widen(x[group * kColumns + j]));
        }
        const int tail = slices.groups * kColumns + owner;
        if (tail < columns && slice == slices.count - 1 && lane == 0) f(widen(x[tail]));
    });
    if (thread_index() == owner) own.sum = again.rest;
}

/// The merged sums of the warp's part of a slice, in each of its lanes.
template <class T, class U, bool kCapped>
RW_DEVICE State sum_slice(const Rows<T, U>& row, int columns, const DivergenceSlices& slices, int slice, const Softcap& p_cap, const Softcap& q_cap) {
    State s = is_aligned(row.x) && is_aligned(row.y) ? sweep_slice<T, U, kCapped, true>(row, columns, slices, slice, p_cap, q_cap)
                                                     : sweep_slice<T, U, kCapped, false>(row, columns, slices, slice, p_cap, q_cap);
    s = without_top(s);
    const State merged = merge_lanes(s, row.scales);
    if (!kDivergenceSure || (!(merged.p.sum < kRoundedAway) && !(merged.q.sum < kRoundedAway))) return merged;
    sum_again<T, kCapped>(s.p, merged.p, row.x, columns, slices, slice, row.scales.p, p_cap);
    sum_again<U, kCapped>(s.q, merged.q, row.y, columns, slices, slice, row.scales.q, q_cap);
    return merge_lanes(s, row.scales);
}

/// A row of the table.
struct Known {
    float values[kDivergenceTable] = {};

    RW_DEVICE Known(const float* table, int64_t rows, int64_t i) {
        for (int k = 0; k < kDivergenceTable; ++k) values[k] = table[k * rows + i];
    }

    template <class T, class U>
    RW_DEVICE Known(const State& s, const Rows<T, U>& row) {
        const auto sums = [](const Side& u, float temperature, float zero) {
            const double log_s = u.top > -kInf && u.sum < kInf ? log1p_of(u.sum) : double(kNaN);
            return DivergenceSums{1.0 + u.sum, u.dot, u.cross, log_s * kLog2e, double(u.top) / double(temperature) + log_s, zero > 0};
        };
        round_to_table(stats_of_sums(sums(s.p, row.p_temperature, s.p_zero), sums(s.q, row.q_temperature, s.q_zero)), values);
    }
};

/// log2 of a probability is (x - center)·scale + rest. The center is T·lse, rounded. The factors
/// take the rest, so that an exponent is exactly 0, and its exponential 1, where the probability is
/// almost 1.
struct Center {
    float center, rest;

    RW_DEVICE Center(float lse, float low, float temperature, float scale) {
        const double exact = double(temperature) * (double(lse) + double(low));
        center = float(exact);
        rest = float((double(center) - exact) * double(scale));
    }
    RW_DEVICE float factor() const { return 1.0f + expm1f(rest * kLn2f); }
};

/// The gradient of a column: one value in every column if `fill`, else e_p·(constant + log·t_p +
/// ratio·(t_p - t_q)) - other·e_q times the slope of the soft cap. t = (x - center)·scale for each
/// tensor, and e = 2^t.
struct Gradient {
    bool fill;
    float value;
    float p_center, q_center;
    float constant, log, ratio, other;

    RW_DEVICE Gradient() {}
    template <class T, class U>
    RW_DEVICE Gradient(const Known& known, float forward, float reverse, float entropy, const Rows<T, U>& row) {
        const float* const v = known.values;
        const bool none = forward == 0 && reverse == 0 && entropy == 0;
        const bool is_nan = v[4] != v[4] || v[6] != v[6] || (reverse != 0 && !(fabsf(v[1]) < kInf));
        fill = none || is_nan;
        value = none ? 0.0f : kNaN;
        const float t = row.p_temperature;
        const Center p(v[4], v[5], t, row.scales.p), q(v[6], v[7], row.q_temperature, row.scales.q);
        p_center = p.center;
        q_center = q.center;
        float sum = forward;
        if (reverse != 0) sum -= reverse * v[1];
        if (entropy != 0) sum -= entropy * v[2];
        const float by_log = -entropy * kLn2f, by_ratio = reverse * kLn2f, p_factor = p.factor(), q_factor = q.factor();
        constant = p_factor * (sum + by_log * p.rest + by_ratio * (p.rest - q.rest)) / t;
        log = p_factor * by_log / t;
        ratio = p_factor * by_ratio / t;
        other = q_factor * forward / t;
    }
};

template <bool kCapped>
RW_DEVICE float gradient_of(float x, float y, const Gradient& g, const Scales& scales, const Softcap& p_cap, const Softcap& q_cap) {
    if (x == -kInf) return 0.0f;
    float slope = 1.0f;
    if constexpr (kCapped) {
        if (p_cap.on) slope = p_cap.apply(x);
        if (q_cap.on) q_cap.apply(y);
    }
    // 2^-200 is 0, and 0 times a finite number is 0. Where q is 0 and p is not, the row was already
    // filled with NaN.
    const float a = fmaxf((x - g.p_center) * scales.p, -200.0f), b = (y - g.q_center) * scales.q;
    const float p = exp2_approximate(a), q = exp2_approximate(b);
    const float factor = fmaf(a, g.log, fmaf(a - fmaxf(b, -1e30f), g.ratio, g.constant));
    return (p * factor - g.other * q) * slope;  // two roundings keep both products equal where p and q are equal
}

/// Writes one value to columns [from, to).
template <class T>
RW_DEVICE void fill(T* out, int from, int to, float value) {
    const int off = int(reinterpret_cast<uintptr_t>(out + from) & 15), ahead = (16 - off) % 16 / int(sizeof(T));
    const int begin = from + ahead < to ? from + ahead : to, vectors = (to - begin) / kPerVector<T>;
    float values[kPerVector<T>];
    for (float& v : values) v = value;
    for (int i = thread_index(); i < vectors; i += kThreads) store16(out + begin + int64_t(i) * kPerVector<T>, pack<T>(values));
    for (int i = from + thread_index(); i < begin; i += kThreads) narrow(value, out[i]);
    for (int i = begin + vectors * kPerVector<T> + thread_index(); i < to; i += kThreads) narrow(value, out[i]);
}

/// The columns of a gradient that a block writes: `head` columns before the first whole group,
/// groups [from, to), and the columns after the last one. The order of a gradient does not matter,
/// so that groups start where the gradient is aligned.
struct Written {
    int head, from, to;
    bool first, last;  // whether the block has the first slice, the last one

    template <class T>
    RW_DEVICE Written(const T* out, int columns, const DivergenceSlices& slices, int begin, int end) : first(begin == 0), last(end == slices.count) {
        head = (16 - int(reinterpret_cast<uintptr_t>(out) & 15)) % 16 / int(sizeof(T));
        if (head > columns) head = columns;
        const int groups = (columns - head) / kColumns;
        from = slices.begin(begin) < groups ? slices.begin(begin) : groups;
        to = slices.begin(end) < groups ? slices.begin(end) : groups;
    }
    RW_DEVICE int begin_column() const { return first ? 0 : head + from * kColumns; }
    RW_DEVICE int end_column(int columns) const { return last ? columns : head + to * kColumns; }
};

/// Sweeps from the last group to the first: the L2 cache still has what the statistics sweep read
/// last. It may write in place.
template <class T, class U, bool kCapped, bool kAligned>
RW_DEVICE void sweep_gradient(const Rows<T, U>& row, T* out, int columns, const Written& part, const Gradient& g, const Softcap& p_cap,
                              const Softcap& q_cap) {
    const auto one = [&](float x, float y) { return gradient_of<kCapped>(x, y, g, row.scales, p_cap, q_cap); };
    const auto write = [&](int column) { narrow(one(widen(row.x[column]), widen(row.y[column])), out[column]); };
    if (part.last) {
        for (int column = part.head + part.to * kColumns + thread_index(); column < columns; column += kThreads) write(column);
    }
    const Groups<T, kAligned> x(row.x + part.head, columns - part.head);
    const Groups<U, kAligned> y(row.y + part.head, columns - part.head);
    T* const to = out + part.head;
    constexpr int kStep = kInFlight<T, U, kAligned> * kThreads;
    for (int at = part.from + (part.to - part.from - 1) / kStep * kStep + thread_index(); at >= part.from; at -= kStep) {
        for_each_group<T, U, kAligned>(x, y, at, part.to, [&](int group, auto& a, auto& b) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) a[j] = one(a[j], b[j]);
#pragma unroll
            for (int k = 0; k < kColumns; k += kPerVector<T>) store16(to + int64_t(group) * kColumns + k, pack<T>(a + k));
        });
    }
    if (part.first && thread_index() < part.head) write(thread_index());
}

/// Writes the block's part of a row's gradient, slices [begin, end).
template <class T, class U, bool kCapped>
RW_DEVICE void write_gradient(const Rows<T, U>& row, T* out, const DivergenceCall& call, const DivergenceSlices& slices, int begin, int end,
                              const Gradient& g, const Softcap& p_cap, const Softcap& q_cap) {
    const int columns = int(call.vocab_size);
    const Written part(out, columns, slices, begin, end);
    if (g.fill) {
        fill(out, part.begin_column(), part.end_column(columns), g.value);
    } else if (is_aligned(row.x + part.head) && is_aligned(row.y + part.head)) {
        sweep_gradient<T, U, kCapped, true>(row, out, columns, part, g, p_cap, q_cap);
    } else {
        sweep_gradient<T, U, kCapped, false>(row, out, columns, part, g, p_cap, q_cap);
    }
    if (part.last) fill(out, columns, int(call.columns), 0.0f);
}

/// Writes an ignored row: the table's column, if `table`, and slices [begin, end) of the gradient.
template <class T>
RW_DEVICE void write_ignored(const DivergenceCall& call, int64_t i, T* out, const DivergenceSlices& slices, int begin, int end) {
    if (call.table && begin == 0 && thread_index() == 0) put_column(call.table, call.rows, i, {});
    if (out) fill(out, slices.begin(begin) * kColumns, end == slices.count ? int(call.columns) : slices.begin(end) * kColumns, 0.0f);
}

template <class T>
RW_DEVICE T* out_of(const DivergenceCall& call, int64_t i) {
    return call.out ? static_cast<T*>(call.out) + call.out_strides.offset(i) : nullptr;
}

/// Writes a row's column of the table, if `writes`, and the constants of its gradient from its sums.
template <class T, class U>
RW_DEVICE void finish(const DivergenceCall& call, int64_t i, const Rows<T, U>& row, const State& sums, bool writes, Gradient& gradient) {
    const Known known(sums, row);
    if (writes) put_column(call.table, call.rows, i, known.values);
    if (!call.out) return;
    const float w = call.weights[i];
    gradient = Gradient(known, call.constants[0] * w, call.constants[1] * w, call.constants[2] * w, row);
}

template <class T, class U>
RW_DEVICE Gradient known_gradient(const DivergenceCall& call, int64_t i, const Rows<T, U>& row) {
    const float* const c = call.derivatives + i;
    return Gradient(Known(call.known, call.rows, i), c[0], c[call.rows], c[2 * call.rows], row);
}

// ---- the kernel

/// What the blocks of a cluster send to a block.
struct Exchange {
    RowStates states;
    Barrier full;  // the sums of all warps of all blocks have arrived
};

RW_DEVICE Vector as_vector(float a, float b, float c, float d) { return {as_bits(a), as_bits(b), as_bits(c), as_bits(d)}; }

/// Sends a warp's sums of slice `slice` to block `to`.
RW_DEVICE void send_state(const State& s, Exchange& exchange, int slice, int to) {
    State& there = exchange.states[slice][thread_index() / 32];
    send(as_vector(s.p.top, s.p.sum, s.p.dot, s.p.cross), &there.p, exchange.full, to);
    send(as_vector(s.q.top, s.q.sum, s.q.dot, s.q.cross), &there.q, exchange.full, to);
    send(as_vector(s.p_zero, s.q_zero, 0.0f, 0.0f), &there.p_zero, exchange.full, to);
}

struct LaunchedCall : DivergenceCall {
    bool split;  // a cluster shares one row; else a block takes every n-th row of n blocks
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

template <class T, class U, bool kCapped>
RW_KERNEL(kThreads, kDivergenceBlocks) divergence_kernel(RW_PARAMETER LaunchedCall call) {
    // Two of each: while some threads still read those of one row, others write those of the next.
    RW_SHARED(DoubleBuffer<RowStates>, states);
    RW_SHARED(DoubleBuffer<Gradient>, gradients);
    RW_DYNAMIC_SHARED(bytes);  // with split rows
    Exchange& exchange = *reinterpret_cast<Exchange*>(bytes);
    const Softcap p_cap(call.softcap), q_cap(call.q.softcap);
    const int columns = int(call.vocab_size), warp = thread_index() / 32, lane = thread_index() % 32;
    const DivergenceSlices slices(columns);
    int begin = 0, end = slices.count;  // the block's slices
    int64_t i = block_index();
    if constexpr (kHasClusters) {
        if (call.split) {
            begin = cluster_rank();
            end = begin + 1;
            i = block_index() / slices.count;
        }
    }
    int buffer = 0;
    for (; i < call.rows; i += block_count()) {
        T* const out = out_of<T>(call, i);
        if (is_ignored(call, i)) {
            write_ignored(call, i, out, slices, begin, end);
            continue;
        }
        const Rows<T, U> row(call, i);
        if (call.table) {
            if constexpr (kHasClusters) {
                if (call.split) {
                    if (thread_index() == 0) {
                        initialize(exchange.full, 1);
                        publish_barriers();
                        arrive_expecting(exchange.full, slices.count * int(sizeof(exchange.states[0])));
                    }
                    cluster_barrier();  // the barriers of all blocks count before anything is sent
                }
            }
            for (int slice = begin; slice < end; ++slice) {
                const State s = sum_slice<T, U, kCapped>(row, columns, slices, slice, p_cap, q_cap);
                if constexpr (kHasClusters) {
                    if (call.split && lane < slices.count) send_state(s, exchange, slice, lane);
                }
                if (!call.split && lane == 0) states[buffer][slice][warp] = s;
            }
            if (!call.split) barrier();
            if (warp == 0) {
                // With split rows, all blocks have read their slices before the sums are complete: the
                // gradient may be written in place.
                if constexpr (kHasClusters) {
                    if (call.split) wait_for_cluster(exchange.full, 0);
                }
                const State sums = merge_row(call.split ? exchange.states : states[buffer], slices.count, row.scales);
                if (lane == 0) finish(call, i, row, sums, begin == 0, gradients[buffer]);
            }
        } else if (thread_index() == 0) {
            gradients[buffer] = known_gradient(call, i, row);
        }
        if (out) {
            barrier();
            const Gradient g = gradients[buffer];  // in registers: a store may alias what is in shared memory
            write_gradient<T, U, kCapped>(row, out, call, slices, begin, end, g, p_cap, q_cap);
        }
        buffer ^= 1;
    }
}

// ---- launches

/// Launches the kernel for the call's dtypes and soft caps: `use` gets it and the second's element
/// size.
template <class F>
int with_kernel(const DivergenceCall& call, const F& use) {
    const bool capped = call.softcap < kInf || call.q.softcap < kInf;
    const auto of = [&](auto other) {
        using U = decltype(other);
        return use(capped ? divergence_kernel<RW_ELEMENT, U, true> : divergence_kernel<RW_ELEMENT, U, false>, int64_t(sizeof(U)));
    };
    switch (call.q.dtype) {
        case DType::bf16: return of(Bf16());
        case DType::f16: return of(F16());
        default: return of(float());
    }
}

/// Two blocks per processor, because one waits at barriers. One block if the rows in flight exceed
/// half of the cache that the second read needs.
int launch_whole(const DivergenceCall& call) {
    const Device device = device_of(call.device);
    if (device.status) return device.status;
    return with_kernel(call, [&](auto kernel, int64_t other_bytes) {
        const int64_t row_bytes = call.vocab_size * (int64_t(sizeof(RW_ELEMENT)) + other_bytes);
        const bool reads_twice = call.table && call.out, large = kDivergenceBlocks * device.processors * row_bytes > device.l2_bytes / 2;
        const int64_t blocks = int64_t(device.processors) * (reads_twice && large ? 1 : kDivergenceBlocks);
        return launch(kernel, {call.rows < blocks ? call.rows : blocks, kThreads}, LaunchedCall{call, false});
    });
}

Shape split_shape(const DivergenceCall& call) {
    const int blocks = DivergenceSlices(int(call.vocab_size)).count;
    return {call.rows * blocks, kThreads, blocks, int(sizeof(Exchange))};
}

int count_clusters(const DivergenceCall& call, int& count) {
    return with_kernel(call, [&](auto kernel, int64_t) { return active_clusters(kernel, split_shape(call), call.device, count); });
}

int launch_split(const DivergenceCall& call) {
    return with_kernel(call, [&](auto kernel, int64_t) { return launch(kernel, split_shape(call), LaunchedCall{call, true}); });
}

}  // namespace

const DivergenceKernels RW_CONCAT(divergence_, RW_DTYPE) = {launch_whole, count_clusters, launch_split};

}  // namespace reweight_ops
