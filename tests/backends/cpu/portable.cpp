// Statistics and gradients of rows by the portable kernels, as a program of its own: another processor's compiler and emulator can run it.
//
//   primitives DTYPE ROWS COLUMNS SOFTCAP TEMPERATURE < logits, ids (int64), coefficients [4, rows] > statistics [5, rows], gradient, the 5 likeliest
// columns (int64)
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/dispatch.h"

using namespace reweight_ops;

template <class T>
std::vector<T> input(int64_t n) {
    std::vector<T> data(n);
    if (std::fread(data.data(), sizeof(T), n, stdin) != size_t(n)) std::exit(1);
    return data;
}

template <class T>
void output(const std::vector<T>& data) {
    if (std::fwrite(data.data(), sizeof(T), data.size(), stdout) != data.size()) std::exit(1);
}

int main(int, char** argument) {
    const DType dtype = DType(std::atoi(argument[1]));
    const int64_t n = std::atoll(argument[2]), v = std::atoll(argument[3]), bytes = n * v * (dtype == DType::f32 ? 4 : 2);
    const float softcap = std::strtof(argument[4], nullptr), temperature = std::strtof(argument[5], nullptr);
    const auto logits = input<char>(bytes);
    const auto ids = input<int64_t>(n);
    const auto derivatives = input<float>(4 * n);
    std::vector<float> stats(5 * n), lse_low(n);
    std::vector<char> gradient(bytes);
    const auto stat = [&](int i) { return stats.data() + i * n; };
    const auto derivative = [&](int i) { return derivatives.data() + i * n; };

    const int threads = 2;
    const RowStrides rows{n, 0, v};
    const Call call{dtype, logits.data(), rows, n, v, v, 0, v, softcap, nullptr, ids.data(), &temperature, false, threads, 0, nullptr};
    TopStatsCall wanted{};
    static_cast<Call&>(wanted) = call;
    std::vector<int64_t> likeliest(n * (v < 5 ? v : 5));
    wanted.top = int(v < 5 ? v : 5), wanted.top_ids = likeliest.data();
    wanted.logp = stat(0), wanted.entropy = stat(1), wanted.lse = stat(2), wanted.log_sum_p_sq = stat(3), wanted.max_logp = stat(4),
    wanted.lse_low = lse_low.data();
    active_level().kernels->top_stats(wanted);

    GradCall back{};
    static_cast<Call&>(back) = call;
    back.logp = stat(0), back.entropy = stat(1), back.lse = stat(2), back.log_sum_p_sq = stat(3), back.lse_low = lse_low.data();
    back.d_logp = derivative(0), back.d_entropy = derivative(1), back.d_lse = derivative(2), back.d_p_sq = derivative(3);
    back.out = gradient.data(), back.out_strides = rows;
    active_level().kernels->token_grad(back);

    output(stats);
    output(gradient);
    output(likeliest);
}
