// The Python module reweight_ops._C: raw addresses in, no torch header, no check. reweight_ops/backends validates every argument first.
#include "bindings.h"

#include "cpu/dispatch.h"

using namespace reweight_ops;

namespace {

/// A verb at the level that runs when it is called.
template <class C>
auto verb(void (*Kernels::*which)(const C&)) {
    return [which](const C& call) {
        (active_level().kernels->*which)(call);
        return 0;
    };
}

/// A verb on two logits tensors at the level that runs when it is called.
auto divergence_verb(void (*DivergenceKernels::*which)(const DivergenceCall&)) {
    return [which](const DivergenceCall& call) {
        (active_level().divergence->*which)(call);
        return 0;
    };
}

/// For tests of the generated rules as compiled: leaves [8, n], out [5, n].
void apply_rule_to(const std::string& name, Address leaves, Address params, Address out, int64_t n) {
    const int rule = find(kRuleNames, kRuleCount, name, "rule");
    for (int64_t i = 0; i < n; ++i) {
        const float* x = at(leaves) + i;
        const Leaves t{x[0], x[n], x[2 * n], x[3 * n], x[4 * n], x[5 * n], x[6 * n], x[7 * n]};
        const RuleOut r = apply_rule(rule, t, at(params));
        const float values[] = {r.loss, r.d_logp, r.d_log_ratio, r.d_entropy, r.d_log_sum_p_sq};
        for (int64_t k = 0; k < 5; ++k) at(out)[k * n + i] = values[k];
    }
}

void apply_weight_to(const std::string& name, Address leaves, Address params, Address out, int64_t n) {
    const int weight = find(kWeightNames, kWeightCount, name, "weight");
    for (int64_t i = 0; i < n; ++i) {
        const float* x = at(leaves) + i;
        at(out)[i] = apply_weight(weight, {x[0], x[n], x[2 * n], x[3 * n], x[4 * n], x[5 * n], x[6 * n], x[7 * n]}, at(params));
    }
}

/// `kind`: read, update (in place), copy (a to b), flush (drop a from the caches).
void stream(const std::string& kind, Address a, Address b, int64_t floats, int threads) {
    static const char* const kinds[] = {"read", "update", "copy", "flush"};
    active_level().kernels->stream(static_cast<Stream>(find(kinds, 4, kind, "stream")), at(a), at(b), floats, threads);
}

py::dict build_info() {
    py::dict info;
    info["version"] = RW_VERSION;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["flags"] = RW_FLAGS;
    std::vector<std::string> built, supported;
    for (const Level& level : levels()) {
        built.push_back(level.name);
        if (level.supported) supported.push_back(level.name);
    }
    info["levels"] = built;
    info["supported_levels"] = supported;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels on raw addresses, without any check: reweight_ops.backends validates every argument first.";
    using NoGil = py::call_guard<py::gil_scoped_release>;

    m.def("build_info", &build_info, "Compiler, flags, version, instruction-set levels built and supported.");
    m.def("level", [] { return std::string(active_level().name); }, "The instruction-set level that runs.");
    m.def("set_level", &set_level, py::arg("name"), "Force a level by name, or 'auto'. ValueError if it was not built or this processor lacks it.");
    bind_verbs(m, verb(&Kernels::token_stats), verb(&Kernels::token_grad), verb(&Kernels::token_loss_grad));
    bind_divergence(m, divergence_verb(&DivergenceKernels::stats), divergence_verb(&DivergenceKernels::grad),
                    divergence_verb(&DivergenceKernels::loss_grad));
    m.def("apply_rule", &apply_rule_to, py::arg("name"), py::arg("leaves"), py::arg("params"), py::arg("out"), py::arg("n"));
    m.def("apply_weight", &apply_weight_to, py::arg("name"), py::arg("leaves"), py::arg("params"), py::arg("out"), py::arg("n"));
    m.def("stream", &stream, NoGil(), py::arg("kind"), py::arg("a"), py::arg("b"), py::arg("floats"), py::arg("threads"));
}
