"""A loss graph as a table that C++ and CUDA interpret: operations on numbered
registers, level by level.

The registers are, in this order: the program's parameters; the constants; the uniform
values, which follow from those two alone and are computed once a call; the inputs of a
row, which are :data:`~reweight_ops._core.formula.base.TOKEN_FIELDS` and the row
weights; the intermediate values. A register of the last kind is used again as soon as a
level has read its value for the last time.

The operations of a level do not depend on each other, and a level writes no register
that it reads. The lanes of a warp can therefore compute them side by side. A condition
is 1 or 0.
"""

from __future__ import annotations

import functools
import heapq
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .base import TOKEN_FIELDS
from .loss_program import ONE_PASS, LossGraph
from .trace import SYMBOLS, Expr, unstopped, walk

#: Operations in the order of their codes; ``csrc/common/program_table.h`` says what
#: each computes.
OPERATIONS = (
    "add", "sub", "mul", "min", "max", "clip", "abs", "lt", "le", "eq", "ne", "where",
    "div", "exp", "expm1", "log", "log1p", "sigmoid", "tanh",
)  # fmt: skip

#: The number of registers that an operation can name.
MAX_REGISTERS = 1 << 12


@dataclass(frozen=True)
class Instruction:
    """``registers[out] = op(*registers[operands])``."""

    op: str
    out: int
    operands: tuple[int, ...]

    def encode(self) -> int:
        """Return the instruction as one 64-bit word.

        The word has 8 bits of code, then four times 12 bits of register. An absent
        operand repeats the first.
        """
        fields = (self.out, *self.operands, *[self.operands[0]] * (3 - len(self.operands)))
        word = OPERATIONS.index(self.op)
        for i, register in enumerate(fields):
            word |= register << (8 + 12 * i)
        return word


@dataclass(frozen=True)
class Table:
    """A program as instructions.

    ``levels`` tells where each level ends. The first ``uniform_levels`` levels are
    computed once a call.
    """

    instructions: tuple[Instruction, ...]
    levels: tuple[int, ...]
    uniform_levels: int
    constants: tuple[float, ...]
    parameters: int
    inputs: int  # the register of the first leaf
    rows: int  # of the table of row weights
    registers: int
    outputs: tuple[int, ...]

    @property
    def uniform(self) -> int:
        """Return how many instructions are computed once a call."""
        return self.levels[self.uniform_levels - 1] if self.uniform_levels else 0

    def words(self) -> list[int]:
        """Return the instructions, the constants as the bits of fp64 numbers, and the
        ends of the levels, all as int64.
        """
        bits = struct.unpack(
            f"{len(self.constants)}q", struct.pack(f"{len(self.constants)}d", *self.constants)
        )
        return [*(i.encode() for i in self.instructions), *bits, *self.levels]


class _Lowering:
    """Rewrite a graph with fewer kinds of operations and fewer levels. The values stay
    the same to the bit.

    Lanes of a warp that take different operations wait for each other. A condition is 1
    or 0. Therefore *and* becomes a product, *or* a maximum, *not* a difference, and
    ``-x`` a product.
    """

    def __init__(self, roots: Sequence[Expr]) -> None:
        nodes = walk(*roots)
        self.depth: dict[int, int] = {}
        self.uses = Counter(a.index for x in nodes for a in x.operands) + Counter(
            x.index for x in roots
        )
        memo: dict[int, Expr] = {}
        for x in nodes:
            memo[x.index] = self._lower(x, [memo[a.index] for a in x.operands])
        self.roots = [memo[x.index] for x in roots]

    def _node(self, op: str, *operands: Expr) -> Expr:
        x = operands[0].graph.node(op, *operands)
        self.depth[x.index] = 1 + max(self.depth.get(a.index, 0) for a in operands)
        return x

    def _lower(self, x: Expr, a: list[Expr]) -> Expr:
        match x.op:
            case "stop":
                return a[0]
            case "neg":
                return self._negative(x, a[0])
            case "and":
                return self._node("mul", *a)
            case "or":
                return self._node("max", *a)
            case "not":
                return self._node("sub", x.graph.const(1.0), a[0])
            case "where":
                return self._select(x, a)
        return self._node(x.op, *a) if a else x

    def _negative(self, x: Expr, a: Expr) -> Expr:
        """``-(deep * shallow) = deep * -shallow``."""
        minus = x.graph.const(-1.0)
        if a.op == "mul" and self.uses[unstopped(x.args[0]).index] == 1:
            deep, shallow = sorted(a.args, key=lambda y: -self.depth.get(y.index, 0))
            if self.depth.get(shallow.index, 0) < self.depth.get(deep.index, 0):
                return self._node("mul", deep, self._node("mul", minus, shallow))
        return self._node("mul", minus, a)

    def _select(self, x: Expr, a: list[Expr]) -> Expr:
        """``where(c, u, where(d, u, v)) = where(c or d, u, v)``, where ``v`` comes
        later than the conditions.
        """
        condition, same, inner = a
        if (
            inner.op == "where"
            and inner.args[1] is same
            and self.uses[unstopped(x.args[2]).index] == 1
        ):
            either, late = (condition, inner.args[0]), self.depth.get(inner.args[2].index, 0)
            if max(self.depth.get(c.index, 0) for c in either) < late:
                return self._node("where", self._node("max", *either), same, inner.args[2])
        return self._node("where", *a)


def _leveled(nodes: Sequence[Expr]) -> list[list[Expr]]:
    """Return the nodes level by level.

    There are as few levels as the dependences allow, and as few kinds of operations in
    each level.

    A node that fits several levels goes to one that has its operation already.
    """
    earliest: dict[int, int] = {}
    for x in nodes:
        earliest[x.index] = max(
            (earliest[a.index] + 1 for a in x.operands if a.index in earliest), default=0
        )
    latest = dict.fromkeys(earliest, max(earliest.values(), default=0))
    levels: list[list[Expr]] = [[] for _ in range(max(earliest.values(), default=-1) + 1)]
    for x in reversed(nodes):
        room = range(latest[x.index], earliest[x.index] - 1, -1)
        level = next((d for d in room if any(y.op == x.op for y in levels[d])), earliest[x.index])
        levels[level].append(x)
        for a in x.operands:
            if a.index in latest:
                latest[a.index] = min(latest[a.index], level - 1)
    return [sorted(level, key=lambda x: (OPERATIONS.index(x.op), x.index)) for level in levels]


class _Builder:
    def __init__(self, graph: LossGraph, roots: Sequence[Expr]) -> None:
        self.graph, self.roots = graph, _Lowering(roots).roots
        nodes = walk(*self.roots)
        constants = [x for x in nodes if x.op == "const"]
        self.constants = tuple(float(x.args[0]) for x in constants)
        self.at: dict[int, int] = {x.index: graph.parameters + i for i, x in enumerate(constants)}
        self.at |= {x.index: int(x.args[0][1:]) for x in nodes if x.op == "param"}
        varying: set[int] = set()
        for x in nodes:
            if x.op == "leaf" or any(a.index in varying for a in x.operands):
                varying.add(x.index)
        operations = [x for x in nodes if x.op not in SYMBOLS]
        self.uniform = _leveled([x for x in operations if x.index not in varying])
        self.varying = _leveled([x for x in operations if x.index in varying])
        first = graph.parameters + len(constants)
        for x in (x for level in self.uniform for x in level):
            self.at[x.index], first = first, first + 1
        self.inputs = first
        names = [*TOKEN_FIELDS, *(f"w{k}" for k in range(graph.table_rows))]
        self.at |= {x.index: first + names.index(x.args[0]) for x in nodes if x.op == "leaf"}
        self.registers = first + len(names)
        self._allocate()

    def _allocate(self) -> None:
        last_read = {
            a.index: d for d, level in enumerate(self.varying) for x in level for a in x.operands
        }
        last_read |= {x.index: len(self.varying) for x in self.roots}
        ends: dict[int, list[int]] = {}
        free: list[int] = []
        for d, level in enumerate(self.varying):
            for x in level:
                if free:
                    self.at[x.index] = heapq.heappop(free)
                else:
                    self.at[x.index], self.registers = self.registers, self.registers + 1
                ends.setdefault(last_read[x.index], []).append(self.at[x.index])
            for register in ends.get(d, ()):
                heapq.heappush(free, register)

    def table(self) -> Table:
        levels = [*self.uniform, *self.varying]
        instructions = [
            Instruction(x.op, self.at[x.index], tuple(self.at[a.index] for a in x.operands))
            for level in levels
            for x in level
        ]
        ends, at = [], 0
        for level in levels:
            at += len(level)
            ends.append(at)
        return Table(
            tuple(instructions),
            tuple(ends),
            len(self.uniform),
            self.constants,
            self.graph.parameters,
            self.inputs,
            self.graph.table_rows,
            self.registers,
            tuple(self.at[x.index] for x in self.roots),
        )


@functools.lru_cache(maxsize=512)
def _build(graph: LossGraph, outputs: tuple[str, ...]) -> Table:
    return _Builder(graph, [graph[name] for name in outputs]).table()


def build_table(graph: LossGraph, outputs: Iterable[str] = ONE_PASS) -> Table:
    """Return the table that computes these outputs of a loss."""
    return _build(graph, tuple(outputs))
