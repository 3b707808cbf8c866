"""Fits the polynomials of csrc/cpu/simd.h by the minimax relative error (Lawson's
iteration) and prints them with their errors.

python csrc/cpu/fit_exp2.py        needs numpy
"""

import numpy as np


def fit(degree, truth, first=None, points=4001, rounds=3000):
    """Coefficients of the polynomial nearest to ``truth`` on [0, 1] in relative error;
    ``first`` fixes the constant term.
    """
    x = (np.cos(np.pi * (np.arange(points) + 0.5) / points) + 1) / 2
    y = truth(x)
    low = 0 if first is None else 1
    basis = np.stack([x**k for k in range(low, degree + 1)], 1) / y[:, None]
    target = np.ones(points) if first is None else 1 - first / y
    weight = np.ones(points)
    for _ in range(rounds):
        found, *_ = np.linalg.lstsq(
            basis * np.sqrt(weight)[:, None], target * np.sqrt(weight), rcond=None
        )
        error = np.abs(basis @ found - target)
        weight *= error + 1e-30
        weight /= weight.sum()
    return ([] if first is None else [first]) + list(found), error.max()


def show(name, coefficients, error):
    print(f"{name}: relative error {error:.2e}: " + ", ".join(f"{c:.9e}" for c in coefficients))


if __name__ == "__main__":
    for degree, first in ((3, None), (4, None), (5, 1.0)):
        show(f"2^f, degree {degree}", *fit(degree, np.exp2, first))
    show("(2^f - 1) / f, degree 5", *fit(5, lambda f: np.expm1(f * np.log(2)) / f))
