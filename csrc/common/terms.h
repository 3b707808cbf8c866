// What sweeps over a row compute: a kernel is compiled for each.
#pragma once

namespace reweight_ops {
namespace {

/// Of a statistics sweep, with e = 2^t: Σe alone, Σe·t too, or Σe² too with an optional softcap.
enum class Sums { plain, entropy, full };

/// Of a gradient sweep: one value in every column, e·A, e·(A + B·t), the same far from zero, or e·(A + B·t + D·e) times the softcap's slope.
enum class Terms { fill, plain, entropy, far, full };

}  // namespace
}  // namespace reweight_ops
