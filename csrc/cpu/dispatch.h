#pragma once

#include <string>
#include <vector>

namespace reweight_ops {
std::vector<std::string> level_names();
}
