// The instruction-set levels: which were built, which this processor supports, and which is active.
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

/// All levels that were built, lowest first.
const std::vector<Level>& levels();

/// The active level: the highest supported one, unless set_level chose another.
const Level& active_level();

/// Chooses a level; "auto" means the highest supported one. Throws std::invalid_argument if the
/// level was not built or this processor lacks it.
void set_level(const std::string& name);

}  // namespace reweight_ops
