// The statistics sweep over a row of two logits tensors.
#pragma once

#include "common/divergence.h"
#include "sweeps.h"

namespace reweight_ops {
namespace {

// These keep columns in order for every dtype: a lane must hold the same column of both tensors.
// (load2 splits 16-bit pairs by parity.)
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

/// Loads the first n < kWidth elements at p, and -inf for the others.
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
/// Stores two vectors, past the caches if the level can. p must be aligned to 64 bytes.
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
constexpr int64_t kDivergenceBlock = 64 * kWidth;

/// Online sums of one row of both tensors, each relative to its own reference. With t = log2(e)/T·x
/// - ref and e = 2^t, sum = Σ e, dot = Σ e·t and cross = Σ e·(own t - the other's t). Differences
/// are summed directly: they are small where the distributions are close.
struct DivergenceState {
    struct Side {
        double ref = -kInf, sum = 0, dot = 0, cross = 0;
        double shift_to(double to) const { return ref == -kInf ? 0.0 : ref - to; }
        void rebase(double to, double shift, double others_shift) {
            const double factor = shift == 0 ? 1.0 : std::exp2(shift);
            cross = factor * (cross + (shift - others_shift) * sum);
            dot = factor * (dot + shift * sum);
            sum *= factor;
            ref = to;
        }
        void add(double more_sum, double more_dot, double more_cross) {
            sum += more_sum;
            dot += more_dot;
            cross += more_cross;
        }
    } p, q;
    bool p_zero = false, q_zero = false;  // a column has p = 0 < q; q = 0 < p

    void rebase(double p_to, double q_to) {
        if (p.ref == p_to && q.ref == q_to) return;
        const double p_shift = p.shift_to(p_to), q_shift = q.shift_to(q_to);
        p.rebase(p_to, p_shift, q_shift);
        q.rebase(q_to, q_shift, p_shift);
    }
    void merge(DivergenceState other) {
        const double p_to = other.p.ref > p.ref ? other.p.ref : p.ref, q_to = other.q.ref > q.ref ? other.q.ref : q.ref;
        rebase(p_to, q_to);
        other.rebase(p_to, q_to);
        p.add(other.p.sum, other.p.dot, other.p.cross);
        q.add(other.q.sum, other.q.dot, other.q.cross);
        p_zero |= other.p_zero;
        q_zero |= other.q_zero;
    }
};

struct Accumulated {
    Vec top = splat(-kInf), sum{}, dot{}, cross{};
};

/// kSlow sums differences of logs in this unit: no finite logit makes them infinite.
constexpr float kLogUnit = 1 << 10;

/// t in units of kLogUnit. It is -inf only where the logit is.
inline Vec small_log(Vec x, const Shift<true>& shift) { return (x + shift.minus) * (shift.scale * splat(1 / kLogUnit)); }

struct DivergenceAccumulator {
    Accumulated p, q;
    VecI p_zero{}, q_zero{};

    /// Adds one vector of both tensors. kDead: a column may be -inf, which is probability 0. kSlow:
    /// references may have any size, and differences are in units of kLogUnit.
    template <bool kDead, bool kSlow>
    RW_INLINE void add(Vec x, Vec y, const Shift<kSlow>& p_shift, const Shift<kSlow>& q_shift, const Exp2<5>& exponential, const Softcap& p_cap,
                       const Softcap& q_cap) {
        Vec slope;
        if (p_cap.on) p_cap.apply(x, slope);
        if (q_cap.on) q_cap.apply(y, slope);
        p.top = max(p.top, x);
        q.top = max(q.top, y);
        Vec s = p_shift(x), t = q_shift(y);
        const Vec e = exponential(s), f = exponential(t);
        Vec d = s - t;
        if constexpr (kSlow) d = small_log(x, p_shift) - small_log(y, q_shift);
        if constexpr (kDead) {
            const VecI p_masked = x == splat(-kInf), q_masked = y == splat(-kInf);
            d = select(p_masked | q_masked | ((e == splat(0.0f)) & (f == splat(0.0f))), splat(0.0f), d);
            s = select(s == splat(-kInf), splat(0.0f), s);  // e is 0 there
            t = select(t == splat(-kInf), splat(0.0f), t);
            p_zero |= p_masked & ~q_masked;
            q_zero |= q_masked & ~p_masked;
        }
        p.sum += e;
        q.sum += f;
        p.dot = fma(e, s, p.dot);
        q.dot = fma(f, t, q.dot);
        p.cross = fma(e, d, p.cross);
        q.cross = fma(f, d, q.cross);  // has the opposite sign
    }
};

struct DivergenceBlock {
    float p_top = -kInf, q_top = -kInf;
    DivergenceState state;
    bool finite() const { return std::isfinite(state.p.dot + state.q.dot + state.p.cross + state.q.cross); }
};

struct Caps {
    Softcap p, q;
};

template <bool kDead, bool kSlow, class T, class U>
inline DivergenceBlock sweep_divergence_block(const T* x, const U* y, int64_t n, const Shift<kSlow>& p_shift, const Shift<kSlow>& q_shift,
                                              const Exp2<5>& exponential, const Caps& caps) {
    DivergenceAccumulator acc[2];
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
        } else {  // the padding is -inf in both tensors and adds nothing
            acc[1].add<true>(get_partial(x + i, rest), get_partial(y + i, rest), p_shift, q_shift, exponential, caps.p, caps.q);
        }
    }
    const Vec zero{};
    const auto side = [&](const Accumulated& u, const Accumulated& v, double ref, double sign) {
        DivergenceState::Side s;
        s.ref = ref;
        s.add(sum4(u.sum, v.sum, zero, zero), sum4(u.dot, v.dot, zero, zero), sign * (kSlow ? kLogUnit : 1.0f) * sum4(u.cross, v.cross, zero, zero));
        return s;
    };
    DivergenceState state;
    state.p = side(acc[0].p, acc[1].p, p_shift.ref, 1.0);
    state.q = side(acc[0].q, acc[1].q, q_shift.ref, -1.0);
    state.p_zero = any(acc[0].p_zero | acc[1].p_zero);
    state.q_zero = any(acc[0].q_zero | acc[1].q_zero);
    return {largest(max(acc[0].p.top, acc[1].p.top)), largest(max(acc[0].q.top, acc[1].q.top)), state};
}

/// The statistics of a row, and the anchors of its probabilities.
struct DivergenceResult {
    DivergenceStats stats;
    Anchor p, q;
};

/// One row of both tensors with its constants.
template <class T, class U>
struct DivergenceRow {
    const T* x;
    const U* y;
    double inverse_temperature, x_scale, y_scale;  // a scale is log2(e) / T

    DivergenceRow(const DivergenceCall& call, int64_t i) : x(row_of<T>(call, i)), y(row_of<U>(call.q, i)) {
        inverse_temperature = 1.0 / temperature_of(call, i);
        x_scale = kLog2e * inverse_temperature;
        y_scale = kLog2e / temperature_of(call.q, i);
    }
};

/// Sweeps a row of both tensors. It keeps the block with the largest column of each apart: in a
/// sure row, that block is summed again without this column.
template <class T, class U>
class DivergenceSweeper {
public:
    DivergenceSweeper(const DivergenceRow<T, U>& row, const Caps& caps) : row_(row), caps_(caps) {}

    DivergenceResult operator()(int64_t columns) {
        columns_ = columns;
        for (int64_t begin = 0; begin < columns; begin += kDivergenceBlock) {
            const int64_t n = size_at(begin);
            if (p_at_ == -kInf) p_at_ = block_top(row_.x + begin, n, caps_.p);
            if (q_at_ == -kInf) q_at_ = block_top(row_.y + begin, n, caps_.q);
            DivergenceBlock block = sweep(begin, n);
            const bool p_higher = higher(block.p_top, p_at_, row_.x_scale), q_higher = higher(block.q_top, q_at_, row_.y_scale);
            if (p_higher || q_higher) {
                if (p_higher) p_at_ = block.p_top;
                if (q_higher) q_at_ = block.q_top;
                block = sweep(begin, n);
            }
            keep(block, begin);
        }
        DivergenceState total = others_;
        for (const Home& home : homes_) {
            if (home.of) total.merge(home.state);
        }
        const double p_top = double(p_top_) * row_.x_scale, q_top = double(q_top_) * row_.y_scale;
        if (p_top_ == -kInf || q_top_ == -kInf) total.p.sum = kNaN;
        if (is_sure(total.p, p_top) || is_sure(total.q, q_top)) return without_largest(p_top, q_top);
        const DivergenceSums p = sums_of(total.p, total.p_zero, total.p.ref, 0.0), q = sums_of(total.q, total.q_zero, total.q.ref, 0.0);
        return {stats_of_sums(p, q), {p_top_, p_top - total.p.ref - p.log_sum}, {q_top_, q_top - total.q.ref - q.log_sum}};
    }

private:
    enum Of : int { nobody = 0, p = 1, q = 2 };
    /// A block that holds the largest column of p, of q, or of both.
    struct Home {
        int of = nobody;
        int64_t begin = 0;
        DivergenceState state;
    };

    int64_t size_at(int64_t begin) const { return columns_ - begin < kDivergenceBlock ? columns_ - begin : kDivergenceBlock; }
    static bool higher(float top, float at, double scale) { return double(top) * scale > double(at) * scale + kMargin; }
    static bool is_sure(const DivergenceState::Side& side, double top) { return side.sum < (1 + kSmallRest) * std::exp2(top - side.ref); }

    /// Sums relative to the references. Where there is none, every logit so far is -inf: the block
    /// may hold a NaN, and else it has no mass and nothing that other sums could be relative to.
    DivergenceBlock sweep(int64_t begin, int64_t n) const {
        DivergenceBlock block = sweep_from(p_at_ == -kInf ? 0.0f : p_at_, q_at_ == -kInf ? 0.0f : q_at_, begin, n);
        if (p_at_ == -kInf && !std::isnan(block.state.p.sum)) block.state.p = {};
        if (q_at_ == -kInf && !std::isnan(block.state.q.sum)) block.state.q = {};
        return block;
    }

    DivergenceBlock sweep_from(float p_at, float q_at, int64_t begin, int64_t n) const {
        const T* x = row_.x + begin;
        const U* y = row_.y + begin;
        if (!is_far(p_at, row_.x_scale) && !is_far(q_at, row_.y_scale)) {
            const Shift<false> p_shift(row_.x_scale, p_at), q_shift(row_.y_scale, q_at);
            DivergenceBlock block = sweep_divergence_block<false>(x, y, n, p_shift, q_shift, exponential_, caps_);
            if (block.finite()) return block;
            block =
                sweep_divergence_block<true>(x, y, n, p_shift, q_shift, exponential_, caps_);  // 0 * -inf made a NaN: sum again without those columns
            if (block.finite()) return block;
        }
        return sweep_divergence_block<true>(x, y, n, Shift<true>(row_.x_scale, p_at), Shift<true>(row_.y_scale, q_at), exponential_, caps_);
    }

    /// Adds a block to the others. A block that becomes a new home is kept instead, and the homes
    /// that it replaces are added.
    void keep(const DivergenceBlock& block, int64_t begin) {
        const int of = (block.p_top > p_top_ ? p : nobody) | (block.q_top > q_top_ ? q : nobody);
        if (!of) return others_.merge(block.state);
        if (of & p) p_top_ = block.p_top;
        if (of & q) q_top_ = block.q_top;
        for (Home& home : homes_) {
            if (home.of && !(home.of &= ~of)) others_.merge(home.state);
        }
        homes_[homes_[0].of ? 1 : 0] = {of, begin, block.state};
    }

    /// The same without the largest column of each tensor, next to whose 1 the other terms would
    /// vanish. Every sum is relative to that column.
    DivergenceResult without_largest(double p_top, double q_top) {
        DivergenceState rest = others_;
        int64_t p_column = -1, q_column = -1;
        for (const Home& home : homes_) {
            if (home.of & p) p_column = home.begin + find_top(row_.x + home.begin, size_at(home.begin), p_top_, caps_.p);
            if (home.of & q) q_column = home.begin + find_top(row_.y + home.begin, size_at(home.begin), q_top_, caps_.q);
        }
        const int64_t first = p_column < q_column ? p_column : q_column, second = p_column < q_column ? q_column : p_column;
        for (const Home& home : homes_) {
            if (!home.of) continue;
            int64_t begin = home.begin;
            const int64_t end = begin + size_at(begin);
            for (int64_t column : {first, second, end}) {
                if (column < begin || column > end) continue;
                rest.merge(sweep(begin, column - begin).state);
                begin = column + 1;
            }
        }
        rest.rebase(p_top, q_top);
        add_column(rest, p_column, true, p_column == q_column);
        if (q_column != p_column) add_column(rest, q_column, false, true);
        const DivergenceSums p = sums_of(rest.p, rest.p_zero, p_top, 1.0), q = sums_of(rest.q, rest.q_zero, q_top, 1.0);
        return {stats_of_sums(p, q), {p_top_, -p.log_sum}, {q_top_, -q.log_sum}};
    }

    /// The terms of a column. A sum whose largest column it is takes only `cross`: its e is the 1
    /// that is kept apart.
    void add_column(DivergenceState& to, int64_t column, bool is_p_largest, bool is_q_largest) const {
        float x = load1(row_.x + column), y = load1(row_.y + column), slope;
        if (caps_.p.on) caps_.p.apply_one(x, slope);
        if (caps_.q.on) caps_.q.apply_one(y, slope);
        const double s = double(x) * row_.x_scale - to.p.ref, t = double(y) * row_.y_scale - to.q.ref;
        const bool p_masked = x == -kInf, q_masked = y == -kInf;
        const double e = std::exp2(s), f = std::exp2(t), d = p_masked || q_masked ? 0.0 : s - t;
        to.p.add(is_p_largest ? 0.0 : e, is_p_largest || p_masked ? 0.0 : e * s, e * d);
        to.q.add(is_q_largest ? 0.0 : f, is_q_largest || q_masked ? 0.0 : f * t, -f * d);
        to.p_zero |= p_masked && !q_masked;
        to.q_zero |= q_masked && !p_masked;
    }

    /// `ref` is the reference of the sums. `largest` is the term of the largest column, if the sum
    /// lacks it.
    static DivergenceSums sums_of(const DivergenceState::Side& side, bool zero, double ref, double largest) {
        const double log_sum = largest == 0 ? side.sum > 0 ? std::log2(side.sum) : double(kNaN) : std::log1p(side.sum) * kLog2e;
        return {side.sum + largest, side.dot, side.cross, log_sum, (ref + log_sum) * kLn2, zero};
    }

    const DivergenceRow<T, U>& row_;
    const Caps& caps_;
    const Exp2<5> exponential_{1.0};
    int64_t columns_ = 0;
    float p_at_ = -kInf, q_at_ = -kInf, p_top_ = -kInf, q_top_ = -kInf;  // references of the exponentials; the largest capped logits
    DivergenceState others_;
    Home homes_[2];
};

}  // namespace
}  // namespace reweight_ops
