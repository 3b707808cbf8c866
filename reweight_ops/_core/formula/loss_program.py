"""A whole pointwise loss and its derivatives as one expression graph, which every
backend evaluates per row.

:class:`Program` names a loss by the texts of its formulas. :func:`loss_graph` composes
them into a graph. PyTorch interprets the graph, Triton prints it, and C++ and CUDA
interpret it from a table (:mod:`.table`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from ...errors import InvalidCall
from .base import RULES, TOKEN_FIELDS, WEIGHTS, Rule, TokenWeight
from .derive import Derivative, select, simplified_add, simplified_sub, value_of
from .text import read_formula, write_formula
from .trace import Expr, Graph, trace_rule, trace_weight, walk

#: The row statistics through which a gradient reaches the logits.
STATISTICS = ("logp", "entropy", "log_sum_p_sq")

#: The outputs of a one-pass kernel per row: the two losses, and the derivatives of the
#: first by :data:`STATISTICS`.
ONE_PASS = ("weighted_loss", "loss", *(f"d_{name}" for name in STATISTICS))


class Program(NamedTuple):
    """A pointwise loss, given by the texts of its formulas (:mod:`.text`).

    It is hashable and never contains a rule's name. ``log_ratio`` is ``clip(logp -
    old_logp, clamp_low, clamp_high)``; outside of the bounds it has no gradient::

        loss          = sum_k coef_k * u_k * rule_k(leaves)
        weighted_loss = sum_k w_k * coef_k * u_k * rule_k(leaves)

    u_0 is the product of all weights, u_k that of those with scope ``"all"``. w_k is
    the row weight of term k, an input.

    A term whose ``w_k * coef_k * u_k`` is 0 contributes exactly 0 (never ``0 * inf``)
    to each loss and to every derivative. ``params`` is one vector: ``[clamp_low,
    clamp_high, (coef_k, fields of rule k)..., (fields of weight j)...]``. Term 0 is the
    surrogate.

    ``rows`` has the parameters that are one number for each row, as pairs (place in
    ``params``, row of the table of row weights that has its values). Such a program is
    for stored rows only.
    """

    terms: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()  # (formula, scope)
    rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        rules: Iterable[type[Rule] | str],
        weights: Iterable[tuple[type[TokenWeight] | str, str]] = (),
    ) -> Program:
        """Return the program of these rules and of these pairs (weight, scope).

        Each rule and each weight is a class or the name of a registered one.
        """
        classes = [RULES[r] if isinstance(r, str) else r for r in rules]
        scoped = [(WEIGHTS[w] if isinstance(w, str) else w, scope) for w, scope in weights]
        terms = tuple(write_formula(trace_rule(c)) for c in classes)
        return cls(terms, tuple((write_formula(trace_weight(c)), scope) for c, scope in scoped))

    def table_rows(self) -> int:
        """Return how many rows of the table of row weights the program has."""
        return max(len(self.terms), *(1 + row for _, row in self.rows), 1)

    def encode(self) -> str:
        """Return the program as one string, which can cross the boundary of a custom
        op.
        """
        assert not self.rows, "no kernel of logits reads parameters of rows"
        return (
            f"{','.join(self.terms)}|{','.join(f'{scope}={text}' for text, scope in self.weights)}"
        )

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def decode(text: str) -> Program:
        terms, weights = text.split("|")
        pairs = (pair.split("=") for pair in weights.split(",") if pair)
        return Program(tuple(terms.split(",")), tuple((formula, scope) for scope, formula in pairs))


def _is_zero(node: Expr) -> bool:
    return node.op == "const" and node.args[0] == 0


class LossGraph:
    """The outputs of a loss by name. Each is a node of one graph.

    The outputs are ``weighted_loss``, ``loss``, ``d_<leaf>``, ``d_w<k>`` and
    ``own<k>``.
    ``d_<leaf>`` is the derivative of the weighted loss by a leaf; ``d_logp`` and
    ``d_old_logp`` include the path through the ratio. ``d_w<k>`` is its derivative by
    the row weight of term ``k``. ``own<k>`` is the weighted loss of term ``k`` without
    its coefficient, 0 where the coefficient is 0. Leaves are those of a formula and
    ``w0, w1, ...``: the row weights, then the parameters of rows. Other parameters are
    ``p0, p1, ...``.

    If any term selects a row whose ``logp`` is NaN, its loss and ``d_logp`` are NaN,
    whatever the comparisons of a rule make of a NaN. The same holds for a row whose
    loss is NaN. A statistic that is NaN makes its own derivative NaN where the loss has
    one.

    With ``given_ratio``, ``log_ratio`` is a leaf like any other and has a derivative of
    its own.
    """

    def __init__(self, program: Program, given_ratio: bool = False) -> None:
        self.graph = g = Graph()
        self.terms = len(program.terms)
        self.table_rows = program.table_rows()
        rows = dict(program.rows)
        self._found: dict[str, Expr] = {}
        numbers = itertools.count()

        def parameter() -> Expr:
            at = next(numbers)
            return self._leaf(f"w{rows[at]}") if at in rows else g.node("param", f"p{at}")

        low, high = parameter(), parameter()
        raw = self._leaf("logp") - self._leaf("old_logp")
        # Both comparisons are false for a NaN. The NaN must reach the loss and the
        # gradient.
        self._clamped = None if given_ratio else (raw < low) | (high < raw)
        self._ratio = (
            self._leaf("log_ratio") if given_ratio else g.arithmetic("clip", raw, low, high)
        )

        def leaf(name: str) -> Expr:
            return self._ratio if name == "log_ratio" else self._leaf(name)

        rules = [(parameter(), read_formula(text, g, parameter, leaf)) for text in program.terms]
        weights = [
            (g.node("stop", read_formula(text, g, parameter, leaf)), scope)
            for text, scope in program.weights
        ]
        self.parameters = next(numbers)
        self._compose(rules, weights)

    @property
    def names(self) -> tuple[str, ...]:
        """Every output."""
        leaves = [x for x in TOKEN_FIELDS if x != "log_ratio" or self._clamped is None]
        return (
            "weighted_loss",
            "loss",
            *(f"d_{x}" for x in leaves),
            *(f"{name}{k}" for name in ("d_w", "own") for k in range(self.terms)),
        )

    def _leaf(self, name: str) -> Expr:
        return self.graph.node("leaf", name)

    def _compose(self, rules: list[tuple[Expr, Expr]], weights: list[tuple[Expr, str]]) -> None:
        zero = self.graph.const(0.0)
        self._weighted = self._loss = zero
        self._off: list[Expr] = []  # per term, whether it selects zero
        for k, (factor, rule) in enumerate(rules):
            own = self._leaf(f"w{k}")
            for u, scope in weights:
                if k == 0 or scope == "all":
                    factor, own = factor * u, own * u
            share = self._leaf(f"w{k}") * factor
            off = self.graph.arithmetic("eq", share, zero)
            self._off.append(off)
            self._weighted = simplified_add(self._weighted, select(off, zero, share * rule))
            self._loss = simplified_add(self._loss, select(off, zero, factor * rule))
            never = self.graph.arithmetic("eq", factor, zero)
            self._found[f"d_w{k}"] = value_of(select(never, zero, factor * rule))
            self._found[f"own{k}"] = value_of(select(off, zero, own * rule))

    def __getitem__(self, name: str) -> Expr:
        if name not in self._found:
            if name not in self.names:
                raise InvalidCall(
                    f"a loss has no output {name!r}; it has: {', '.join(self.names)}."
                )
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Expr:
        if name in ("weighted_loss", "loss"):
            logp, unread = self._leaf("logp"), functools.reduce(lambda a, b: a & b, self._off)
            return select(
                (logp != logp) & ~unread,
                logp,
                value_of(self._weighted if name == "weighted_loss" else self._loss),
            )
        by = self._leaf(name.removeprefix("d_"))
        slope = Derivative(by, () if by is self._ratio else (self._ratio,))(self._weighted)
        if self._clamped is not None and name in ("d_logp", "d_old_logp"):
            through = select(
                self._clamped, self.graph.const(0.0), Derivative(self._ratio)(self._weighted)
            )
            slope = (simplified_add if name == "d_logp" else simplified_sub)(slope, through)
        if name == "d_logp":
            loss = self["weighted_loss"]
            slope = select(loss != loss, loss, slope)
        elif by.args[0] in STATISTICS and not _is_zero(slope):
            unread = functools.reduce(lambda a, b: a & b, self._off)
            slope = select((by != by) & ~unread, by, slope)
        return slope

    def reads(self, outputs: Iterable[str] = ONE_PASS) -> frozenset[str]:
        """Return the leaves that these outputs depend on."""
        return frozenset(
            x.args[0] for x in walk(*(self[name] for name in outputs)) if x.op == "leaf"
        )

    def moves(self, name: str) -> bool:
        """Return whether the formulas let the weighted loss depend on a leaf."""
        return not _is_zero(self[f"d_{name}"])


@functools.lru_cache(maxsize=512)
def loss_graph(program: Program, given_ratio: bool = False) -> LossGraph:
    """Return the graph of a program. It is composed once."""
    return LossGraph(program, given_ratio)
