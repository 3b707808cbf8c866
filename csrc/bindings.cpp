#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = RW_VERSION;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["flags"] = RW_FLAGS;
    info["levels"] = reweight_ops::level_names();
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
    m.doc() = "Kernels on raw pointers, without any check: reweight_ops.backends validates every argument first.";
    m.def("build_info", &build_info, "Compiler, flags, instruction-set levels, version, and whether the CUDA part is in.");
}
