"""Print a loss as Triton source: a module with one function, ``program``, that a kernel
calls once per row.

The function computes everything between the row's statistics and the coefficients of
its gradient.
"""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable

from .base import TOKEN_FIELDS
from .loss_program import ONE_PASS, Program, loss_graph
from .monitor import Monitor
from .printer import Language, statements
from .trace import Expr, walk

_FUNCTIONS = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "abs")
_INFIX = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "not": "~{}",
}

TRITON = Language(
    templates=_INFIX
    | {f: f"math.{f}({{}})" for f in _FUNCTIONS}
    | {
        "min": "math.minimum({}, {})",
        "max": "math.maximum({}, {})",
        "clip": "math.clip({}, {}, {})",
        "where": "tl.where({}, {}, {})",
    },
    infix=frozenset(_INFIX),
    statement="{name} = {value}",
    number="{}",
    infinity='float("inf")',
    leaf="{}",
    alone="tl.full((), {}, tl.float32)",
    reserved=frozenset({*keyword.kwlist, *dir(builtins), "tl", "math", "triton"}),
)

_HEADER = "# ruff: noqa\n# fmt: off\nimport triton\nimport triton.language as tl\n"


_FIELDS = ", ".join(x for x in TOKEN_FIELDS if x != "log_ratio")


def program_py(
    program: Program, given_ratio: bool = False, outputs: tuple[str, ...] = ONE_PASS
) -> str:
    """Return the source of a module whose ``program`` evaluates a whole loss for one
    row.

    ``program(params, w, w_stride, <leaves but log_ratio>)`` returns the outputs. ``w +
    k * w_stride`` is the address of row ``k`` of the table of row weights. With
    ``given_ratio``, ``log_ratio`` is the last argument.
    """
    graph = loss_graph(program, given_ratio)
    read = graph.reads(outputs)
    return _module(
        [graph[name] for name in outputs],
        f"params, w, w_stride, {_FIELDS}{', log_ratio' * given_ratio}",
        _loads(k for k in range(graph.table_rows) if f"w{k}" in read),
    )


def _loads(rows: Iterable[int]) -> list[str]:
    return [f"w{k} = tl.load(w + {k} * w_stride)" for k in rows]


def monitor_py(monitor: Monitor) -> str:
    """Return the source of a module whose ``program`` returns :meth:`Monitor.graph`.

    Its arguments are those of :func:`program_py` with a ``log_ratio``.
    """
    rows = sorted({row for _, row in monitor.rows})
    return _module(monitor.graph(), f"params, w, w_stride, {_FIELDS}, log_ratio", _loads(rows))


def _module(roots: list[Expr], signature: str, loads: list[str]) -> str:
    read = {x.args[0] for x in walk(*roots) if x.op == "param"}
    loads = [
        f"{p} = tl.load(params + {p[1:]})" for p in sorted(read, key=lambda p: int(p[1:]))
    ] + loads
    lines, values = statements(TRITON, roots)
    constant = [
        TRITON.alone.format(text) if x.op == "const" else text
        for x, text in zip(roots, values, strict=True)
    ]
    body = [*loads, *lines, f"return {', '.join(constant)}{',' * (len(constant) == 1)}"]
    head = _HEADER + "\nfrom reweight_ops.triton_kernels import math\n\n\n@triton.jit\n"
    return head + f"def program({signature}):\n" + "".join(f"    {line}\n" for line in body)
