// Which instruction-set levels were built, which this processor has, and which one runs.
#pragma once

#include <string>
#include <vector>

#include "divergence.h"
#include "primitives.h"

namespace reweight_ops {

struct Level {
    const char* name;
    const Kernels* kernels;
    const DivergenceKernels* divergence;
    bool supported;  // by this processor
};

/// All levels that were built, worst first.
const std::vector<Level>& levels();

/// The one that runs: the best supported one, unless set_level chose another.
const Level& active_level();

/// Throws std::invalid_argument for a level that was not built or that this processor lacks. "auto": the best.
void set_level(const std::string& name);

}  // namespace reweight_ops
