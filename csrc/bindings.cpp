// The Python module reweight_ops._C. It takes raw addresses, uses no torch header and checks nothing:
// reweight_ops/_core/backends validates every argument first.
#include "bindings.h"

#include "cpu/dispatch.h"
#include "cpu/evaluate_rows.h"
#include "cpu/rows.h"

using namespace reweight_ops;

namespace {

/// Calls a primitive at the level that is active at the time of the call.
template <class C>
auto primitive(void (*Kernels::*which)(const C&)) {
    return [which](const C& call) {
        (active_level().kernels->*which)(call);
        return 0;
    };
}

/// Calls a primitive on two logits tensors at the level that is active at the time of the call.
auto divergence_primitive(void (*DivergenceKernels::*which)(const DivergenceCall&)) {
    return [which](const DivergenceCall& call) {
        (active_level().divergence->*which)(call);
        return 0;
    };
}

/// Evaluates stored rows; see EvaluateCall.
template <class Real>
void evaluate_rows_of(const ProgramTable& table, Address params, const std::array<Address, kLeaves>& leaves, Address row_weights,
                      int64_t row_weights_step, Address keep, const std::vector<int>& outputs, Address out, int64_t rows, int threads) {
    EvaluateCall<Real> call{};
    call.table = table;
    call.params = at<const Real>(params);
    for (int i = 0; i < kLeaves; ++i) call.leaves[i] = at<const Real>(leaves[i]);
    call.row_weights = at<const Real>(row_weights);
    call.row_weights_step = row_weights_step;
    call.keep = at<const bool>(keep);
    call.outputs = outputs.data();
    call.output_count = int(outputs.size());
    call.out = at<Real>(out);
    call.rows = rows;
    call.threads = threads;
    evaluate_rows(call);
}

/// Unpacks an address, the strides between sequences and between rows, the bytes of an element, and
/// whether its highest bit is a sign.
template <class Five>
RowNumbers row_numbers(const Five& from) {
    return {at<const void>(Address(from.at(0))), from.at(1), from.at(2), int(from.at(3)), from.at(4) != 0};
}

/// Unpacks rows, sequences, rows of a sequence, and the address of an index.
Runs runs_of(const std::array<int64_t, 4>& from) { return {from[0], from[1], from[2], at<const int64_t>(Address(from[3]))}; }

std::pair<int64_t, int64_t> mask_rows_of(const std::array<int64_t, 5>& ids, const std::array<int64_t, 5>& mask,
                                         const std::array<int64_t, 5>& denominator, const std::array<int64_t, 4>& runs, Address out_ids, Address keep,
                                         Address counted, Address lengths) {
    return mask_rows({row_numbers(ids), row_numbers(mask), row_numbers(denominator), runs_of(runs), at<int64_t>(out_ids), at<bool>(keep),
                      at<bool>(counted), at<int32_t>(lengths)});
}

void regroup_rows_of(const std::array<int64_t, 5>& ids, Address lengths, const std::array<int64_t, 4>& runs, int64_t prompts, Address prompt_of,
                     Address index, Address out_lengths) {
    regroup_rows(
        {row_numbers(ids), at<const int32_t>(lengths), runs_of(runs), prompts, at<int64_t>(prompt_of), at<int64_t>(index), at<int32_t>(out_lengths)});
}

void measure_rows_of(Address weight, Address keep, const std::array<int64_t, 4>& runs, Address sums) {
    measure_rows({at<const float>(weight), at<const bool>(keep), runs_of(runs), at(sums)});
}

void weigh_rows_of(Address keep, Address lengths, Address weight, const std::array<int64_t, 4>& runs, int divide, float divisor, bool per_length,
                   float horizon, float scale, Address factor, int terms, Address out) {
    weigh_rows({at<const bool>(keep), at<const void>(lengths), at<const float>(weight), runs_of(runs), static_cast<Divide>(divide), divisor,
                per_length, horizon, scale, at<const float>(factor), terms, at(out)});
}

/// Makes a prepared loss: the arguments that do not change between calls.
OnePass make_one_pass(const Call& common, const ProgramTable& table, std::vector<float> params, bool reads_p_sq, bool entropy_gradient, int64_t run,
                      const std::vector<std::vector<int64_t>>& masks, const std::vector<std::vector<int64_t>>& inputs, int divide, bool per_length,
                      float horizon, int terms, bool shared) {
    OnePass call{};
    static_cast<Call&>(call.loss) = common;
    call.loss.table = table;
    call.loss.reads_p_sq = reads_p_sq;
    call.loss.entropy_gradient = entropy_gradient;
    call.loss.row_weights_step = shared ? 0 : common.rows;
    const Runs runs{common.rows, (common.rows + run - 1) / run, run, nullptr};
    call.mask = {row_numbers(masks.at(0)), row_numbers(masks.at(1)), row_numbers(masks.at(2)), runs, nullptr, nullptr, nullptr, nullptr};
    call.weigh = {nullptr, nullptr, nullptr, runs, static_cast<Divide>(divide), 1, per_length, horizon, 1, nullptr, terms, nullptr};
    for (int k = 0; k < OnePass::kInputs; ++k) {
        const std::vector<int64_t>& from = inputs.at(k);
        call.inputs[k] = {from.at(0), from.at(1), from.at(2) != 0, from.at(3) != 0};
    }
    call.params = std::move(params);
    return call;
}

/// `addresses` are logits, ids, mask, denominator, the six inputs, buffer, table and out. `numbers`
/// are the inputs' numbers, temperature, divisor and scale.
bool run_one_pass(const OnePass& prepared, const std::array<Address, 13>& addresses, const std::array<float, OnePass::kInputs + 3>& numbers,
                  const std::array<int64_t, 3>& out_strides, int threads) {
    OnePassValues values{};
    values.logits = at<const void>(addresses[0]);
    values.ids = at<const void>(addresses[1]);
    values.mask = at<const void>(addresses[2]);
    values.denominator = at<const void>(addresses[3]);
    for (int k = 0; k < OnePass::kInputs; ++k) {
        values.inputs[k] = at<const float>(addresses[4 + k]);
        values.numbers[k] = numbers[k];
    }
    values.temperature = numbers[OnePass::kInputs];
    values.divisor = numbers[OnePass::kInputs + 1];
    values.scale = numbers[OnePass::kInputs + 2];
    values.buffer = at<char>(addresses[10]);
    values.table = at(addresses[11]);
    values.out = at<void>(addresses[12]);
    values.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    values.threads = threads;
    OnePass call = prepared;  // several threads may share the prepared call
    if (!fill_rows(call, values)) return false;
    active_level().kernels->token_loss_grad(call.loss);
    return true;
}

int find(const char* const* names, int count, const std::string& name, const char* what) {
    for (int i = 0; i < count; ++i) {
        if (name == names[i]) return i;
    }
    throw std::invalid_argument(std::string(what) + " " + name + " is not compiled in");
}

/// `kind` is read, update (in place), copy (a to b) or flush (drops a from the caches).
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
    m.doc() = "Kernels on raw addresses. They check nothing: reweight_ops validates every argument first.";
    using NoGil = py::call_guard<py::gil_scoped_release>;

    m.def("build_info", &build_info, "Returns compiler, flags, version, and the instruction-set levels that were built and that are supported.");
    m.def("level", [] { return std::string(active_level().name); }, "Returns the active instruction-set level.");
    m.def("set_level", &set_level, py::arg("name"),
          "Forces a level by name, or 'auto'. Raises ValueError if it was not built or this processor lacks it.");
    m.attr("max_registers") = kMaxRegisters;
    bind_primitives(m, primitive(&Kernels::token_stats), primitive(&Kernels::top_stats), primitive(&Kernels::token_grad),
                    primitive(&Kernels::token_loss_grad));
    bind_divergence(m, divergence_primitive(&DivergenceKernels::stats), divergence_primitive(&DivergenceKernels::grad),
                    divergence_primitive(&DivergenceKernels::loss_grad));
    m.def(
        "evaluate_rows",
        [](bool fp64, const ProgramTable& table, Address params, std::array<Address, kLeaves> leaves, Address row_weights, int64_t row_weights_step,
           Address keep, std::vector<int> outputs, Address out, int64_t rows, int threads) {
            (fp64 ? evaluate_rows_of<double> : evaluate_rows_of<float>)(table, params, leaves, row_weights, row_weights_step, keep, outputs, out,
                                                                        rows, threads);
        },
        NoGil(), py::arg("fp64"), py::arg("table"), py::arg("params"), py::arg("leaves"), py::arg("row_weights"), py::arg("row_weights_step"),
        py::arg("keep"), py::arg("outputs"), py::arg("out"), py::arg("rows"), py::arg("threads"));
    m.def("mask_rows", &mask_rows_of, py::arg("ids"), py::arg("mask"), py::arg("denominator"), py::arg("runs"), py::arg("out_ids"), py::arg("keep"),
          py::arg("counted"), py::arg("lengths"));
    m.def("regroup_rows", &regroup_rows_of, py::arg("ids"), py::arg("lengths"), py::arg("runs"), py::arg("prompts"), py::arg("prompt_of"),
          py::arg("index"), py::arg("out_lengths"));
    m.def("measure_rows", &measure_rows_of, py::arg("weight"), py::arg("keep"), py::arg("runs"), py::arg("sums"));
    m.def("weigh_rows", &weigh_rows_of, py::arg("keep"), py::arg("lengths"), py::arg("weight"), py::arg("runs"), py::arg("divide"),
          py::arg("divisor"), py::arg("per_length"), py::arg("horizon"), py::arg("scale"), py::arg("factor"), py::arg("terms"), py::arg("out"));
    py::class_<OnePass>(m, "OnePass", py::module_local())
        .def(py::init(&make_one_pass), py::arg("call"), py::arg("table"), py::arg("params"), py::arg("reads_p_sq"), py::arg("entropy_gradient"),
             py::arg("run"), py::arg("masks"), py::arg("inputs"), py::arg("divide"), py::arg("per_length"), py::arg("horizon"), py::arg("terms"),
             py::arg("shared"));
    m.def(
        "one_pass_layout",
        [](const OnePass& call) {
            const OnePass::Layout at = call.layout();
            return std::vector<int64_t>{at.ids, at.weights, at.inputs, at.lengths, at.keep, at.counted, at.bytes};
        },
        py::arg("call"));
    m.def("run_one_pass", &run_one_pass, NoGil(), py::arg("call"), py::arg("addresses"), py::arg("numbers"), py::arg("out_strides"),
          py::arg("threads"));
    m.def("stream", &stream, NoGil(), py::arg("kind"), py::arg("a"), py::arg("b"), py::arg("floats"), py::arg("threads"));
}
