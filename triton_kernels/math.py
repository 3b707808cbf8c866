"""The functions that generated token rules call.

They use ``tl`` operations only, because Triton's interpreter has no libdevice. They are
scalar fp32 and run once per row: accuracy matters, speed does not. Every function
returns NaN if an argument is NaN. ``tl.exp`` and ``tl.log`` are the hardware's
approximations. They are good to a few ulp, except for the logarithm near 1 and
differences of exponentials near 0: there ``log``, ``log1p`` and ``expm1`` are
polynomials.
"""

import triton
import triton.language as tl

_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: exact when multiplied by an exponent
_LN2_LOW = tl.constexpr(-2.12194440e-4)

_INVERSE_FACTORIALS = tl.constexpr(
    (1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)
)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip(x, low, high):
    return minimum(maximum(x, low), high)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def expm1(x):
    # Taylor to x¹²/12! on |x| < 1: the next term is below 2⁻³² of x. Outside, exp(x) -
    # 1 loses less than one bit.
    y = tl.fma(x, 1 / 479001600, 1 / 39916800)
    for c in tl.static_range(9):
        y = tl.fma(x, y, _INVERSE_FACTORIALS[c])
    return tl.where(tl.abs(x) < 1.0, tl.fma(x * x, y, x), tl.exp(x) - 1.0)


@triton.jit
def _log(x, tail):
    """``log(x) + tail``, rounded once; ``tail`` is far below 1."""
    # x = 2ᵏ·(1 + f) with 1 + f in [√½, √2); log(1 + f) = f - f²/2 + s·(f²/2 + R), s =
    # f/(2 + f) (Cephes/fdlibm's split).
    tiny = x < 1.1754944e-38
    y = tl.where(tiny, x * 33554432.0, x)  # 2²⁵: a subnormal has too few bits to split
    bits = y.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    k = (bits >> 23).to(tl.float32) - tl.where(tiny, 25.0, 0.0)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
    half = 0.5 * f * f
    result = k * _LN2_HIGH - ((half - (s * (half + r) + (k * _LN2_LOW + tail))) - f)
    result = tl.where(x == 0.0, float("-inf"), result)
    result = tl.where(x == float("inf"), x, result)
    return tl.where(x >= 0.0, result, float("nan"))


@triton.jit
def log(x):
    return _log(x, 0.0)


@triton.jit
def log1p(x):
    u = 1.0 + x
    # the exact rounding error of 1 + x
    lost = tl.where(tl.abs(x) < 1.0, x - (u - 1.0), 1.0 - (u - x))
    return _log(u, tl.where((u > 0.0) & (u < float("inf")), lost / u, 0.0))


@triton.jit
def sigmoid(x):
    # Takes the exponential of -|x| only: it cannot overflow, and both tails keep their
    # relative accuracy.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh_of_small(x):
    # Cephes' tanhf: an odd polynomial for |x| < 0.625.
    z = x * x
    y = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    y = tl.fma(z, tl.fma(z, y, -5.37397155531e-2), 1.33314422036e-1)
    return tl.fma(x * z, tl.fma(z, y, -3.33332819422e-1), x)


@triton.jit
def tanh(x):
    # 1 - 2/(exp(2|x|) + 1) where that subtraction loses at most one bit.
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, tanh_of_small(x), tl.where(x < 0.0, -large, large))


@triton.jit
def abs(x):
    return tl.abs(x)
