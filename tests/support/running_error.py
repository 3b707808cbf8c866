"""Evaluate an expression graph in fp64 and bound the error of the same graph in a
shorter arithmetic.

This is running error analysis (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.3). Every operation rounds once with unit ``u``. Every function of ``xp`` is
wrong by at most ``FUNCTION_ULPS`` units (tests/formula/test_codegen.py measures that).
Intervals follow the effect of the operands' errors on the result exactly. A comparison
of operands that are closer than their errors may have either result, so that the bound
of a select on it covers both branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reweight_ops._core.formula.trace import Expr, walk

#: Bound on the relative error of exp, expm1, log, log1p, sigmoid and tanh of
#: csrc/common/math.h and triton_kernels/math.py, in units of u.
FUNCTION_ULPS = 8.0

#: The smallest positive fp32, for results that underflow.
TINY = 2.0**-126


def evaluate(
    roots: list[Expr], values: dict[str, Tensor], u: float = 2.0**-24
) -> list[tuple[Tensor, Tensor]]:
    """(value, error bound) of each root. ``values`` has the leaves and parameters by
    name. They are fp64, and exact in the shorter arithmetic.
    """
    shape = next(iter(values.values())).shape
    memo: dict[int, tuple[Tensor, Tensor]] = {}

    def lipschitz(f, a: Tensor, e: Tensor, v: Tensor) -> Tensor:
        return torch.maximum((f(a + e) - v).abs(), (f(a - e) - v).abs())

    for x in walk(*roots):
        args = [memo[a.index] for a in x.operands]
        v, e = _node(x, args, values, shape, u, lipschitz)
        memo[x.index] = v, (e if x.is_bool else torch.where(e.isnan(), torch.inf, e))
    return [memo[x.index] for x in roots]


def _extremum(op: str, a, b):
    y = (torch.minimum if op == "min" else torch.maximum)(a[0], b[0])
    apart = (a[0] - b[0]).abs() > a[1] + b[1]
    return y, torch.where(apart, torch.where(y == a[0], a[1], b[1]), torch.maximum(a[1], b[1]))


# one branch per operation: splitting it would only hide the table
def _node(x: Expr, args, values, shape, u, lipschitz):
    zero = torch.zeros(shape, dtype=torch.float64)
    v = [a[0] for a in args]
    e = [a[1] for a in args]

    def round_off(y, k=1.0):
        return k * u * y.abs() + TINY

    match x.op:
        case "leaf" | "param":
            return values[x.args[0]].expand(shape), zero
        case "const":
            y = torch.full(shape, x.args[0], dtype=torch.float64)
            return y, torch.where(y == y.float(), 0.0, round_off(y))
        case "stop":
            return args[0]
        case "neg":
            return -v[0], e[0]
        case "abs":
            return v[0].abs(), e[0]
        case "add" | "sub":
            y = v[0] + v[1] if x.op == "add" else v[0] - v[1]
            return y, e[0] + e[1] + round_off(y.abs() + e[0] + e[1])
        case "mul":
            y = v[0] * v[1]
            propagated = v[0].abs() * e[1] + v[1].abs() * e[0] + e[0] * e[1]
            return y, propagated + round_off(y.abs() + propagated)
        case "div":
            y = v[0] / v[1]
            room = v[1].abs() - e[1]
            propagated = torch.where(room > 0, (e[0] + y.abs() * e[1]) / room, torch.inf)
            # Triton's "/" is good to 2 ulp on a GPU
            return y, propagated + round_off(y.abs() + propagated, 3.0)
        case "exp" | "expm1" | "log" | "log1p" | "sigmoid" | "tanh":
            f = getattr(torch, x.op)
            y = f(v[0])
            propagated = lipschitz(f, v[0], e[0], y)
            return y, propagated + round_off(y.abs() + propagated, FUNCTION_ULPS)
        case "min" | "max":
            return _extremum(x.op, *args)
        case "clip":
            return _extremum("min", _extremum("max", args[0], args[1]), args[2])
        case "lt" | "le" | "eq" | "ne":
            distance = torch.where(v[0] == v[1], 0.0, (v[0] - v[1]).abs())
            doubtful = (distance <= e[0] + e[1]) & (e[0] + e[1] > 0)
            return getattr(torch, x.op)(*v), doubtful
        case "and":
            return v[0] & v[1], e[0] | e[1]
        case "or":
            return v[0] | v[1], e[0] | e[1]
        case "not":
            return ~v[0], e[0]
        case "where":
            y = torch.where(v[0], v[1], v[2])
            either = torch.where(v[1] == v[2], 0.0, (v[1] - v[2]).abs()) + torch.maximum(e[1], e[2])
            return y, torch.where(e[0], either, torch.where(v[0], e[1], e[2]))
    raise AssertionError(x.op)


def no_tie(traced, values) -> torch.Tensor:
    """Rows in which no minimum, maximum or clip has a tie. The conventions differ in
    ties by contract.
    """
    ties = [x for x in walk(traced.result) if x.op in ("min", "max", "clip")]
    sides = evaluate([operand for x in ties for operand in x.args[-2:]], values)
    unequal = [a[0] != b[0] for a, b in zip(sides[::2], sides[1::2], strict=True)]
    return torch.stack([*unequal, torch.ones_like(values["logp"], dtype=torch.bool)]).all(0)
