// What a sweep over a row computes. A kernel is compiled for each case.
#pragma once

namespace reweight_ops {
namespace {

/// Sums of a statistics sweep, with e = 2^t: Σe; Σe and Σe·t; or those and Σe², with an optional
/// softcap.
enum class Sums { plain, entropy, full };

/// Terms of a gradient sweep: one value in every column; e·A; e·(A + B·t); the same for logits far
/// from zero; or e·(A + B·t + D·e) times the softcap's slope.
enum class Terms { fill, plain, entropy, far, full };

}  // namespace
}  // namespace reweight_ops
