// Divergences of the softmaxes of two logits tensors, and the gradient by the first. The grid is persistent, with one block
// per row. Each tensor is read once for statistics and once for a gradient. The file is compiled once per dtype of the
// first tensor; RW_ELEMENT and RW_DTYPE name the dtype.
//
// With t = (x - top)·log2(e)/T and e = 2^t a state holds, for each tensor, Σe, Σe·t and Σe·(own t - the other's t): where
// the distributions are close, the differences themselves are small.
#include "divergence.h"

#include "common/concat.h"
#include "statistics.h"

namespace reweight_ops {
namespace {

/// Columns of both tensors that a thread takes at once, for every dtype: one 16-bit vector or two
/// 32-bit vectors.
constexpr int kColumns = 8;
/// Groups of columns in flight. Two fp32 tensors, and rows that are read element by element, leave
/// registers for only one. The order of additions does not depend on it.
template <class T, class U, bool kAligned>
constexpr int kInFlight = kAligned && sizeof(T) + sizeof(U) < 8 ? 2 : 1;
constexpr int kBlocksPerProcessor = 2;

struct Side {
    float top = -kInf, sum = 0.0f, dot = 0.0f, cross = 0.0f;
};

struct State {
    Side p, q;
    float p_zero = 0.0f, q_zero = 0.0f;  // 1 if a column has p = 0 < q; q = 0 < p
};

using States = State[kWarps];

/// The scales of both tensors of a row.
struct Scales {
    float p, q;  // log2(e) / T
};

RW_DEVICE float finite_top(float top) { return top == -kInf ? 0.0f : top; }

RW_DEVICE void rebase(Side& s, float top, float shift, float others_shift) {
    const float factor = exp2_approximate(shift);
    s.cross = factor * fmaf(shift - others_shift, s.sum, s.cross);
    s.dot = factor * fmaf(shift, s.sum, s.dot);
    s.sum *= factor;
    s.top = top;
}

/// Makes the sums relative to other maxima.
RW_DEVICE void rebase(State& s, float p_top, float q_top, const Scales& scales) {
    if (p_top == s.p.top && q_top == s.q.top) return;
    // The bound: a maximum may be the lowest finite number, by which logits are masked, and -inf -
    // -inf would be NaN.
    const auto shift = [](float from, float to, float scale) { return from == -kInf || from == to ? 0.0f : fmaxf((from - to) * scale, -1e30f); };
    const float p_shift = shift(s.p.top, p_top, scales.p), q_shift = shift(s.q.top, q_top, scales.q);
    rebase(s.p, p_top, p_shift, q_shift);
    rebase(s.q, q_top, q_shift, p_shift);
}

RW_DEVICE State merge(State a, State b, const Scales& scales) {
    const float p_top = fmaxf(a.p.top, b.p.top), q_top = fmaxf(a.q.top, b.q.top);
    rebase(a, p_top, q_top, scales);
    rebase(b, p_top, q_top, scales);
    const auto add = [](const Side& x, const Side& y) { return Side{x.top, x.sum + y.sum, x.dot + y.dot, x.cross + y.cross}; };
    return {add(a.p, b.p), add(a.q, b.q), fmaxf(a.p_zero, b.p_zero), fmaxf(a.q_zero, b.q_zero)};
}

template <int kLanes>
RW_DEVICE State merge_lanes(State s, const Scales& scales) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes; lanes /= 2) {
        const auto other = [lanes](const Side& x) {
            return Side{shuffle_xor(x.top, lanes), shuffle_xor(x.sum, lanes), shuffle_xor(x.dot, lanes), shuffle_xor(x.cross, lanes)};
        };
        const Side p = other(s.p), q = other(s.q);
        s = merge(s, {p, q, shuffle_xor(s.p_zero, lanes), shuffle_xor(s.q_zero, lanes)}, scales);
    }
    return s;
}

/// log2 of a column's exponential. Only -inf has probability 0. A finite masking number may
/// overflow the product, but must not count as -inf: threads that see only such numbers would
/// disagree with the others.
RW_DEVICE float exponent(float x, float base, float scale) {
    const float t = (x - base) * scale;
    return t < -1e30f && x > -kInf ? -1e30f : t;
}

/// The sums of n columns. kPlain: no column is -inf and no difference overflows, so that no column
/// needs a check.
template <bool kPlain, int n>
RW_DEVICE void add(State& s, const float (&x)[n], const float (&y)[n], float p_base, float q_base, const Scales& scales) {
    Side p, q;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        const float t = kPlain ? (x[j] - p_base) * scales.p : exponent(x[j], p_base, scales.p);
        const float u = kPlain ? (y[j] - q_base) * scales.q : exponent(y[j], q_base, scales.q);
        const bool p_masked = !kPlain && t == -kInf, q_masked = !kPlain && u == -kInf;
        const float e = exp2_approximate(t), f = exp2_approximate(u), d = p_masked || q_masked ? 0.0f : t - u;
        p.sum += e;
        q.sum += f;
        p.dot = fmaf(e, p_masked ? 0.0f : t, p.dot);
        q.dot = fmaf(f, q_masked ? 0.0f : u, q.dot);
        p.cross = fmaf(e, d, p.cross);
        q.cross = fmaf(f, -d, q.cross);
        if (p_masked != q_masked) (p_masked ? s.p_zero : s.q_zero) = 1.0f;
    }
    s.p.sum += p.sum, s.p.dot += p.dot, s.p.cross += p.cross;
    s.q.sum += q.sum, s.q.dot += q.dot, s.q.cross += q.cross;
}

/// Adds n columns of both tensors to a thread's sums. A NaN does not change the maximum, but makes
/// the sum NaN.
template <bool kCapped, int n>
RW_DEVICE void absorb(State& s, float (&x)[n], float (&y)[n], const Scales& scales, const Softcap& p_cap, const Softcap& q_cap) {
    constexpr float kLarge = 1e20f;
    float p_top = s.p.top, q_top = s.q.top, low = kLarge;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        if constexpr (kCapped) {
            if (p_cap.on) p_cap.apply(x[j]);
            if (q_cap.on) q_cap.apply(y[j]);
        }
        p_top = fmaxf(p_top, x[j]);
        q_top = fmaxf(q_top, y[j]);
        low = fminf(low, fminf(x[j], y[j]));
    }
    rebase(s, p_top, q_top, scales);
    const float p_base = finite_top(p_top), q_base = finite_top(q_top);
    if (!kCapped && low > -kLarge && fmaxf(p_top, q_top) < kLarge) {
        add<true>(s, x, y, p_base, q_base, scales);
    } else {
        add<false>(s, x, y, p_base, q_base, scales);
    }
}

/// A group of columns in its memory format.
template <class T>
struct Group8 {
    static constexpr int kVectors = kColumns / kPerVector<T>;
    Vector v[kVectors];

    RW_DEVICE void load(const T* p, bool aligned) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) v[k] = load_vector(p + k * kPerVector<T>, aligned);
    }
    RW_DEVICE void unpack_to(float* x) const {
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

/// Loads the groups begin, begin + kThreads, ... that are in flight together, then calls f(first
/// column, columns of one tensor, of the other) for each.
template <class T, class U, bool kAligned, class F>
RW_DEVICE void for_each_group(const Rows<T, U>& row, int begin, int groups, const F& f) {
    constexpr int kGroups = kInFlight<T, U, kAligned>;
    Group8<T> x[kGroups];
    Group8<U> y[kGroups];
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
        const int64_t i = begin + u * kThreads;
        if (i >= groups) continue;
        x[u].load(row.x + i * kColumns, kAligned);
        y[u].load(row.y + i * kColumns, kAligned);
    }
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
        const int64_t i = begin + u * kThreads;
        if (i >= groups) continue;
        float a[kColumns], b[kColumns];
        x[u].unpack_to(a);
        y[u].unpack_to(b);
        f(i * kColumns, a, b);
    }
}

/// A thread's sums: its groups in the order of columns, then one column after the last whole group.
template <class T, class U, bool kCapped, bool kAligned>
RW_DEVICE State sweep_statistics(const Rows<T, U>& row, int columns, const Softcap& p_cap, const Softcap& q_cap) {
    State s;
    const int groups = columns / kColumns;
    for (int begin = thread_index(); begin < groups; begin += kInFlight<T, U, kAligned> * kThreads) {
        for_each_group<T, U, kAligned>(row, begin, groups, [&](int64_t, auto& a, auto& b) { absorb<kCapped>(s, a, b, row.scales, p_cap, q_cap); });
    }
    const int tail = groups * kColumns + thread_index();
    if (tail < columns) {
        float a[1] = {widen(row.x[tail])}, b[1] = {widen(row.y[tail])};
        absorb<kCapped>(s, a, b, row.scales, p_cap, q_cap);
    }
    return s;
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
            const double log_s = u.sum > 0 ? log2_of(u.sum) : double(kNaN);
            return DivergenceSums{u.sum, u.dot, u.cross, log_s, double(u.top) / double(temperature) + log_s * kLn2, zero > 0};
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

/// Sweeps from the last group to the first: the L2 cache still has what the statistics sweep read
/// last. It may write in place.
template <class T, class U, bool kCapped, bool kAligned>
RW_DEVICE void sweep_gradient(const Rows<T, U>& row, T* out, int columns, const Gradient& g, const Softcap& p_cap, const Softcap& q_cap) {
    const int groups = columns / kColumns, tail = groups * kColumns + thread_index();
    const auto one = [&](float x, float y) { return gradient_of<kCapped>(x, y, g, row.scales, p_cap, q_cap); };
    if (tail < columns) narrow(one(widen(row.x[tail]), widen(row.y[tail])), out[tail]);
    constexpr int kStep = kInFlight<T, U, kAligned> * kThreads;
    for (int begin = (groups - 1) / kStep * kStep + thread_index(); begin >= 0; begin -= kStep) {
        for_each_group<T, U, kAligned>(row, begin, groups, [&](int64_t column, auto& a, auto& b) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) a[j] = one(a[j], b[j]);
#pragma unroll
            for (int k = 0; k < Group8<T>::kVectors; ++k) store_vector(out + column + k * kPerVector<T>, pack<T>(a + k * kPerVector<T>), kAligned);
        });
    }
}

/// Writes one value to columns [from, to).
template <class T>
RW_DEVICE void fill(T* out, int from, int to, float value) {
    for (int64_t i = from + thread_index(); i < to; i += kThreads) narrow(value, out[i]);
}

template <class T, class U, bool kCapped>
RW_KERNEL(kThreads, kBlocksPerProcessor) divergence_kernel(RW_PARAMETER DivergenceCall call) {
    // Two of each: while some threads still read those of one row, others write those of the next.
    RW_SHARED(DoubleBuffer<States>, states);
    RW_SHARED(DoubleBuffer<Gradient>, gradients);
    const Softcap p_cap(call.softcap), q_cap(call.q.softcap);
    const int columns = int(call.vocab_size);
    int buffer = 0;
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        T* const out = call.out ? static_cast<T*>(call.out) + call.out_strides.offset(i) : nullptr;
        if (is_ignored(call, i)) {
            if (call.table && thread_index() == 0) put_column(call.table, call.rows, i, {});
            if (out) fill(out, 0, int(call.columns), 0.0f);
            continue;
        }
        const Rows<T, U> row(call, i);
        const bool aligned = is_aligned(row.x) && is_aligned(row.y);
        if (call.table) {
            State s = aligned ? sweep_statistics<T, U, kCapped, true>(row, columns, p_cap, q_cap)
                              : sweep_statistics<T, U, kCapped, false>(row, columns, p_cap, q_cap);
            s = merge_lanes<32>(s, row.scales);
            if (thread_index() % 32 == 0) states[buffer][thread_index() / 32] = s;
            barrier();
            if (thread_index() < 32) s = merge_lanes<kWarps>(states[buffer][thread_index() % kWarps], row.scales);
            if (thread_index() == 0) {
                const Known known(s, row);
                put_column(call.table, call.rows, i, known.values);
                if (out) {
                    const float w = call.weights[i];
                    gradients[buffer] = Gradient(known, call.constants[0] * w, call.constants[1] * w, call.constants[2] * w, row);
                }
            }
        } else if (thread_index() == 0) {
            const float* const c = call.derivatives + i;
            gradients[buffer] = Gradient(Known(call.known, call.rows, i), c[0], c[call.rows], c[2 * call.rows], row);
        }
        if (out) {
            barrier();
            const Gradient& g = gradients[buffer];
            if (g.fill) {
                fill(out, 0, columns, g.value);
            } else if (aligned && is_aligned(out)) {
                sweep_gradient<T, U, kCapped, true>(row, out, columns, g, p_cap, q_cap);
            } else {
                sweep_gradient<T, U, kCapped, false>(row, out, columns, g, p_cap, q_cap);
            }
            fill(out, columns, int(call.columns), 0.0f);
        }
        buffer ^= 1;
    }
}

// ---- launches

/// Two blocks per processor, because one waits at barriers. One block if the rows in flight exceed
/// half of the cache that the second read needs.
template <class U>
int launch_rows(const DivergenceCall& call) {
    const Device device = device_of(call.device);
    if (device.status) return device.status;
    const int64_t row_bytes = call.vocab_size * int64_t(sizeof(RW_ELEMENT) + sizeof(U));
    const bool reads_twice = call.table && call.out, large = kBlocksPerProcessor * device.processors * row_bytes > device.l2_bytes / 2;
    const int64_t blocks = int64_t(device.processors) * (reads_twice && large ? 1 : kBlocksPerProcessor);
    const bool capped = call.softcap < kInf || call.q.softcap < kInf;
    return launch(capped ? divergence_kernel<RW_ELEMENT, U, true> : divergence_kernel<RW_ELEMENT, U, false>,
                  {call.rows < blocks ? call.rows : blocks, kThreads}, call);
}

int launch_divergence(const DivergenceCall& call) {
    if (call.rows == 0) return 0;
    switch (call.q.dtype) {
        case DType::bf16: return launch_rows<Bf16>(call);
        case DType::f16: return launch_rows<F16>(call);
        default: return launch_rows<float>(call);
    }
}

}  // namespace

const DivergenceLaunch RW_CONCAT(divergence_, RW_DTYPE) = launch_divergence;

}  // namespace reweight_ops
