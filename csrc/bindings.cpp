// The Python module reweight_ops._C: raw addresses in, no torch header, no check. reweight_ops/backends validates every argument first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace reweight_ops;

namespace {

using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

int find(const char* const* names, int count, const std::string& name, const char* what) {
    for (int i = 0; i < count; ++i) {
        if (name == names[i]) return i;
    }
    throw std::invalid_argument(std::string(what) + " " + name + " is not compiled in");
}

/// A program by names, with the offset of each part's parameters: coefficients and fields follow the two bounds of the log-ratio.
RowProgram make_program(const std::vector<std::string>& terms, const std::vector<std::pair<std::string, bool>>& weights) {
    if (terms.size() > kMaxTerms || weights.size() > kMaxWeights) throw std::invalid_argument("too many terms or weights for one pass");
    RowProgram program{};
    int offset = 2;
    for (const std::string& name : terms) {
        const int rule = find(kRuleNames, kRuleCount, name, "rule"), k = program.terms++;
        program.rule[k] = rule;
        program.rule_params[k] = ++offset;
        offset += kRuleParamCounts[rule];
    }
    for (const auto& [name, all] : weights) {
        const int weight = find(kWeightNames, kWeightCount, name, "weight"), j = program.weights++;
        program.weight[j] = weight;
        program.weight_params[j] = offset;
        program.weight_all[j] = all;
        offset += kWeightParamCounts[weight];
    }
    return program;
}

Call make_call(int dtype, Address logits, std::array<int64_t, 3> strides, int64_t rows, int64_t columns, std::array<int64_t, 3> vocab, float softcap,
               Address ids, Address temperature, bool temperature_per_row, int threads) {
    Call call{};
    call.dtype = static_cast<DType>(dtype);
    call.logits = at<const void>(logits);
    call.strides = {strides[0], strides[1], strides[2]};
    call.rows = rows;
    call.columns = columns;
    call.vocab_size = vocab[0];
    call.vocab_start = vocab[1];
    call.vocab_total = vocab[2];
    call.softcap = softcap;
    call.ids = at<const int64_t>(ids);
    call.temperature = at(temperature);
    call.temperature_per_row = temperature_per_row;
    call.threads = threads;
    return call;
}

void token_stats(const Call& common, std::array<Address, 5> out) {
    StatsCall call{};
    static_cast<Call&>(call) = common;
    call.logp = at(out[0]);
    call.entropy = at(out[1]);
    call.lse = at(out[2]);
    call.log_sum_p_sq = at(out[3]);
    call.max_logp = at(out[4]);
    active_level().kernels->token_stats(call);
}

void token_grad(const Call& common, std::array<Address, 4> stats, std::array<Address, 4> coefs, Address out, std::array<int64_t, 3> out_strides) {
    GradCall call{};
    static_cast<Call&>(call) = common;
    call.logp = at(stats[0]);
    call.entropy = at(stats[1]);
    call.lse = at(stats[2]);
    call.log_sum_p_sq = at(stats[3]);
    call.logp_coef = at(coefs[0]);
    call.entropy_coef = at(coefs[1]);
    call.lse_coef = at(coefs[2]);
    call.p_sq_coef = at(coefs[3]);
    call.out = at<void>(out);
    call.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    active_level().kernels->token_grad(call);
}

void token_loss_grad(const Call& common, const RowProgram& program, Address params, bool reads_p_sq, Address row_weights, int64_t row_weights_step, std::array<Address, 4> inputs, Address rows, Address out, std::array<int64_t, 3> out_strides) {
    LossGradCall call{};
    static_cast<Call&>(call) = common;
    call.program = program;
    call.params = at(params);
    call.reads_p_sq = reads_p_sq;
    call.row_weights = at(row_weights);
    call.row_weights_step = row_weights_step;
    call.old_logp = at(inputs[0]);
    call.adv = at(inputs[1]);
    call.ref_logp = at(inputs[2]);
    call.sampling_logp = at(inputs[3]);
    float** const targets[] = {&call.logp, &call.entropy, &call.weighted_loss, &call.loss, &call.coef, &call.entropy_coef};
    for (int64_t k = 0; k < 6; ++k) *targets[k] = at(rows) + k * common.rows;
    call.out = at<void>(out);
    call.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    active_level().kernels->token_loss_grad(call);
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

py::dict counts(const char* const* names, const int* parameters, int n) {
    py::dict out;
    for (int i = 0; i < n; ++i) out[names[i]] = parameters[i];
    return out;
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
#ifdef RW_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels on raw addresses, without any check: reweight_ops.backends validates every argument first.";
    using NoGil = py::call_guard<py::gil_scoped_release>;

    m.def("build_info", &build_info, "Compiler, flags, version, instruction-set levels built and supported, and whether the CUDA part is in.");
    m.def("level", [] { return std::string(active_level().name); }, "The instruction-set level that runs.");
    m.def("set_level", &set_level, py::arg("name"), "Force a level by name, or 'auto'. ValueError if it was not built or this processor lacks it.");
    m.def("rules", [] { return counts(kRuleNames, kRuleParamCounts, kRuleCount); }, "Name to number of parameters, as compiled in.");
    m.def("weights", [] { return counts(kWeightNames, kWeightParamCounts, kWeightCount); }, "Name to number of parameters, as compiled in.");

    py::class_<RowProgram>(m, "Program").def(py::init(&make_program), py::arg("terms"), py::arg("weights"));
    py::class_<Call>(m, "Call").def(py::init(&make_call), py::arg("dtype"), py::arg("logits"), py::arg("strides"), py::arg("rows"), py::arg("columns"),
                                    py::arg("vocab"), py::arg("softcap"), py::arg("ids"), py::arg("temperature"), py::arg("temperature_per_row"),
                                    py::arg("threads"));
    m.def("token_stats", &token_stats, NoGil(), py::arg("call"), py::arg("out"));
    m.def("token_grad", &token_grad, NoGil(), py::arg("call"), py::arg("stats"), py::arg("coefs"), py::arg("out"), py::arg("out_strides"));
    m.def("token_loss_grad", &token_loss_grad, NoGil(), py::arg("call"), py::arg("program"), py::arg("params"), py::arg("reads_p_sq"),
          py::arg("row_weights"), py::arg("row_weights_step"), py::arg("inputs"), py::arg("rows"), py::arg("out"),
          py::arg("out_strides"));
    m.def("apply_rule", &apply_rule_to, py::arg("name"), py::arg("leaves"), py::arg("params"), py::arg("out"), py::arg("n"));
    m.def("apply_weight", &apply_weight_to, py::arg("name"), py::arg("leaves"), py::arg("params"), py::arg("out"), py::arg("n"));
    m.def("stream", &stream, NoGil(), py::arg("kind"), py::arg("a"), py::arg("b"), py::arg("floats"), py::arg("threads"));
}
