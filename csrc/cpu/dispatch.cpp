#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace reweight_ops {

#define RW_DECLARE(name)                 \
    extern const Kernels kernels_##name; \
    extern const DivergenceKernels divergence_##name;
#ifdef RW_HAS_PORTABLE
RW_DECLARE(portable)
#else
RW_DECLARE(v2)
RW_DECLARE(v3)
RW_DECLARE(v4)
RW_DECLARE(v4_bf16)
#endif

const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found;
#ifdef RW_HAS_PORTABLE
        found.push_back({"portable", &kernels_portable, &divergence_portable, true});
#else
        __builtin_cpu_init();
        const auto has = [](auto... features) { return (features && ...); };
        const bool v2 = has(__builtin_cpu_supports("sse4.2"), __builtin_cpu_supports("popcnt"));
        const bool v3 =
            v2 && has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi"), __builtin_cpu_supports("bmi2"));
        const bool v4 = v3 && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512cd"),
                                  __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"));
        found.push_back({"v2", &kernels_v2, &divergence_v2, v2});
        found.push_back({"v3", &kernels_v3, &divergence_v3, v3});
        found.push_back({"v4", &kernels_v4, &divergence_v4, v4});
        found.push_back({"v4_bf16", &kernels_v4_bf16, &divergence_v4_bf16, v4 && __builtin_cpu_supports("avx512bf16")});
#endif
        return found;
    }();
    return all;
}

namespace {

const Level& best_level() {
    const Level* best = nullptr;
    for (const Level& level : levels()) {
        if (level.supported) best = &level;
    }
    if (!best) throw std::runtime_error("this processor is older than x86-64-v2, the lowest level that was built");
    return *best;
}

std::atomic<const Level*> chosen{nullptr};

}  // namespace

const Level& active_level() {
    const Level* level = chosen.load(std::memory_order_acquire);
    return level ? *level : best_level();
}

void set_level(const std::string& name) {
    if (name == "auto") {
        chosen = nullptr;
        return;
    }
    for (const Level& level : levels()) {
        if (name == level.name) {
            if (!level.supported) throw std::invalid_argument("this processor lacks level " + name);
            chosen = &level;
            return;
        }
    }
    throw std::invalid_argument("level " + name + " was not built");
}

}  // namespace reweight_ops
