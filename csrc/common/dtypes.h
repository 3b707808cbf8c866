// 16-bit logits, stored as their bits.
#pragma once

#include <cstdint>

namespace reweight_ops {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

}  // namespace reweight_ops
