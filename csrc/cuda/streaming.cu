// The three verbs for rows of any length: a persistent grid, one block a row, statistics read from memory and gradients from what the
// second-level cache still holds. Compiled once per dtype, with RW_ELEMENT and RW_DTYPE naming it.
#include "common/verbs.h"
#include "dispatch.h"
#include "gradient.h"

namespace reweight_ops {
namespace {

constexpr int kBlocksPerProcessor = 2;
/// Of the kernels that evaluate rules: with a softcap, and on Ampere, their registers do not fit twice on a processor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <bool kFull>
constexpr int kRuleBlocks = 1;
#else
template <bool kFull>
constexpr int kRuleBlocks = kFull ? 1 : kBlocksPerProcessor;
#endif

template <class T>
using Two = T[2];

/// One row of a call: where it is, its scale, its target.
template <class T>
struct Row {
    const T* x;
    float temperature, scale;  // scale: log2(e) / T
    int target;                // -1: in another shard

    RW_DEVICE Row(const Call& call, int64_t i) {
        x = static_cast<const T*>(call.logits) + call.strides.offset(i);
        temperature = call.temperature[call.temperature_per_row ? i : 0];
        scale = kLog2e / temperature;
        const int64_t local = call.ids[i] - call.vocab_start;
        target = local < 0 || local >= call.vocab_size ? -1 : int(local);
    }

    RW_DEVICE Target target_logit(const Softcap& softcap) const { return target < 0 ? Target() : Target(widen(x[target]), softcap); }

    template <Sums kSums>
    RW_DEVICE Partial sweep(int columns, const Softcap& softcap) const {
        return is_aligned(x) ? sweep_statistics<T, kSums, true>(x, columns, scale, softcap)
                             : sweep_statistics<T, kSums, false>(x, columns, scale, softcap);
    }
};

template <class T>
RW_DEVICE void fill_zero(T* out, int64_t columns) {
    const RowGradient zero{};
    write_gradient<T, false>(out, out, int(columns), int(columns), -1, zero, Softcap(kInf));
}

// ---- token_stats

RW_DEVICE void put(float* to, int64_t i, float value) {
    if (to) to[i] = value;
}

template <class T, Sums kSums>
RW_KERNEL(kThreads, kBlocksPerProcessor) stats_kernel(RW_PARAMETER StatsCall call) {
    // Two: while warp 0 merges those of one row, the others write those of the next.
    RW_SHARED(Two<BlockPartials>, partials);
    const Softcap softcap(call.softcap);
    int buffer = 0;
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        RowStats s{};
        if (is_invalid(call, i)) {
            const float bad = is_out(call, i) ? 0.0f : kNaN;
            s = {bad, bad, bad, bad, bad};
        } else {
            const Row<T> row(call, i);
            const Partial sums = merge_block(row.template sweep<kSums>(int(call.vocab_size), softcap), partials[buffer], row.scale);
            buffer ^= 1;
            if (thread_index() == 0) s = finish(sums, row.target_logit(softcap), row.temperature, row.scale);
        }
        if (thread_index() == 0) {
            put(call.logp, i, s.logp);
            put(call.entropy, i, s.entropy);
            put(call.lse, i, s.lse);
            put(call.log_sum_p_sq, i, s.log_sum_p_sq);
            put(call.max_logp, i, s.max_logp);
        }
    }
}

// ---- token_grad

template <class T>
RW_DEVICE RowGradient known_gradient(const GradCall& call, const Row<T>& row, int64_t i, const Softcap& softcap) {
    const auto get = [i](const float* from) { return from ? from[i] : 0.0f; };
    const Derivatives d{get(call.logp_coef), get(call.entropy_coef), get(call.lse_coef), get(call.p_sq_coef),
                        call.logp[i],        get(call.entropy),      get(call.log_sum_p_sq)};
    const Target target = d.all_zero() ? Target() : row.target_logit(softcap);
    const double unit = double(row.temperature) * row.scale;  // log2(e), with the rounding that the scale has
    // Both logp and lse are rounded to fp32; the smaller one gives lse with the smaller error.
    const bool by_logp = row.target >= 0 && fabsf(d.logp) < fabsf(call.lse[i]);
    const double lse2 = by_logp ? target.exact * row.scale - unit * d.logp : unit * call.lse[i];
    const float ref = float(lse2), rest = float(ref - lse2);
    return row_gradient(d, row.temperature, row.scale, ref, rest, exp2f(rest), target, softcap.on);
}

template <class T, bool kFull>
RW_KERNEL(kThreads, kBlocksPerProcessor) grad_kernel(RW_PARAMETER GradCall call) {
    RW_SHARED(Two<RowGradient>, gradients);
    const Softcap softcap(call.softcap);
    int buffer = 0;
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        T* out = static_cast<T*>(call.out) + call.out_strides.offset(i);
        if (is_invalid(call, i)) {
            fill_zero(out, call.columns);
            continue;
        }
        const Row<T> row(call, i);
        if (thread_index() == 0) gradients[buffer] = known_gradient(call, row, i, softcap);
        barrier();
        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradients[buffer], softcap);
        buffer ^= 1;
    }
}

// ---- token_loss_grad

RW_DEVICE RowLoss evaluate(const LossGradCall& call, int64_t i, const RowStats& s) {
    const auto get = [i](const float* from) { return from ? from[i] : kNaN; };  // what was not given, no rule reads
    Leaves t{};
    t.logp = s.logp;
    t.old_logp = call.old_logp ? call.old_logp[i] : s.logp;
    t.ref_logp = get(call.ref_logp);
    t.sampling_logp = get(call.sampling_logp);
    t.adv = get(call.adv);
    t.entropy = s.entropy;
    t.log_sum_p_sq = s.log_sum_p_sq;
    return evaluate_row(call.program, call.params, t, call.row_weights + i, call.row_weights_step);
}

RW_DEVICE void put_row(const LossGradCall& call, int64_t i, const RowStats& s, const RowLoss& l) {
    call.logp[i] = s.logp;
    call.entropy[i] = s.entropy;
    call.weighted_loss[i] = l.weighted_loss;
    call.loss[i] = l.loss;
    call.coef[i] = l.coef;
    call.entropy_coef[i] = l.entropy_coef;
}

template <class T, bool kFull>
RW_KERNEL(kThreads, kRuleBlocks<kFull>) loss_grad_kernel(RW_PARAMETER LossGradCall call) {
    RW_SHARED(BlockPartials, partials);
    RW_SHARED(RowGradient, gradient);
    const Softcap softcap(call.softcap);
    for (int64_t i = block_index(); i < call.rows; i += block_count()) {
        T* out = static_cast<T*>(call.out) + call.out_strides.offset(i);
        if (is_invalid(call, i)) {
            const float bad = is_out(call, i) ? 0.0f : kNaN;
            if (thread_index() == 0) put_row(call, i, {bad, bad, bad, bad, bad}, {bad, bad, bad, bad, bad});
            fill_zero(out, call.columns);
            continue;
        }
        const Row<T> row(call, i);
        constexpr Sums kSums = kFull ? Sums::full : Sums::entropy;
        const Partial sums = merge_block(row.template sweep<kSums>(int(call.vocab_size), softcap), partials, row.scale);
        if (thread_index() == 0) {
            const Target target = row.target_logit(softcap);
            const RowStats s = finish(sums, target, row.temperature, row.scale);
            const RowLoss l = evaluate(call, i, s);
            put_row(call, i, s, l);
            const Derivatives d{l.coef, l.entropy_coef, 0.0f, l.p_sq_coef, s.logp, s.entropy, s.log_sum_p_sq};
            gradient = row_gradient(d, row.temperature, row.scale, reference(sums.top, row.scale), -float(log_sum(sums)), 1.0f / sums.sum, target, softcap.on);
        }
        barrier();
        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradient, softcap);
    }
}

// ---- launches

/// Two blocks a processor, for one waits at barriers; one where two rows a processor are more than half of the cache that the second read is for.
template <class C>
int launch_rows(void (*kernel)(const C), const C& call, bool reads_twice) {
    if (call.rows == 0) return 0;
    const Device device = device_of(call.device);
    if (device.status) return device.status;
    const int64_t in_flight = int64_t(kBlocksPerProcessor) * device.processors * call.vocab_size * int64_t(sizeof(RW_ELEMENT));
    const int64_t blocks = int64_t(device.processors) * (reads_twice && in_flight > device.l2_bytes / 2 ? 1 : kBlocksPerProcessor);
    return launch(kernel, call.rows < blocks ? call.rows : blocks, kThreads, call);
}

int token_stats(const StatsCall& call) {
    const bool full = call.log_sum_p_sq || call.softcap < kInf;
    return launch_rows(full ? stats_kernel<RW_ELEMENT, Sums::full> : stats_kernel<RW_ELEMENT, Sums::entropy>, call, false);
}

int token_grad(const GradCall& call) {
    const bool full = call.p_sq_coef || call.softcap < kInf;
    return launch_rows(full ? grad_kernel<RW_ELEMENT, true> : grad_kernel<RW_ELEMENT, false>, call, false);
}

int token_loss_grad(const LossGradCall& call) {
    const bool full = call.reads_p_sq || call.softcap < kInf;
    return launch_rows(full ? loss_grad_kernel<RW_ELEMENT, true> : loss_grad_kernel<RW_ELEMENT, false>, call, true);
}

}  // namespace

#define RW_CONCAT_(a, b) a##b
#define RW_CONCAT(a, b) RW_CONCAT_(a, b)
const CudaKernels RW_CONCAT(streaming_, RW_DTYPE) = {token_stats, token_grad, token_loss_grad};

}  // namespace reweight_ops
