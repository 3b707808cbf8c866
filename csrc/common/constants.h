// Constants that the kernels of every backend use.
#pragma once

#include <limits>

namespace reweight_ops {
namespace {

constexpr double kLn2 = 0.693147180559945309417, kLog2e = 1.442695040888963407360;
constexpr float kLn2f = float(kLn2), kLog2ef = float(kLog2e);
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
/// Lower bound of a base-2 exponent. 2^-150 is 0, and 0 * -150 is 0, where 0 * -inf would be NaN.
constexpr float kFloor = -150.0f;

}  // namespace
}  // namespace reweight_ops
