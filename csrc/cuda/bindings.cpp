// The Python module reweight_ops._cuda. It imports without a driver: the static CUDA runtime looks for one at the first
// launch.
#include "bindings.h"

#include "dispatch.h"
#include "divergence.h"
#include "scale.h"

#if defined(RW_EMULATION)
#include "platform.h"
#define RW_MODULE _cuda_emulated
#else
#include <cuda_runtime_api.h>
#define RW_MODULE _cuda
#endif

using namespace reweight_ops;

PYBIND11_MODULE(RW_MODULE, m) {
    m.doc() = "CUDA kernels on raw addresses. They check nothing: reweight_ops validates every argument first. Primitives return a status.";
    m.attr("max_registers") = kMaxSharedRegisters;
    bind_primitives(m, token_stats, token_grad, token_loss_grad);
    bind_divergence(m, divergence, divergence, divergence);
    m.def(
        "scale",
        [](int dtype, Address data, std::array<int64_t, 3> strides, int64_t rows, int64_t columns, Address factor, int device, Address stream) {
            return scale({static_cast<DType>(dtype),
                          at<void>(data),
                          {strides[0], strides[1], strides[2]},
                          rows,
                          columns,
                          at<const float>(factor),
                          device,
                          at<void>(stream)});
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("data"), py::arg("strides"), py::arg("rows"), py::arg("columns"),
        py::arg("factor"), py::arg("device") = 0, py::arg("stream") = 0,
        "Computes data *= factor. It reads factor on the device and does nothing if it is 1.");
    m.def(
        "ring_unsupported_reason",
        [](const Call& call, Address out, std::array<int64_t, 3> out_strides) {
            LossGradCall full{};
            static_cast<Call&>(full) = call;
            full.out = at<void>(out);
            full.out_strides = {out_strides[0], out_strides[1], out_strides[2]};
            return ring_unsupported_reason(full);
        },
        py::arg("call"), py::arg("out"), py::arg("out_strides"),
        "Says why token_loss_grad would take its streaming kernel. Empty if it would take the ring kernel.");
    m.def("set_kernel", &set_kernel, py::arg("name"),
          "Sets the kernel of token_loss_grad in this process: auto, or streaming or ring to compare them.");
    m.def(
        "split_unsupported_reason",
        [](const Call& call, const Call& other) { return split_unsupported_reason(divergence_call(call, other, 0, 0, {1, 0, 0})); }, py::arg("call"),
        py::arg("other"), "Says why a block would take whole rows of two logits tensors. Empty if a cluster of blocks would share each row.");
    m.def(
        "divergence_blocks", [](int64_t columns) { return DivergenceSlices(int(columns)).count; }, py::arg("columns"),
        "Returns how many blocks share a row of two logits tensors where rows are split.");
    m.def("set_divergence_kernel", &set_divergence_kernel, py::arg("name"),
          "Sets the kernel on two logits tensors in this process: auto, or whole or split to compare them.");
#if defined(RW_EMULATION)
    m.def("set_schedule", &emulation::set_schedule, py::arg("name"), py::arg("seed"), "eager, late, random or skew.");
    m.def("set_device", &emulation::set_device, py::arg("major"), py::arg("shared_bytes"), py::arg("clusters"), "Sets what the host sees.");
    m.def("set_status", &emulation::set_status, py::arg("status"), "Sets a status that launches return instead of running.");
    m.def("last_error", &emulation::last_error);
    m.def("error_string", [](int status) { return "emulated status " + std::to_string(status); }, py::arg("status"));
#else
    m.def(
        "error_string",
        [](int status) {
            const auto error = static_cast<cudaError_t>(status);
            return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
        },
        py::arg("status"));
    m.def("runtime_version", [] {
        int version = 0;
        cudaRuntimeGetVersion(&version);
        return version;
    });
    m.def(
        "archs", [] { return std::string(RW_CUDA_ARCHS); },
        "Returns the compute capabilities that were compiled; the last one is also compiled as PTX.");
#endif
}
