"""Evaluate a traced expression graph on tensors. This is the arithmetic of the kernels
in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .namespace import TorchNamespace
from .text import parameter_count, read_formula
from .trace import Expr, Graph, walk

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "min": torch.minimum,
    "max": torch.maximum,
    "stop": lambda a: a,
}


def interpret(
    roots: Sequence[Expr], leaves: dict[str, Tensor], parameters: dict[str, Tensor]
) -> list[Tensor]:
    """Return the values of ``roots``.

    ``leaves`` are ``[N]`` and ``parameters`` are 0-d. All have one dtype.
    """
    like = next(iter(leaves.values()))
    xp = TorchNamespace(like.dtype)
    values: dict[int, Tensor] = {}
    for x in walk(*roots):
        match x.op, x.args:
            case "leaf", (name,):
                values[x.index] = leaves[name]
            case "param", (name,):
                values[x.index] = parameters[name]
            case "const", (number,):
                values[x.index] = torch.full((), number, dtype=like.dtype, device=like.device)
            case op, _:
                compute = _OPERATIONS.get(op) or getattr(xp, op)
                values[x.index] = compute(*(values[operand.index] for operand in x.operands))
    return [values[root.index] for root in roots]


def interpret_number(text: str, parameters: Sequence[Any], dtype: torch.dtype) -> Any:
    """Return the value of a formula without leaves, whose parameters are numbers or 0-d
    tensors.
    """
    graph, xp = Graph(), TorchNamespace(dtype)
    names = iter([graph.node("param", str(i)) for i in range(parameter_count(text))])
    root = read_formula(text, graph, lambda: next(names), lambda name: graph.node("leaf", name))
    values: dict[int, Any] = {}
    for x in walk(root):
        operands = [values[operand.index] for operand in x.operands]
        if x.op == "param":
            values[x.index] = parameters[int(x.args[0])]
        elif x.op == "const":
            values[x.index] = x.args[0]
        else:
            name = {"min": "minimum", "max": "maximum"}.get(x.op, x.op)
            compute = getattr(xp, name, None) or _OPERATIONS[x.op]
            values[x.index] = compute(*operands)
    return values[root.index]
