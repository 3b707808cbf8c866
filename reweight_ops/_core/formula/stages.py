"""A loss whose weights read statistics of the batch, as programs for stored rows.

A table holds numbers of rows, below the row weights. One stage after the other adds to
it: a program evaluates what some statistics are of, and then each statistic becomes a
row. The last program, that of the loss, reads the statistics there. Weights and
hyper-parameters that are formulas have no gradient, so it takes their parts as given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .base import Formula, Rule, TokenWeight
from .loss_program import Program
from .monitor import Monitor
from .text import write_formula
from .trace import Expr, Graph, Traced, trace_clip, trace_rule, trace_weight, walk

#: The bounds of the ratio are the first parameters of a program.
_BOUNDS = 2

#: A hyper-parameter: the place of its formula in :func:`formulas_of`, and its name.
Field = tuple[int, str]


class Operand(NamedTuple):
    """An operand of a statistic: a row of the table, a leaf, or a number.

    A row may hold a condition, 1 or 0, or one number of the call. A number is the text
    of a formula of fields.
    """

    row: int | None = None
    is_condition: bool = False
    is_of_call: bool = False
    leaf: str | None = None
    number: str = ""
    fields: tuple[Field | float, ...] = ()


class Statistic(NamedTuple):
    """A call of ``batch``, which fills a row of the table. ``keywords`` are the names
    of the last operands.
    """

    name: str
    operands: tuple[Operand, ...]
    keywords: tuple[str, ...]
    row: int


class Stage(NamedTuple):
    """``program`` evaluates the rows from ``begin`` on: it is None if there are none.
    Then come statistics.

    ``values`` are the parameters of the program. A number stands for itself.
    """

    program: Program | None
    values: tuple[Field | float, ...]
    begin: int
    statistics: tuple[Statistic, ...]


class Staged(NamedTuple):
    """A loss in stages.

    ``values`` are the parameters of ``program`` after the bounds of the ratio. None is
    the coefficient of a term, in the order of terms. ``given`` has the rows of
    hyper-parameters that are tensors. The table has ``rows`` rows. ``monitor`` has
    parameters of its own, and is None if no kernel can evaluate it.
    """

    program: Program
    values: tuple[Field | float | None, ...]
    given: tuple[tuple[Field, int], ...]
    stages: tuple[Stage, ...]
    rows: int
    monitor: tuple[Monitor, tuple[Field | float, ...]] | None


class CannotStage(Exception):
    """A formula that only PyTorch can evaluate. The message says why."""


def formulas_of(roots: Iterable[Formula]) -> tuple[Formula, ...]:
    """Return formulas, and after them the formulas that are hyper-parameters."""
    found = list(roots)
    for formula in found:
        found += [x for x in formula.parameters().values() if isinstance(x, TokenWeight)]
    return tuple(found)


def is_row(value: Any) -> bool:
    """Return whether a hyper-parameter is a tensor with one number for each row."""
    return isinstance(value, Tensor) and value.dim() > 0


def values_of(
    values: Iterable[Field | float | None], formulas: Sequence[Formula]
) -> tuple[Any, ...]:
    """Return the hyper-parameters that are named. All else stands for itself."""
    return tuple([getattr(formulas[v[0]], v[1]) if isinstance(v, tuple) else v for v in values])


def staged(rules: Sequence[Formula], weights: Sequence[TokenWeight], given_ratio: bool) -> Staged:
    """Return a loss in stages. Raises :class:`CannotStage` if it has no such form.

    ``rules`` are one a term, and may be weights that stand alone. With ``given_ratio``
    the log-ratio is a leaf like any other.
    """
    return _Composer(rules, weights, given_ratio).staged()


#: Statistics that are one number of the call.
_OF_CALL = frozenset({"sum", "mean", "min", "max", "quantile", "quantile_nearest"})


def _is_statistic_of_call(x: Expr) -> bool:
    return x.op == "batch" and x.args[0] in _OF_CALL


def _traced(formula: Formula) -> Traced:
    if isinstance(formula, Rule):
        return trace_rule(type(formula))
    return trace_weight(type(formula))  # type: ignore[arg-type]


class _Composer:
    def __init__(
        self,
        rules: Sequence[Formula],
        weights: Sequence[TokenWeight],
        given_ratio: bool,
    ) -> None:
        self._terms, self._scopes = len(rules), [w.scope for w in weights]
        self._formulas = formulas_of([*rules, *weights])
        self._roots = range(len(rules) + len(weights))
        self._given_ratio = given_ratio
        self._graph = Graph()
        self._rows = self._terms  # so far
        self._given: list[tuple[Field, int]] = []
        self._inner = iter(range(len(self._roots), len(self._formulas)))
        self._fields: dict[str, Field] = {}  # by the name of a parameter
        self._row_of: dict[str, int] = {}
        self._known: dict[int, Expr] = {}  # by node, what stands for it in detached parts
        # like formulas_of: the hyper-parameters of the first formula come first
        self._own = [self._own_fields(i) for i in range(len(self._formulas))]
        self._made: dict[int, Expr] = {}
        for i in reversed(range(len(self._formulas))):
            self._made[i] = self._read(_traced(self._formulas[i]), i)
        self._results = [self._made[i] for i in self._roots]

    def _own_fields(self, i: int) -> dict[str, Expr | int]:
        """Return the fields of a formula. A field that is a formula is its place."""
        found: dict[str, Expr | int] = {}
        for name, value in self._formulas[i].parameters().items():
            if isinstance(value, TokenWeight):
                found[name] = next(self._inner)
            elif is_row(value):
                self._given.append(((i, name), self._rows))
                found[name] = self._row()
            else:
                found[name] = self._graph.node("param", f"{i}.{name}")
                self._fields[f"{i}.{name}"] = i, name
        return found

    def _row(self) -> Expr:
        """Return the next row of the table."""
        name = f"row {self._rows}"
        self._row_of[name] = self._rows
        self._rows += 1
        return self._graph.node("param", name)

    def _read(self, traced: Traced, i: int) -> Expr:
        """Copy what is traced of formula ``i``, with the formulas in its fields."""
        g, copies = self._graph, dict[int, Expr]()
        for x in walk(traced.result):
            if x.op == "param":
                field = self._own[i][x.args[0]]
                copies[x.index] = (
                    g.node("stop", self._made[field]) if isinstance(field, int) else field
                )
            else:
                copies[x.index] = g.node(
                    x.op, *(copies[a.index] if isinstance(a, Expr) else a for a in x.args)
                )
        return copies[traced.result.index]

    def staged(self) -> Staged:
        nodes = walk(*self._results)
        level: dict[int, int] = {}
        for x in nodes:
            below = max((level[a.index] for a in x.operands), default=0)
            level[x.index] = below + (x.op == "batch")
        stages = [
            self._stage([x for x in nodes if x.op == "batch" and level[x.index] == at])
            for at in range(1, 1 + max(level.values(), default=0))
        ]
        texts, written = [], _Parameters(self._fields, self._row_of)
        for i in self._roots:
            if i < self._terms:
                written.add(None)
            is_weight = isinstance(self._formulas[i], TokenWeight)
            texts.append(written.text(self._detached(self._results[i], free=is_weight)))
        scoped = tuple(zip(texts[self._terms :], self._scopes, strict=True))
        program = Program(tuple(texts[: self._terms]), scoped, tuple(written.rows))
        values = tuple(written.values)
        monitor = self._monitor()
        return Staged(program, values, tuple(self._given), tuple(stages), self._rows, monitor)

    def _monitor(self) -> tuple[Monitor, tuple[Field | float, ...]] | None:
        if not isinstance(self._formulas[0], Rule):
            return None
        rules = [type(formula) for formula in self._formulas[: self._terms]]
        written = _Parameters(self._fields, self._row_of)

        def write(traced: Traced, i: int) -> tuple[str, int]:
            at = _BOUNDS + len(written.values)
            return written.text(self._detached(self._read(traced, i), free=True)), at

        try:
            clip = trace_clip(rules[0])  # type: ignore[arg-type]
            clips = None if clip is None else (write(clip[0], 0), write(clip[1], 0))
            traced = {i: trace_rule(rule) for i, rule in enumerate(rules)}  # type: ignore[arg-type]
            kl = next((i for i, t in traced.items() if i and "ref_logp" in t.leaves), None)
            written_kl = None if kl is None else write(traced[kl], kl)
        except (CannotStage, TypeError, AttributeError):
            return None  # a user's clipped() may do something that only torch can do
        return Monitor(clips, written_kl, tuple(written.rows)), tuple(written.values)

    def _stage(self, statistics: list[Expr]) -> Stage:
        begin, roots = self._rows, dict[int, Expr]()
        for statistic in statistics:
            for x in statistic.operands:
                if self._needs_row(x):
                    roots.setdefault(x.index, x)
        texts, written, g = [], _Parameters(self._fields, self._row_of), self._graph
        for x in roots.values():
            written.add(1.0)
            number = g.node("where", x, g.const(1.0), g.const(0.0)) if x.is_bool else x
            texts.append(written.text(self._detached(number, free=True)))
        for index, x in roots.items():
            row = self._row()
            self._known[index] = row != 0.0 if x.is_bool else row
        found = []
        for x in statistics:
            name, keywords, *operands = x.args
            operand = tuple(map(self._operand, operands))
            self._known[x.index] = row = self._row()
            found.append(Statistic(name, operand, keywords, self._row_of[row.args[0]]))
        program = Program(tuple(texts), (), tuple(written.rows)) if texts else None
        return Stage(program, tuple(written.values), begin, tuple(found))

    def _varies(self, x: Expr) -> bool:
        """Return whether a node differs between rows."""
        return any(
            y.op in ("leaf", "batch") or (y.op == "param" and y.args[0] in self._row_of)
            for y in walk(x)
        )

    def _needs_row(self, x: Expr) -> bool:
        if x.index in self._known or not self._varies(x):
            return False
        if self._is_of_call(x):
            raise CannotStage("a statistic takes a number that is computed from others")
        return not (x.op == "param" or (x.op == "leaf" and self._has(x.args[0])))

    def _is_of_call(self, x: Expr) -> bool:
        """Return whether a node is one number of the call."""
        if x.op in ("leaf", "batch"):
            return _is_statistic_of_call(x)
        if x.op == "param":
            return x.args[0] not in self._row_of
        return all(map(self._is_of_call, x.operands))

    def _has(self, leaf: str) -> bool:
        """Return whether a leaf is a tensor of the call."""
        return leaf != "log_ratio" or self._given_ratio

    def _operand(self, x: Expr) -> Operand:
        known = self._known.get(x.index)
        if known is not None:
            row = known.args[0] if x.is_bool else known  # a condition is row != 0
            return Operand(self._row_of[row.args[0]], x.is_bool, _is_statistic_of_call(x))
        if x.op == "leaf":
            return Operand(leaf=x.args[0])
        if x.op == "param" and x.args[0] in self._row_of:
            return Operand(self._row_of[x.args[0]])
        number = _Parameters(self._fields, self._row_of)
        return Operand(number=number.text(x), fields=tuple(number.values))

    def _detached(self, x: Expr, free: bool) -> Expr:
        """Return a node with what is known in place of its parts. Only parts without a
        gradient are replaced, all of them if it is ``free``.
        """
        memo: dict[tuple[int, bool], Expr] = {}

        def copy(x: Expr, free: bool) -> Expr:
            key = x.index, free
            if key not in memo:
                if free and x.index in self._known:
                    memo[key] = self._known[x.index]
                elif x.op == "batch":
                    raise CannotStage("a statistic has a gradient")
                else:
                    inner = free or x.op == "stop"
                    memo[key] = self._graph.node(
                        x.op, *(copy(a, inner) if isinstance(a, Expr) else a for a in x.args)
                    )
            return memo[key]

        return copy(x, free)


class _Parameters:
    """The parameters of a program, in the order of the formulas that are written."""

    def __init__(self, fields: Mapping[str, Field], row_of: Mapping[str, int]) -> None:
        self._fields, self._row_of = fields, row_of
        self.values: list[Any] = []
        self.rows: list[tuple[int, int]] = []

    def add(self, value: Any) -> None:
        self.values.append(value)

    def text(self, x: Expr) -> str:
        """Return the text of a formula, and add its parameters."""
        nodes = walk(x)
        names = tuple(y.args[0] for y in nodes if y.op == "param")
        for name in names:
            if name in self._row_of:
                self.rows.append((_BOUNDS + len(self.values), self._row_of[name]))
            self.add(self._fields.get(name, 0.0))  # a row has no number
        leaves = frozenset(y.args[0] for y in nodes if y.op == "leaf")
        return write_formula(Traced(x, leaves, names, frozenset()))
