"""A traced formula as text, and back.

The text names a formula wherever an object cannot go, such as through a custom op.

An example is ``3 log_ratio exp:0 $2 min:1:2``. First comes the number of
hyper-parameters, then the nodes, operands before their users. ``$2`` is a
hyper-parameter, ``#0.5`` a number, and ``min:1:2`` the operation on nodes 1 and 2. The
last node is the result. Equal graphs have equal texts, so a text is a key: a rule that
is defined again with another formula has another text.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import TOKEN_FIELDS
from .trace import Expr, Graph, Traced, walk


def write_formula(traced: Traced) -> str:
    """Return the text of a formula. Raises TypeError if the formula reads the batch."""
    if traced.uses_batch:
        raise TypeError("the formula reads the batch, and no kernel can evaluate that.")
    nodes = walk(traced.result)
    at = {x.index: i for i, x in enumerate(nodes)}

    def token(x: Expr) -> str:
        if x.op == "param":
            return f"${traced.parameters.index(x.args[0])}"
        if x.op == "const":
            return f"#{x.args[0]!r}"
        if x.op == "leaf":
            return str(x.args[0])
        return ":".join([x.op, *(str(at[a.index]) for a in x.operands)])

    return " ".join([str(len(traced.parameters)), *map(token, nodes)])


def parameter_count(text: str) -> int:
    """Return the number of hyper-parameters of a formula."""
    return int(text.split(" ", 1)[0])


def read_formula(
    text: str, graph: Graph, parameter: Callable[[], Expr], leaf: Callable[[str], Expr]
) -> Expr:
    """Return the result of a formula as a node of ``graph``. ``parameter()`` gives the
    next hyper-parameter.
    """
    count, *tokens = text.split(" ")
    fields = [parameter() for _ in range(int(count))]
    nodes: list[Expr] = []
    for token in tokens:
        if token[0] == "$":
            nodes.append(fields[int(token[1:])])
        elif token[0] == "#":
            nodes.append(graph.const(float(token[1:])))
        elif token in TOKEN_FIELDS:
            nodes.append(leaf(token))
        else:
            op, *at = token.split(":")
            nodes.append(graph.node(op, *(nodes[int(i)] for i in at)))
    return nodes[-1]
