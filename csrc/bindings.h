// Shared by the bindings of every compiled backend: calls from raw addresses, program tables and
// primitives. This file uses no torch header and checks nothing.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/divergence.h"

namespace py = pybind11;

namespace reweight_ops {
namespace {

using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

/// Makes a table from the address of its words, which must outlive it: the instructions, the
/// constants, the ends of levels. `counts` has the order of ProgramTable.
inline ProgramTable make_table(Address words, std::array<int, 9> counts, std::array<int, kLossOutputs> outputs) {
    const auto [parameters, constants, uniform_levels, levels, uniform, instructions, inputs, terms, registers] = counts;
    const uint64_t* const code = at<const uint64_t>(words);
    ProgramTable table{code,
                       reinterpret_cast<const double*>(code + instructions),
                       reinterpret_cast<const int64_t*>(code + instructions + constants),
                       parameters,
                       constants,
                       uniform_levels,
                       levels,
                       uniform,
                       instructions,
                       inputs,
                       terms,
                       registers,
                       {}};
    for (int k = 0; k < kLossOutputs; ++k) table.outputs[k] = outputs[k];
    return table;
}

Call make_call(int dtype, Address logits, std::array<int64_t, 3> strides, int64_t rows, int64_t columns, std::array<int64_t, 3> vocab, float softcap,
               Address ids, Address temperature, bool temperature_per_row, Address bounds, int threads, int device, Address stream) {
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
    call.bounds = at<const int64_t>(bounds);
    call.ids = at<const int64_t>(ids);
    call.temperature = at(temperature);
    call.temperature_per_row = temperature_per_row;
    call.threads = threads;
    call.device = device;
    call.stream = at<void>(stream);
    return call;
}

StatsCall stats_call(const Call& common, std::array<Address, 6> out) {
    StatsCall call{};
    static_cast<Call&>(call) = common;
    call.logp = at(out[0]);
    call.entropy = at(out[1]);
    call.lse = at(out[2]);
    call.lse_low = at(out[3]);
    call.log_sum_p_sq = at(out[4]);
    call.max_logp = at(out[5]);
    return call;
}

GradCall grad_call(const Call& common, std::array<Address, 5> stats, std::array<Address, 4> derivatives, Address out,
                   std::array<int64_t, 3> out_strides) {
    GradCall call{};
    static_cast<Call&>(call) = common;
    call.logp = at(stats[0]);
    call.entropy = at(stats[1]);
    call.lse = at(stats[2]);
    call.log_sum_p_sq = at(stats[3]);
    call.lse_low = at(stats[4]);
    call.d_logp = at(derivatives[0]);
    call.d_entropy = at(derivatives[1]);
    call.d_lse = at(derivatives[2]);
    call.d_p_sq = at(derivatives[3]);
    call.out = at<void>(out);
    call.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    return call;
}

LossGradCall loss_grad_call(const Call& common, const ProgramTable& table, Address params, bool reads_p_sq, bool entropy_gradient,
                            Address row_weights, int64_t row_weights_step, std::array<Address, 4> inputs, Address rows, Address out,
                            std::array<int64_t, 3> out_strides) {
    LossGradCall call{};
    static_cast<Call&>(call) = common;
    call.table = table;
    call.params = at(params);
    call.reads_p_sq = reads_p_sq;
    call.entropy_gradient = entropy_gradient;
    call.row_weights = at(row_weights);
    call.row_weights_step = row_weights_step;
    call.old_logp = at(inputs[0]);
    call.adv = at(inputs[1]);
    call.ref_logp = at(inputs[2]);
    call.sampling_logp = at(inputs[3]);
    float** const targets[] = {&call.logp, &call.entropy, &call.weighted_loss, &call.loss, &call.d_logp, &call.d_entropy};
    for (int64_t k = 0; k < 6; ++k) *targets[k] = at(rows) + k * common.rows;
    call.out = at<void>(out);
    call.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    return call;
}

/// Binds the classes Call and Table, the names of a table's operations, and the primitives. A
/// primitive returns a status; 0 is success.
template <class Stats, class TopStats, class Grad, class LossGrad>
void bind_primitives(py::module_& m, Stats token_stats, TopStats top_stats, Grad token_grad, LossGrad token_loss_grad) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
#if defined(RW_SOURCES)
    m.attr("sources") = RW_SOURCES;  // the hash that reweight_ops/_core/backends/sources.py computes
#endif
    std::vector<std::string> operations;
#define RW_NAME(name, text, value) operations.push_back(text);
    RW_OPERATIONS(RW_NAME)
#undef RW_NAME
    m.attr("operations") = operations;
    py::class_<ProgramTable>(m, "Table", py::module_local()).def(py::init(&make_table), py::arg("words"), py::arg("counts"), py::arg("outputs"));
    py::class_<Call>(m, "Call", py::module_local())
        .def(py::init(&make_call), py::arg("dtype"), py::arg("logits"), py::arg("strides"), py::arg("rows"), py::arg("columns"), py::arg("vocab"),
             py::arg("softcap"), py::arg("ids"), py::arg("temperature"), py::arg("temperature_per_row"), py::arg("bounds") = 0,
             py::arg("threads") = 1, py::arg("device") = 0, py::arg("stream") = 0);
    m.def(
        "token_stats", [=](const Call& call, std::array<Address, 6> out) { return token_stats(stats_call(call, out)); }, NoGil(), py::arg("call"),
        py::arg("out"));
    m.attr("most_top") = kMostTop;
    m.def(
        "top_stats",
        [=](const Call& common, std::array<Address, 6> out, int top, Address top_ids) {
            TopStatsCall call{};
            static_cast<StatsCall&>(call) = stats_call(common, out);
            call.top = top;
            call.top_ids = at<int64_t>(top_ids);
            return top_stats(call);
        },
        NoGil(), py::arg("call"), py::arg("out"), py::arg("top"), py::arg("top_ids"));
    m.def(
        "token_grad",
        [=](const Call& call, std::array<Address, 5> stats, std::array<Address, 4> derivatives, Address out, std::array<int64_t, 3> out_strides) {
            return token_grad(grad_call(call, stats, derivatives, out, out_strides));
        },
        NoGil(), py::arg("call"), py::arg("stats"), py::arg("derivatives"), py::arg("out"), py::arg("out_strides"));
    m.def(
        "token_loss_grad",
        [=](const Call& call, const ProgramTable& table, Address params, bool reads_p_sq, bool entropy_gradient, Address row_weights,
            int64_t row_weights_step, std::array<Address, 4> inputs, Address rows, Address out, std::array<int64_t, 3> out_strides) {
            return token_loss_grad(
                loss_grad_call(call, table, params, reads_p_sq, entropy_gradient, row_weights, row_weights_step, inputs, rows, out, out_strides));
        },
        NoGil(), py::arg("call"), py::arg("table"), py::arg("params"), py::arg("reads_p_sq"), py::arg("entropy_gradient"), py::arg("row_weights"),
        py::arg("row_weights_step"), py::arg("inputs"), py::arg("rows"), py::arg("out"), py::arg("out_strides"));
}

/// `call` describes the first tensor; `other` has the address and the softmax parameters of the
/// second.
DivergenceCall divergence_call(const Call& call, const Call& other, Address table, Address out, std::array<int64_t, 3> out_strides) {
    DivergenceCall d{};
    static_cast<Call&>(d) = call;
    d.q = other;
    d.out = at<void>(out);
    d.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
    d.table = at(table);
    return d;
}

/// Binds the primitives on two logits tensors. A primitive returns a status; 0 is success.
template <class Stats, class Grad, class LossGrad>
void bind_divergence(py::module_& m, Stats stats, Grad grad, LossGrad loss_grad) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
    using Strides = std::array<int64_t, 3>;
    m.def(
        "divergence_stats",
        [=](const Call& call, const Call& other, Address table) { return stats(divergence_call(call, other, table, 0, {1, 0, 0})); }, NoGil(),
        py::arg("call"), py::arg("other"), py::arg("table"));
    m.def(
        "divergence_grad",
        [=](const Call& call, const Call& other, Address table, Address derivatives, Address out, Strides out_strides) {
            DivergenceCall d = divergence_call(call, other, 0, out, out_strides);
            d.known = at(table);
            d.derivatives = at(derivatives);
            return grad(d);
        },
        NoGil(), py::arg("call"), py::arg("other"), py::arg("table"), py::arg("derivatives"), py::arg("out"), py::arg("out_strides"));
    m.def(
        "divergence_loss_grad",
        [=](const Call& call, const Call& other, Address table, Address constants, Address weights, Address out, Strides out_strides) {
            DivergenceCall d = divergence_call(call, other, table, out, out_strides);
            d.constants = at(constants);
            d.weights = at(weights);
            return loss_grad(d);
        },
        NoGil(), py::arg("call"), py::arg("other"), py::arg("table"), py::arg("constants"), py::arg("weights"), py::arg("out"),
        py::arg("out_strides"));
}

}  // namespace
}  // namespace reweight_ops
