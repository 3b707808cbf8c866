// 16-bit logits as bits.
#pragma once

#include <cstdint>

namespace reweight_ops {
namespace {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

}  // namespace
}  // namespace reweight_ops
