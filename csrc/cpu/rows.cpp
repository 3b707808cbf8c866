#include "rows.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace reweight_ops {
namespace {

/// Calls `f(i, element)` for the first `count` elements of sequence `s`.
template <class T, class F>
void each(const RowNumbers& from, int64_t s, int64_t count, const F& f) {
    const T* const first = (const T*)from.data + s * from.sequence_stride;
    for (int64_t i = 0; i < count; ++i) f(i, first[i * from.step]);
}

/// Calls `f(i, element != 0)`.
template <class F>
void each_truth(const RowNumbers& from, int64_t s, int64_t count, const F& f) {
    const auto of = [&](auto zero) {
        using T = decltype(zero);
        const T sign = from.is_signed ? T(T(1) << (8 * sizeof(T) - 1)) : T(0);
        each<T>(from, s, count, [&](int64_t i, T x) { f(i, (x & T(~sign)) != 0); });
    };
    switch (from.bytes) {
        case 1: return of(uint8_t());
        case 2: return of(uint16_t());
        case 4: return of(uint32_t());
        default: return of(uint64_t());
    }
}

}  // namespace

std::pair<int64_t, int64_t> mask_rows(const MaskCall& call) {
    const int64_t n = call.runs.rows, sequences = call.runs.count;
    const int64_t* const index = call.runs.index;
    const int64_t run = index ? n : call.runs.length;
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    std::fill(call.lengths, call.lengths + 2 * sequences, 0);
    for (int64_t begin = 0, s = 0; begin < n; begin += run, ++s) {
        const int64_t count = std::min(run, n - begin);
        int64_t* const ids = call.out_ids + begin;
        bool* const keep = call.keep + begin;
        const auto put = [&](int64_t i, int64_t id) { ids[i] = id; };
        if (!call.ids.data) {
            std::fill(ids, ids + count, 0);
        } else {
            call.ids.bytes == 4 ? each<int32_t>(call.ids, s, count, put) : each<int64_t>(call.ids, s, count, put);
        }
        for (int64_t i = 0; index && i < count; ++i) ids[i] = index[i] < sequences ? ids[i] : kIgnoreIndex;
        if (call.mask.data) {
            each_truth(call.mask, s, count, [&](int64_t i, bool in) { ids[i] = in ? ids[i] : kIgnoreIndex; });
        }
        for (int64_t i = 0; i < count; ++i) {
            keep[i] = ids[i] != kIgnoreIndex;
            low = std::min(low, keep[i] ? ids[i] : low);
            high = std::max(high, keep[i] ? ids[i] : high);
        }
        if (call.counted) {
            each_truth(call.denominator, s, count, [&](int64_t i, bool in) { call.counted[begin + i] = in && (!index || index[i] < sequences); });
        }
        const bool* const counted = call.counted ? call.counted + begin : keep;
        const auto add = [&](int64_t at, int64_t i) {
            call.lengths[at] += keep[i];
            call.lengths[sequences + at] += counted[i];
        };
        for (int64_t i = 0; i < count; ++i) {
            if (const int64_t at = index ? index[i] : s; at < sequences) add(at, i);
        }
    }
    return low > high ? std::pair<int64_t, int64_t>{0, -1} : std::pair<int64_t, int64_t>{low, high};
}

void regroup_rows(const RegroupCall& call) {
    const int64_t sequences = call.runs.count, prompts = call.prompts;
    const auto put = [&](int64_t s, int64_t id) { call.prompt_of[s] = 0 <= id && id < prompts ? id : prompts; };
    call.ids.bytes == 4 ? each<int32_t>(call.ids, 0, sequences, put) : each<int64_t>(call.ids, 0, sequences, put);
    std::fill(call.out_lengths, call.out_lengths + 2 * prompts, 0);
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t prompt = call.prompt_of[s];
        if (prompt == prompts) continue;
        call.out_lengths[prompt] += call.lengths[s];
        call.out_lengths[prompts + prompt] += call.lengths[sequences + s];
    }
    for (int64_t i = 0; i < call.runs.rows; ++i) {
        const int64_t s = call.runs.of(i);
        call.index[i] = s < sequences ? call.prompt_of[s] : prompts;
    }
}

void measure_rows(const MeasureCall& call) {
    const int64_t sequences = call.runs.count;
    std::vector<double> sums(sequences, 0.0);
    for (int64_t i = 0; i < call.runs.rows; ++i) {
        if (call.keep[i]) sums[call.runs.of(i)] += call.weight[i];  // a kept row is in a sequence
    }
    for (int64_t s = 0; s < sequences; ++s) call.sums[s] = float(sums[s]);
}

namespace {

/// Weighs rows whose sequences have lengths of type `Length`.
template <class Length>
void weigh_by(const Length* const lengths, const WeighCall& call) {
    const int64_t n = call.runs.rows, sequences = call.runs.count;
    float divisor = 1.0f;
    if (call.divide == Divide::by_value) {
        divisor = call.divisor;
    } else if (call.divide != Divide::by_nothing) {
        std::conditional_t<std::is_integral_v<Length>, int64_t, double> total = 0;
        for (int64_t s = 0; s < sequences; ++s) total += call.divide == Divide::by_rows ? lengths[s] : Length(lengths[s] > 0);
        divisor = total < 1 ? 1.0f : float(total);  // keeps NaN
    }
    // a row of no sequence divides by 1
    const auto weight_of = [&](float weight, int64_t s) {
        const float w = weight / divisor;
        return (call.per_length && s < sequences && lengths[s] > 0 ? w / float(lengths[s]) : w) / call.horizon * call.scale;
    };
    const int64_t run = call.runs.index || call.weight ? 1 : call.runs.length;
    for (int64_t begin = 0; begin < n; begin += run) {
        const float w = weight_of(call.weight ? call.weight[begin] : 1.0f, call.runs.of(begin));
        for (int64_t i = begin; i < std::min(begin + run, n); ++i) {
            call.out[i] = !call.keep[i] ? 0.0f : call.factor ? w * call.factor[i] : w;
            for (int k = 1; k < call.terms; ++k) call.out[k * n + i] = call.keep[i] ? w : 0.0f;
        }
    }
}

}  // namespace

void weigh_rows(const WeighCall& call) { call.weight ? weigh_by((const float*)call.lengths, call) : weigh_by((const int32_t*)call.lengths, call); }

OnePass::Layout OnePass::layout() const {
    const int64_t n = mask.runs.rows, sequences = mask.runs.count;
    Layout at{};
    at.weights = 8 * n;
    at.inputs = at.weights + 4 * n * weigh.terms;
    at.lengths = at.inputs + 4 * n * kInputs;
    at.keep = at.lengths + 4 * 2 * sequences;
    at.counted = at.keep + n;
    at.bytes = at.counted + (mask.denominator.bytes ? n : 0);
    return at;
}

bool fill_rows(OnePass& call, const OnePassValues& values) {
    const OnePass::Layout at = call.layout();
    const int64_t n = call.mask.runs.rows, sequences = call.mask.runs.count, run = call.mask.runs.length;
    MaskCall& mask = call.mask;
    mask.ids.data = values.ids;
    mask.mask.data = values.mask;
    mask.denominator.data = values.denominator;
    mask.out_ids = (int64_t*)(values.buffer + at.ids);
    mask.keep = (bool*)(values.buffer + at.keep);
    mask.counted = values.denominator ? (bool*)(values.buffer + at.counted) : nullptr;
    mask.lengths = (int32_t*)(values.buffer + at.lengths);
    const auto [low, high] = mask_rows(mask);
    if (low < 0 || high >= call.loss.vocab_total) return false;

    std::array<const float*, OnePass::kInputs> found{};
    for (int k = 0; k < OnePass::kInputs; ++k) {
        const RowArgument& from = call.inputs[k];
        if (!from.is_given) continue;
        float* const to = (float*)(values.buffer + at.inputs) + k * n;
        found[k] = to;
        if (from.is_number) {
            std::fill(to, to + n, values.numbers[k]);
            continue;
        }
        for (int64_t s = 0; s < sequences; ++s) {
            const int64_t begin = s * run, count = std::min(run, n - begin);
            for (int64_t i = 0; i < count; ++i) to[begin + i] = values.inputs[k][s * from.sequence_stride + i * from.step];
        }
    }
    float* factor = const_cast<float*>(found[4] ? found[4] : found[5]);
    if (found[4] && found[5]) {
        for (int64_t i = 0; i < n; ++i) factor[i] *= found[5][i];
    }
    WeighCall& weigh = call.weigh;
    weigh.keep = mask.keep;
    weigh.lengths = mask.lengths + sequences;  // of the rows that count
    weigh.divisor = values.divisor;
    weigh.scale = values.scale;
    weigh.factor = factor;
    weigh.out = (float*)(values.buffer + at.weights);
    weigh_rows(weigh);

    LossGradCall& loss = call.loss;
    loss.logits = values.logits;
    loss.ids = mask.out_ids;
    loss.temperature = &values.temperature;
    loss.threads = values.threads;
    loss.params = call.params.data();
    loss.row_weights = weigh.out;
    loss.adv = found[0];
    loss.old_logp = found[1];
    loss.ref_logp = found[2];
    loss.sampling_logp = found[3];
    float** const rows[] = {&loss.logp, &loss.entropy, &loss.weighted_loss, &loss.loss, &loss.d_logp, &loss.d_entropy};
    for (int k = 0; k < 6; ++k) *rows[k] = values.table + k * n;
    loss.out = values.out;
    loss.out_strides = values.out_strides;
    return true;
}

}  // namespace reweight_ops
