"""Partial derivatives of a traced formula, in forward mode, one leaf at a time.

The derivatives share nodes with the value.

Two things keep the result finite where the formula is finite. A *select* drops a branch
that is not taken, and the select is always the last step: ``where(c, dx, 0)`` times a
factor that may be infinite becomes ``where(c, dx * factor, 0)``, never ``0 * inf``. A
slope that is a small difference is not computed as a difference: ``sigmoid'(x) =
sigmoid(x) * sigmoid(-x)``.

Conventions: ``clip`` passes the gradient on its bounds. ``abs`` has slope 0 at 0. A tie
of ``minimum`` or ``maximum``, or a NaN in it, goes to the first argument. A comparison
has no slope.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import DIFFERENTIABLE_FIELDS
from .trace import Expr, Traced, walk


def _is(x: Expr, value: float) -> bool:
    return x.op == "const" and x.args[0] == value


def simplified_add(a: Expr, b: Expr) -> Expr:
    if _is(a, 0):
        return b
    if _is(b, 0):
        return a
    if a.op == b.op == "const":
        return a.graph.const(a.args[0] + b.args[0])
    if a.op == b.op == "where" and a.args[0] is b.args[0]:
        return select(
            a.args[0], simplified_add(a.args[1], b.args[1]), simplified_add(a.args[2], b.args[2])
        )
    if a.op == "const":
        return simplified_add(b, a)
    # the slope of expm1(x) - x; as exp(x) - 1 it would lose every digit at small x
    if a.op == "exp" and _is(b, -1):
        return a.graph.node("expm1", a.args[0])
    if a.op == "neg" and (b.op in ("neg", "const")):
        return simplified_neg(simplified_add(a.args[0], simplified_neg(b)))
    if a is b:
        return simplified_mul(a.graph.const(2.0), a)
    return a - b.args[0] if b.op == "neg" else a + b


def simplified_neg(a: Expr) -> Expr:
    if a.op == "const":
        return a.graph.const(0.0 - a.args[0])
    if a.op == "where":
        return select(a.args[0], simplified_neg(a.args[1]), simplified_neg(a.args[2]))
    if a.op == "sub":
        return a.graph.arithmetic("sub", a.args[1], a.args[0])
    return a.args[0] if a.op == "neg" else -a


def simplified_sub(a: Expr, b: Expr) -> Expr:
    return simplified_add(a, simplified_neg(b))


def simplified_mul(a: Expr, b: Expr) -> Expr:
    if b.op == "const":
        a, b = b, a
    if a.op == "const":
        scale = a.args[0]
        if scale < 0:
            return simplified_neg(simplified_mul(a.graph.const(-scale), b))
        if b.op == "neg":
            return simplified_neg(simplified_mul(a, b.args[0]))
        if b.op == "mul" and b.args[0].op == "const":
            scale, b = scale * b.args[0].args[0], b.args[1]
        if b.op == "const":
            return a.graph.const(scale * b.args[0])
        return a.graph.const(0.0) if scale == 0 else b if scale == 1 else scale * b
    if a.op == "neg":
        return simplified_neg(simplified_mul(a.args[0], b))
    return simplified_neg(simplified_mul(a, b.args[0])) if b.op == "neg" else a * b


def simplified_div(a: Expr, b: Expr) -> Expr:
    if a.op == "neg":
        return simplified_neg(simplified_div(a.args[0], b))
    return a if _is(a, 0) or _is(b, 1) else a / b


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    return a if a is b else a.graph.node("where", condition, a, b)


def _through(
    slope: Expr, factor: Expr, combine: Callable[[Expr, Expr], Expr] = simplified_mul
) -> Expr:
    """Return ``slope * factor`` (or ``/``).

    A slope that a select has made 0 stays 0 even if the factor is infinite.
    """
    if slope.op == "where":
        condition, a, b = slope.args
        return select(condition, _through(a, factor, combine), _through(b, factor, combine))
    result = combine(slope, factor)
    if slope.op in ("add", "sub") and any(x.op == "where" for x in slope.args):
        return select(slope.graph.arithmetic("eq", slope, 0.0), slope.graph.const(0.0), result)
    return result


def _saturating(slope: Expr, factor: Expr) -> Expr:
    """Return ``slope * factor`` where the factor may round to 0 and the slope may have
    overflowed.
    """
    result = _through(slope, factor)
    if any(x.op in ("exp", "expm1") for x in walk(slope)):
        return select(slope.graph.arithmetic("eq", factor, 0.0), slope.graph.const(0.0), result)
    return result


class Derivative:
    """Differentiate the nodes of one graph by ``variable``. The nodes ``fixed`` do not
    depend on it.
    """

    def __init__(self, variable: Expr, fixed: tuple[Expr, ...] = ()) -> None:
        zero, one = variable.graph.const(0.0), variable.graph.const(1.0)
        self.memo = {x.index: zero for x in fixed} | {variable.index: one}

    def __call__(self, x: Expr) -> Expr:
        if x.index not in self.memo:
            for node in walk(x):  # operands first, so that no recursion is deep
                if node.index not in self.memo and not node.is_bool:
                    self.memo[node.index] = self._of(node)
        return self.memo[x.index]

    def _of(self, x: Expr) -> Expr:
        g = x.graph
        zero, one = g.const(0.0), g.const(1.0)
        match x.op, x.args:
            case (("leaf" | "const" | "param" | "stop"), _):
                return zero
            case "add", (a, b):
                return simplified_add(self(a), self(b))
            case "sub", (a, b):
                return simplified_sub(self(a), self(b))
            case "neg", (a,):
                return simplified_neg(self(a))
            case "mul", (a, b):
                return simplified_add(_through(self(a), b), _through(self(b), a))
            case "div", (a, b):
                return simplified_sub(
                    _through(self(a), b, simplified_div), _through(self(b), simplified_div(x, b))
                )
            case "exp", (a,):
                return _through(self(a), x)
            case "expm1", (a,):
                return _through(self(a), g.node("exp", a))
            case "log", (a,):
                return _through(self(a), a, simplified_div)
            case "log1p", (a,):
                return _through(self(a), simplified_add(one, a), simplified_div)
            case "sigmoid", (a,):
                return _saturating(self(a), simplified_mul(x, g.node("sigmoid", simplified_neg(a))))
            case "tanh", (a,):  # 1 - tanh² = 4·sigmoid(2x)·sigmoid(-2x)
                twice = simplified_add(a, a)
                return _saturating(
                    self(a),
                    4.0 * (g.node("sigmoid", twice) * g.node("sigmoid", simplified_neg(twice))),
                )
            case "abs", (a,):
                return select(zero < a, self(a), select(a < zero, simplified_neg(self(a)), zero))
            case "min", (a, b):
                return select(b < a, self(b), self(a))
            case "max", (a, b):
                return select(a < b, self(b), self(a))
            case "clip", (a, low, high):
                outside = select(high < g.node("max", a, low), self(high), self(low))
                return select((low <= a) & (a <= high), self(a), outside)
            case "where", (condition, a, b):
                return select(condition, self(a), self(b))
        raise TypeError(f"{x.op} has no derivative inside a kernel.")


def value_of(root: Expr) -> Expr:
    """Rewrite ``a + stop(b - a)``, the straight-through idiom, as ``b``.

    The sum would lose the digits of b where a is larger.
    """
    memo: dict[int, Expr] = {}
    for x in walk(root):
        operands = [memo[a.index] if isinstance(a, Expr) else a for a in x.args]
        memo[x.index] = x.graph.node(x.op, *operands)
        if (
            x.op == "add"
            and operands[1].op == "stop"
            and operands[1].args[0].op == "sub"
            and operands[1].args[0].args[1] is operands[0]
        ):
            memo[x.index] = operands[1].args[0].args[0]
    return memo[root.index]


def value(traced: Traced) -> Expr:
    """Return the formula's value; see :func:`value_of`."""
    return value_of(traced.result)


def derive(traced: Traced) -> dict[str, Expr]:
    """Return the partial derivative of the formula by each of
    :data:`~reweight_ops._core.formula.base.DIFFERENTIABLE_FIELDS`.
    """
    graph = traced.result.graph
    return {
        leaf: Derivative(graph.node("leaf", leaf))(traced.result) for leaf in DIFFERENTIABLE_FIELDS
    }
