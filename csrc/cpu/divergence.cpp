// Two logits tensors at one instruction-set level: divergences of their softmaxes, and the gradient by the first. Compiled once per level.
#include "divergence.h"

#include "parallel.h"
#include "sweeps.h"

namespace reweight_ops {
namespace {

// Columns in their own order, whatever the dtype: a lane must hold the same column of both tensors. (load2 splits 16-bit pairs by parity.)
typedef uint16_t VecH __attribute__((vector_size(2 * kWidth)));

inline Vec get(const float* p) { return load(p); }
inline Vec get(const Bf16* p) { return (Vec)(__builtin_convertvector(load<VecH>(p), VecU) << 16); }
inline void put(float* p, Vec v) { store(p, v); }
inline void put(Bf16* p, Vec v) { store(p, __builtin_convertvector(round_to_bf16(v) >> 16, VecH)); }
#if defined(__AVX512F__)
inline Vec get(const F16* p) { return _mm512_cvtph_ps(load<__m256i>(p)); }
inline void put(F16* p, Vec v) { store(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
inline Vec get(const F16* p) { return _mm256_cvtph_ps(load<__m128i>(p)); }
inline void put(F16* p, Vec v) { store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Vec get(const F16* p) { return widen_f16(__builtin_convertvector(load<VecH>(p), VecU)); }
inline void put(F16* p, Vec v) { store(p, __builtin_convertvector(narrow_f16(v), VecH)); }
#endif

/// The first n < kWidth elements at p, the rest -inf.
template <class T>
inline Vec get_partial(const T* p, int64_t n) {
    T padded[kWidth];
    put(padded, splat(-kInf));
    std::memcpy(padded, p, n * sizeof(T));
    return get(padded);
}
template <class T>
inline void put_partial(T* p, int64_t n, Vec v) {
    T padded[kWidth];
    put(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}
/// Two vectors past the caches, where the level can; p must be aligned to 64 bytes.
template <class T>
inline void put2_past(T* p, Vec a, Vec b) {
    alignas(64) T both[2 * kWidth];
    put(both, a);
    put(both + kWidth, b);
#if defined(__AVX512F__)
    for (size_t i = 0; i < sizeof both; i += 64) _mm512_stream_si512((__m512i*)((char*)p + i), _mm512_load_si512((char*)both + i));
#elif defined(__AVX2__)
    for (size_t i = 0; i < sizeof both; i += 32) _mm256_stream_si256((__m256i*)((char*)p + i), _mm256_load_si256((__m256i*)((char*)both + i)));
#else
    std::memcpy(p, both, sizeof both);
#endif
}

/// Columns of one block: 32 additions for each lane of two accumulators.
constexpr int64_t kPairBlock = 64 * kWidth;

/// Online sums of one row of both tensors, relative to a reference each. With t = log2(e)·x - ref and e = 2^t:
/// sum = Σ e, dot = Σ e·t, cross = Σ e·(own t - the other's t). Differences are summed as such: where the distributions are close, they are small.
struct PairState {
    struct Side {
        double ref = -kInf, sum = 0, dot = 0, cross = 0;
        double shift_to(double to) const { return ref == -kInf ? 0.0 : ref - to; }
        void rebase(double to, double shift, double others_shift) {
            const double factor = std::exp2(shift);
            cross = factor * (cross + (shift - others_shift) * sum);
            dot = factor * (dot + shift * sum);
            sum *= factor;
            ref = to;
        }
        double log_sum() const { return sum > 0 ? std::log2(sum) : double(kNaN); }
    } p, q;
    bool p_zero = false, q_zero = false;  // a column has p = 0 < q; q = 0 < p

    void rebase(double p_to, double q_to) {
        const double p_shift = p.shift_to(p_to), q_shift = q.shift_to(q_to);
        p.rebase(p_to, p_shift, q_shift);
        q.rebase(q_to, q_shift, p_shift);
    }
};

struct Accumulated {
    Vec top = splat(-kInf), sum{}, dot{}, cross{};
};

struct PairAccumulator {
    Accumulated p, q;
    VecI p_zero{}, q_zero{};

    /// One vector of both. kDead: columns may be -inf, which is a probability of 0.
    template <bool kDead>
    void add(Vec x, Vec y, const Shift& p_shift, const Shift& q_shift, const Exp2<5>& exponential, const Softcap& p_cap, const Softcap& q_cap) {
        Vec slope;
        if (p_cap.on) p_cap.apply(x, slope);
        if (q_cap.on) q_cap.apply(y, slope);
        p.top = max(p.top, x);
        q.top = max(q.top, y);
        Vec s = p_shift(x), t = q_shift(y);
        const Vec e = exponential(s), f = exponential(t);
        Vec d = s - t;
        if constexpr (kDead) {
            const VecI p_dead = s == splat(-kInf), q_dead = t == splat(-kInf);
            d = select(p_dead | q_dead, splat(0.0f), d);
            s = select(p_dead, splat(0.0f), s);
            t = select(q_dead, splat(0.0f), t);
            p_zero |= p_dead & ~q_dead;
            q_zero |= q_dead & ~p_dead;
        }
        p.sum += e;
        q.sum += f;
        p.dot = fma(e, s, p.dot);
        q.dot = fma(f, t, q.dot);
        p.cross = fma(e, d, p.cross);
        q.cross = fma(f, d, q.cross);  // of the opposite sign
    }
};

inline bool any(VecI v) {
    int32_t lanes[kWidth], seen = 0;
    store(lanes, v);
    for (int32_t lane : lanes) seen |= lane;
    return seen != 0;
}

struct PairBlock {
    float p_top, q_top;
    PairState::Side p, q;
    bool p_zero, q_zero;
    bool finite() const { return std::isfinite(p.dot + q.dot + p.cross + q.cross); }
};

struct Caps {
    Softcap p, q;
};

template <bool kDead, class T, class U>
inline PairBlock sweep_pair_block(const T* x, const U* y, int64_t n, const Shift& p_shift, const Shift& q_shift, const Exp2<5>& exponential, const Caps& caps) {
    PairAccumulator acc[2];
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        fetch<2 * kWidth * sizeof(T)>((const char*)(x + i) + kFetchAhead);
        fetch<2 * kWidth * sizeof(U)>((const char*)(y + i) + kFetchAhead);
        acc[0].add<kDead>(get(x + i), get(y + i), p_shift, q_shift, exponential, caps.p, caps.q);
        acc[1].add<kDead>(get(x + i + kWidth), get(y + i + kWidth), p_shift, q_shift, exponential, caps.p, caps.q);
    }
    for (; i < n; i += kWidth) {
        const int64_t rest = n - i;
        if (rest >= kWidth) {
            acc[0].add<kDead>(get(x + i), get(y + i), p_shift, q_shift, exponential, caps.p, caps.q);
        } else {  // padded with -inf on both sides: nothing
            acc[1].add<true>(get_partial(x + i, rest), get_partial(y + i, rest), p_shift, q_shift, exponential, caps.p, caps.q);
        }
    }
    const Vec zero{};
    const auto side = [&](const Accumulated& u, const Accumulated& v, double sign) {
        PairState::Side s;
        s.sum = sum4(u.sum, v.sum, zero, zero);
        s.dot = sum4(u.dot, v.dot, zero, zero);
        s.cross = sign * sum4(u.cross, v.cross, zero, zero);
        return s;
    };
    return {largest(max(acc[0].p.top, acc[1].p.top)), largest(max(acc[0].q.top, acc[1].q.top)), side(acc[0].p, acc[1].p, 1.0),
            side(acc[0].q, acc[1].q, -1.0), any(acc[0].p_zero | acc[1].p_zero), any(acc[0].q_zero | acc[1].q_zero)};
}

/// One row of both tensors, and its constants.
template <class T, class U>
struct PairRow {
    const T* x;
    const U* y;
    float x_scale, y_scale;
    double inverse_temperature;

    PairRow(const DivergenceCall& call, int64_t i)
        : x((const T*)call.logits + call.strides.offset(i)), y((const U*)call.q.logits + call.q.strides.offset(i)) {
        inverse_temperature = 1.0 / call.temperature[call.temperature_per_row ? i : 0];
        x_scale = float(kLog2e * inverse_temperature);
        y_scale = float(kLog2e / call.q.temperature[call.q.temperature_per_row ? i : 0]);
    }

    PairState sweep(int64_t columns, const Caps& caps) const {
        PairState row;
        const Exp2<5> exponential(1.0);
        const auto raised = [](double ref, float top, float scale) {
            const double t = double(top) * scale;
            return t > ref + kMargin ? Shift(scale, t).ref : ref;
        };
        const auto finite = [](double ref) { return ref == -kInf ? 0.0 : ref; };  // a block of -inf may hold a NaN
        for (int64_t begin = 0; begin < columns; begin += kPairBlock) {
            const int64_t n = columns - begin < kPairBlock ? columns - begin : kPairBlock;
            double p_ref = row.p.ref, q_ref = row.q.ref;
            if (p_ref == -kInf) p_ref = raised(p_ref, block_top(x + begin, n, caps.p), x_scale);
            if (q_ref == -kInf) q_ref = raised(q_ref, block_top(y + begin, n, caps.q), y_scale);
            const auto sweep = [&](auto dead) {
                return sweep_pair_block<decltype(dead)::value>(x + begin, y + begin, n, Shift(x_scale, finite(p_ref)), Shift(y_scale, finite(q_ref)),
                                                               exponential, caps);
            };
            PairBlock block = sweep(std::false_type{});
            const double p_wanted = raised(p_ref, block.p_top, x_scale), q_wanted = raised(q_ref, block.q_top, y_scale);
            if (p_wanted != p_ref || q_wanted != q_ref) {
                p_ref = p_wanted;
                q_ref = q_wanted;
                block = sweep(std::false_type{});
            }
            if (!block.finite()) block = sweep(std::true_type{});  // 0 * -inf
            if (p_ref != row.p.ref || q_ref != row.q.ref) row.rebase(p_ref, q_ref);
            const auto add = [](PairState::Side& to, const PairState::Side& more) {
                to.sum += more.sum;
                to.dot += more.dot;
                to.cross += more.cross;
            };
            add(row.p, block.p);
            add(row.q, block.q);
            row.p_zero |= block.p_zero;
            row.q_zero |= block.q_zero;
        }
        return row;
    }
};

PairStats stats_of(const PairState& s) {
    const auto sums = [](const PairState::Side& u, bool zero) {
        const double log_sum = u.log_sum();
        return PairSums{u.sum, u.dot, u.cross, log_sum, (u.ref + log_sum) * kLn2, zero};
    };
    return pair_stats(sums(s.p, s.p_zero), sums(s.q, s.q_zero));
}
PairStats known_stats(const DivergenceCall& call, int64_t i) {
    const auto row = [&](int k) { return double(call.known[k * call.rows + i]); };
    return {row(0), row(1), row(2), row(3), row(4) + row(5), row(6) + row(7)};
}
void put_stats(const DivergenceCall& call, int64_t i, const PairStats& s) {
    float values[kDivergenceTable];
    round_to_table(s, values);
    put_column(call.table, call.rows, i, values);
}

/// The gradient row, in one sweep of both: p·(a + b·log2 p + c·log2(p/q)) - f·q. kLogs: b or c or a soft cap.
template <class T, class U, bool kLogs, bool kStream>
void pair_grad_row(const PairRow<T, U>& row, T* g, int64_t columns, const PairStats& s, const double (&coefs)[3], const Caps& caps) {
    // p = e·2^(ref - lse): what is lost by rounding the reference goes into the factors.
    const Shift p_shift(row.x_scale, s.p_lse * kLog2e), q_shift(row.y_scale, s.q_lse * kLog2e);
    const double p_rest = p_shift.ref - s.p_lse * kLog2e, q_rest = q_shift.ref - s.q_lse * kLog2e, t = row.inverse_temperature;
    double constant = coefs[0], by_log = 0, by_ratio = 0;
    if (coefs[1] != 0) {
        constant -= coefs[1] * s.reverse;
        by_ratio = coefs[1] * kLn2;
    }
    if (coefs[2] != 0) {
        constant -= coefs[2] * s.entropy;
        by_log = -coefs[2] * kLn2;
    }
    constant += by_log * p_rest + by_ratio * (p_rest - q_rest);
    const double p_factor = std::exp2(p_rest) * t, q_factor = std::exp2(q_rest) * t;
    const Vec a = splat(float(p_factor * constant)), b = splat(float(p_factor * by_log)), c = splat(float(p_factor * by_ratio));
    const Vec f = splat(float(-q_factor * coefs[0]));
    const Exp2<5> exponential(1.0);
    const auto one = [&](Vec x, Vec y) {
        Vec slope = splat(1.0f), ignored;
        const VecI dead = x == splat(-kInf);
        if constexpr (kLogs) {
            if (caps.p.on) caps.p.apply(x, slope);
            if (caps.q.on) caps.q.apply(y, ignored);
        }
        const Vec u = p_shift(x), v = q_shift(y);
        const Vec e = exponential(u), w = f * exponential(v);
        Vec r;
        if constexpr (kLogs) {
            // p is 0 below the floor, and 0 times anything finite is 0; where q is 0 and p is not, the row was filled with NaN.
            const Vec s1 = max(splat(kFloor), u), s2 = max(splat(-1e30f), v);
            r = (e * fma(s1, b, fma(s1 - s2, c, a)) + w) * slope;
        } else {
            r = e * a + w;  // two roundings: where p and q are equal, so are both products
        }
        return select(dead, splat(0.0f), r);
    };
    int64_t i = 0;
    for (; i + 2 * kWidth <= columns; i += 2 * kWidth) {
        const Vec r1 = one(get(row.x + i), get(row.y + i)), r2 = one(get(row.x + i + kWidth), get(row.y + i + kWidth));
        if constexpr (kStream) {
            put2_past(g + i, r1, r2);
        } else {
            put(g + i, r1);
            put(g + i + kWidth, r2);
        }
    }
    for (; i < columns; i += kWidth) {
        const int64_t rest = columns - i < kWidth ? columns - i : kWidth;
        put_partial(g + i, rest, one(get_partial(row.x + i, rest), get_partial(row.y + i, rest)));
    }
}

template <class T, class U>
void write_pair_grad(const DivergenceCall& call, const PairRow<T, U>& row, int64_t i, const PairStats& s, const double (&coefs)[3], const Caps& caps) {
    T* g = (T*)call.out + call.out_strides.offset(i);
    const int64_t v = call.vocab_size;
    const bool sick = s.p_lse != s.p_lse || s.q_lse != s.q_lse || (coefs[1] != 0 && s.reverse == kInf);
    if (coefs[0] == 0 && coefs[1] == 0 && coefs[2] == 0) {
        fill(g, call.columns, 0.0f);
        return;
    }
    if (sick) {
        fill(g, v, kNaN);
    } else {
        const bool large = call.out != call.logits && call.rows * call.columns * int64_t(sizeof(T)) > kCacheBytes;
        const bool stream = large && (uintptr_t)g % 64 == 0, logs = coefs[1] != 0 || coefs[2] != 0 || caps.p.on || caps.q.on;
        if (logs) {
            stream ? pair_grad_row<T, U, true, true>(row, g, v, s, coefs, caps) : pair_grad_row<T, U, true, false>(row, g, v, s, coefs, caps);
        } else {
            stream ? pair_grad_row<T, U, false, true>(row, g, v, s, coefs, caps) : pair_grad_row<T, U, false, false>(row, g, v, s, coefs, caps);
        }
        if (stream) stream_fence();
    }
    if (call.columns > v) fill(g + v, call.columns - v, 0.0f);
}

// ---- the verbs

template <class T, class U>
struct Pair {
    template <class Body>
    static void rows(const DivergenceCall& call, const Body& body) {
        for_each_row(call.rows, 2 * call.columns, threads_for(call.rows, 2 * call.columns, call.threads), [&](int64_t i, int64_t) { body(i); });
    }
    static void out_row(const DivergenceCall& call, int64_t i) {
        put_column(call.table, call.rows, i, {});
    }

    static void stats(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_out(call, i)) return out_row(call, i);
            put_stats(call, i, stats_of(PairRow<T, U>(call, i).sweep(call.vocab_size, caps)));
        });
    }

    static void grad(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_out(call, i)) return fill((T*)call.out + call.out_strides.offset(i), call.columns, 0.0f);
            double coefs[3];
            for (int k = 0; k < 3; ++k) coefs[k] = call.coefs[k * call.rows + i];
            write_pair_grad(call, PairRow<T, U>(call, i), i, known_stats(call, i), coefs, caps);
        });
    }

    static void loss_grad(const DivergenceCall& call) {
        const Caps caps{Softcap(call.softcap), Softcap(call.q.softcap)};
        rows(call, [&](int64_t i) {
            if (is_out(call, i)) {
                out_row(call, i);
                return fill((T*)call.out + call.out_strides.offset(i), call.columns, 0.0f);
            }
            const PairRow<T, U> row(call, i);
            const PairStats s = stats_of(row.sweep(call.vocab_size, caps));
            put_stats(call, i, s);
            double coefs[3];
            for (int k = 0; k < 3; ++k) coefs[k] = double(call.constants[k]) * call.weights[i];
            write_pair_grad(call, row, i, s, coefs, caps);
        });
    }
};

template <class T, class F>
void by_second(DType dtype, const F& f) {
    switch (dtype) {
        case DType::f32: return f(Pair<T, float>{});
        case DType::bf16: return f(Pair<T, Bf16>{});
        case DType::f16: return f(Pair<T, F16>{});
    }
}
template <class F>
void by_dtypes(const DivergenceCall& call, const F& f) {
    switch (call.dtype) {
        case DType::f32: return by_second<float>(call.q.dtype, f);
        case DType::bf16: return by_second<Bf16>(call.q.dtype, f);
        case DType::f16: return by_second<F16>(call.q.dtype, f);
    }
}

void divergence_stats(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.stats(call); });
}
void divergence_grad(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.grad(call); });
}
void divergence_loss_grad(const DivergenceCall& call) {
    by_dtypes(call, [&](auto pair) { pair.loss_grad(call); });
}

}  // namespace

#define RW_CONCAT_(a, b) a##b
#define RW_CONCAT(a, b) RW_CONCAT_(a, b)
extern const DivergenceKernels RW_CONCAT(divergence_, RW_LEVEL);
const DivergenceKernels RW_CONCAT(divergence_, RW_LEVEL) = {divergence_stats, divergence_grad, divergence_loss_grad};

}  // namespace reweight_ops
