"""Run a formula once on symbols and keep what it computed as an expression graph.

Common subexpressions are shared. ``trace_rule(cls)`` and ``trace_weight(cls)`` call the
one method of a rule or a weight with leaves, hyper-parameters and an ``xp`` that record
instead of compute. An operation that a kernel cannot do (a Python branch on a traced
value, ``math.exp``, ``torch.exp``) raises here, and the message says what to write
instead.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .base import TOKEN_FIELDS, Formula, Rule, TokenWeight
from .namespace import FUNCTIONS

COMPARISONS = frozenset({"lt", "le", "eq", "ne"})
LOGICAL = frozenset({"and", "or", "not"})
SYMBOLS = frozenset({"leaf", "param", "const"})

#: The statistics that ``batch`` offers to a weight: over the valid rows of the call, of
#: each row's sequence, or of each row's prompt.
BATCH_FUNCTIONS = (
    "mean",
    "sum",
    "min",
    "max",
    "quantile",
    "quantile_nearest",
    "top",
    "largest",
    "draw",
    "rank",
    "mean_below",
    "capped_mean",
    "seq_mean",
    "seq_sum",
    "seq_min",
    "seq_max",
    "seq_rank",
    "seq_quantile",
    "seq_cumsum",
    "seq_suffix_sum",
    "group_sum",
    "group_mean",
    "group_min",
    "group_max",
)

#: The names that other libraries give to a function of ``xp``.
_ALIASES = {
    "clamp": "clip",
    "clamp_min": "maximum",
    "clamp_max": "minimum",
    "min": "minimum",
    "max": "maximum",
    "fmin": "minimum",
    "fmax": "maximum",
    "relu": "maximum",
    "absolute": "abs",
    "fabs": "abs",
    "detach": "stop_gradient",
    "expit": "sigmoid",
}

_NUMPY_OPERATORS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}


def _instead(name: str) -> str:
    known = _ALIASES.get(name, name)
    return (
        f"use xp.{known}"
        if known in FUNCTIONS
        else f"there is no xp.{name}; xp has: {', '.join(FUNCTIONS)}"
    )


def _refuse(what: str, name: str) -> NoReturn:
    raise TypeError(
        f"{what} on a traced value: a formula is also compiled into kernels, so {_instead(name)}."
    )


class Graph:
    """The nodes of one trace. Two equal expressions are one node (hash-consing), so
    identity is equality.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Expr] = {}

    def node(self, op: str, *args: Any) -> Expr:
        key = (op, *(a.index if isinstance(a, Expr) else repr(a) for a in args))
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Expr(self, len(self._nodes), op, args)
        return found

    def const(self, value: float) -> Expr:
        return self.node("const", float(value))

    def lift(self, value: Any) -> Expr:
        if isinstance(value, Expr):
            if value.graph is not self:
                raise TypeError(
                    "a formula used a value that an earlier call left behind; compute it again."
                )
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self.const(value)
        raise TypeError(
            f"a formula computed with a {type(value).__name__}; a kernel knows only numbers, "
            "self.<field>, t.<leaf> and xp.<function>."
        )

    def number(self, value: Any) -> Expr:
        x = self.lift(value)
        if x.is_bool:
            raise TypeError("arithmetic on a condition: use xp.where(condition, a, b).")
        return x

    def condition(self, value: Any) -> Expr:
        x = self.lift(value)
        if not x.is_bool:
            raise TypeError(
                "expected a condition (a comparison, or & | ~ of comparisons), got a number."
            )
        return x

    def arithmetic(self, op: str, *args: Any) -> Expr:
        return self.node(op, *map(self.number, args))

    def power(self, base: Expr, exponent: Any) -> Expr:
        if (
            not isinstance(exponent, int)
            or isinstance(exponent, bool)
            or not 1 <= abs(exponent) <= 8
        ):
            raise TypeError(
                "x ** n is traced only for whole n from 1 to 8 (or -1 to -8): use xp.exp(n * "
                "xp.log(x))."
            )
        result = x = self.number(base)
        for _ in range(abs(exponent) - 1):
            result = result * x
        return result if exponent > 0 else 1.0 / result


class Expr:
    """A node: an operation and its operands. It behaves like a number inside a formula
    only.
    """

    __slots__ = ("__weakref__", "args", "graph", "index", "is_bool", "op")

    def __init__(self, graph: Graph, index: int, op: str, args: tuple[Any, ...]) -> None:
        self.graph = graph
        self.index = index
        self.op = op
        self.args = args
        self.is_bool = op in COMPARISONS or op in LOGICAL

    @property
    def operands(self) -> tuple[Expr, ...]:
        return tuple(a for a in self.args if isinstance(a, Expr))

    def __repr__(self) -> str:
        return (
            str(self.args[0])
            if self.op in SYMBOLS
            else f"{self.op}({', '.join(map(repr, self.args))})"
        )

    def __add__(self, other: Any) -> Expr:
        return self.graph.arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return self.graph.arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return self.graph.arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return self.graph.arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return self.graph.arithmetic("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return self.graph.arithmetic("mul", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return self.graph.arithmetic("div", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return self.graph.arithmetic("div", other, self)

    def __pow__(self, other: Any) -> Expr:
        return self.graph.power(self, other)

    def __neg__(self) -> Expr:
        return self.graph.arithmetic("neg", self)

    def __pos__(self) -> Expr:
        return self.graph.number(self)

    def __abs__(self) -> Expr:
        return self.graph.arithmetic("abs", self)

    def __lt__(self, other: Any) -> Expr:
        return self.graph.arithmetic("lt", self, other)

    def __le__(self, other: Any) -> Expr:
        return self.graph.arithmetic("le", self, other)

    def __gt__(self, other: Any) -> Expr:
        return self.graph.arithmetic("lt", other, self)

    def __ge__(self, other: Any) -> Expr:
        return self.graph.arithmetic("le", other, self)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return self.graph.arithmetic("eq", self, other)

    def __ne__(self, other: object) -> Expr:  # type: ignore[override]
        return self.graph.arithmetic("ne", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Expr:
        return self.graph.node("and", self.graph.condition(self), self.graph.condition(other))

    def __or__(self, other: Any) -> Expr:
        return self.graph.node("or", self.graph.condition(self), self.graph.condition(other))

    def __invert__(self) -> Expr:
        return self.graph.node("not", self.graph.condition(self))

    # --- operations that a kernel cannot do -------------------------------------------
    def __bool__(self) -> bool:
        raise TypeError(
            "if, and, or, not, min() and max() need the value of a traced expression, which "
            "differs per token: "
            "use xp.where(condition, a, b), & | ~, xp.minimum and xp.maximum."
        )

    def __float__(self) -> float:
        raise TypeError(
            "math.* or float() on a traced value: use xp.<function> instead; xp has: "
            f"{', '.join(FUNCTIONS)}."
        )

    __int__ = __index__ = __complex__ = __float__

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a traced value is one number of one token, so it cannot be iterated.")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a traced value has no attribute {name!r}: {_instead(name)}.")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        name = getattr(func, "__name__", str(func))
        if name.startswith("__"):
            raise TypeError(
                "a torch tensor met a traced value: a formula uses only numbers, self.<field>, "
                "t.<leaf> and xp.<function>."
            )
        _refuse(f"torch.{name}", name)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"numpy on a traced value: use xp.<function> instead; xp has: {', '.join(FUNCTIONS)}."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        name = ufunc.__name__
        # np.float64(2) * x: numpy's operator runs first
        if method == "__call__" and name in _NUMPY_OPERATORS and not kwargs:
            return _NUMPY_OPERATORS[name](
                *(a if isinstance(a, Expr) else self.graph.number(a) for a in args)
            )
        _refuse(f"numpy.{name}", name)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        _refuse(f"numpy.{func.__name__}", func.__name__)


class TracedNamespace:
    """An ``xp`` that records. It has exactly the names of
    :data:`~reweight_ops._core.formula.namespace.FUNCTIONS`.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_instead(name))

    def exp(self, x: Any) -> Expr:
        return self._graph.arithmetic("exp", x)

    def expm1(self, x: Any) -> Expr:
        return self._graph.arithmetic("expm1", x)

    def log(self, x: Any) -> Expr:
        return self._graph.arithmetic("log", x)

    def log1p(self, x: Any) -> Expr:
        return self._graph.arithmetic("log1p", x)

    def sigmoid(self, x: Any) -> Expr:
        return self._graph.arithmetic("sigmoid", x)

    def tanh(self, x: Any) -> Expr:
        return self._graph.arithmetic("tanh", x)

    def abs(self, x: Any) -> Expr:
        return self._graph.arithmetic("abs", x)

    def minimum(self, a: Any, b: Any) -> Expr:
        return self._graph.arithmetic("min", a, b)

    def maximum(self, a: Any, b: Any) -> Expr:
        return self._graph.arithmetic("max", a, b)

    def clip(self, x: Any, low: Any, high: Any) -> Expr:
        return self._graph.arithmetic("clip", x, low, high)

    def where(self, condition: Any, a: Any, b: Any) -> Expr:
        g = self._graph
        c, x, y = g.condition(condition), g.lift(a), g.lift(b)
        if x.is_bool and y.is_bool:
            return (c & x) | (~c & y)
        return g.node("where", c, g.number(x), g.number(y))

    def stop_gradient(self, x: Any) -> Expr:
        value = self._graph.lift(x)
        return value if value.is_bool else self._graph.node("stop", value)

    def straight_through(self, slope: Any, value: Any) -> Expr:
        first, second = self._graph.number(slope), self._graph.number(value)
        return first + self._graph.node("stop", second - first)


class _Leaves:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Expr:
        if name not in TOKEN_FIELDS:
            raise AttributeError(f"a token has no {name!r}; it has: {', '.join(TOKEN_FIELDS)}.")
        return self._graph.node("leaf", name)


class _Batch:
    """The ``batch`` of a weight. Each call is a node that only two_pass can evaluate:
    ``batch(name, names of the last operands, *operands)``.

    The operands of the call still count as read.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Callable[..., Expr]:
        if name not in BATCH_FUNCTIONS:
            raise AttributeError(f"batch has no {name!r}; it has: {', '.join(BATCH_FUNCTIONS)}.")
        return lambda *args, **kwargs: self._graph.node(
            "batch", name, tuple(kwargs), *map(self._graph.lift, [*args, *kwargs.values()])
        )


@dataclasses.dataclass(frozen=True)
class Traced:
    """One formula as data. The result depends on ``leaves`` and on ``statistics`` (of
    ``batch``).
    """

    result: Expr
    leaves: frozenset[str]
    parameters: tuple[str, ...]
    statistics: frozenset[str]

    @property
    def uses_batch(self) -> bool:
        """Return whether the formula reads the batch, which no kernel can evaluate."""
        return bool(self.statistics)

    @property
    def reads_groups(self) -> bool:
        """Return whether the formula needs to know which sequences share a prompt."""
        return any(name.startswith("group_") for name in self.statistics)


def unstopped(x: Expr) -> Expr:
    """Return the node whose value ``x`` has. It is ``x`` itself unless ``x`` only stops
    the gradient.
    """
    return unstopped(x.args[0]) if x.op == "stop" else x


def walk(*roots: Expr) -> list[Expr]:
    """Return every node that ``roots`` depend on, each once, operands before their
    users.
    """
    order: dict[int, Expr] = {}
    # a stack instead of recursion: a loss of many terms is a deep graph
    waiting = list(reversed(roots))
    while waiting:
        x = waiting[-1]
        missing = [a for a in x.operands if a.index not in order] if x.index not in order else []
        if missing:
            waiting += reversed(missing)
        else:
            order.setdefault(x.index, x)
            waiting.pop()
    return list(order.values())


def _symbolic_self(cls: type[Formula], graph: Graph) -> Any:
    # The instance is made without __init__. Methods, properties, super() and settings
    # work as usual, and the fields are symbols.
    self = object.__new__(cls)
    for name in cls.parameter_names():
        object.__setattr__(self, name, graph.node("param", name))
    return self


def _trace(
    cls: type[Formula], call: Callable[[Any, TracedNamespace, _Leaves, Graph], Any]
) -> Traced:
    graph = Graph()
    try:
        result = graph.number(
            call(_symbolic_self(cls, graph), TracedNamespace(graph), _Leaves(graph), graph)
        )
    except (TypeError, AttributeError) as error:
        raise type(error)(f"tracing {cls.__module__}.{cls.__qualname__}: {error}") from error
    nodes = walk(result)
    leaves = frozenset(x.args[0] for x in nodes if x.op == "leaf")
    statistics = frozenset(x.args[0] for x in nodes if x.op == "batch")
    return Traced(result, leaves, cls.parameter_names(), statistics)


# The references are weak. A class that a notebook cell redefines is another class: it
# is traced again, and the old one can be collected.
_rules: weakref.WeakKeyDictionary[type[Rule], Traced] = weakref.WeakKeyDictionary()
_weights: weakref.WeakKeyDictionary[type[TokenWeight], Traced] = weakref.WeakKeyDictionary()


def trace_rule(cls: type[Rule]) -> Traced:
    """Return the expression graph of ``cls.loss``.

    Raises TypeError or AttributeError if the formula does something that a kernel
    cannot do.
    """
    if cls not in _rules:
        _rules[cls] = _trace(cls, lambda self, xp, t, graph: cls.loss(self, xp, t))
    return _rules[cls]


def trace_weight(cls: type[TokenWeight]) -> Traced:
    """Return the expression graph of ``cls.weight``; see :func:`trace_rule`."""
    if cls not in _weights:
        _weights[cls] = _trace(
            cls, lambda self, xp, t, graph: cls.weight(self, xp, t, _Batch(graph))
        )
    return _weights[cls]


_clips: weakref.WeakKeyDictionary[type[Rule], tuple[Traced, Traced] | None] = (
    weakref.WeakKeyDictionary()
)


def trace_clip(cls: type[Rule]) -> tuple[Traced, Traced] | None:
    """Return ``cls.clipped`` as two graphs, or None if the rule does not clip.

    A graph is 1 where a token is clipped, and 0 elsewhere.
    """
    if cls not in _clips:

        def side(k: int) -> Callable[[Any, TracedNamespace, _Leaves, Graph], Any]:
            def call(self: Any, xp: TracedNamespace, t: _Leaves, graph: Graph) -> Any:
                found = cls.clipped(self, xp, t)
                return graph.const(math.nan) if found is None else xp.where(found[k], 1.0, 0.0)

            return call

        low, high = (_trace(cls, side(k)) for k in range(2))
        absent = low.result.op == "const" and math.isnan(low.result.args[0])
        _clips[cls] = None if absent else (low, high)
    return _clips[cls]
