"""One line of a recipe: an expression that is printed, searched for the names that it
reads, and run.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

from ...errors import InvalidCall

_PACKAGE = __name__.split(".")[0]


@lru_cache(maxsize=512)
def _parsed(text: str) -> ast.Expression:
    return ast.parse(text, mode="eval")


@lru_cache(maxsize=512)
def _compiled(text: str) -> CodeType:
    return compile(_parsed(text), f"<{text}>", "eval")


@lru_cache(maxsize=512)
def reads(text: str) -> tuple[str, ...]:
    """Return the names that an expression reads, in its order. ``rw``, the package, is
    not among them.
    """
    names = (node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name))
    return tuple(dict.fromkeys(name for name in names if name != "rw"))


def functions(text: str) -> tuple[str, ...]:
    """Return the functions of the package that an expression calls, as written:
    ``rw.advantages.hapo``.
    """
    called = (
        ast.unparse(node.func) for node in ast.walk(_parsed(text)) if isinstance(node, ast.Call)
    )
    return tuple(name for name in called if name.startswith("rw."))


def run(text: str, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression.

    ``values`` has the names that it reads.

    Raises:
        InvalidCall: one of them is missing.
    """
    missing = [name for name in reads(text) if name not in values]
    if missing:
        raise InvalidCall(f"{text} reads {', '.join(missing)}: pass it.")
    return eval(
        _compiled(text), {"rw": importlib.import_module(_PACKAGE), "__builtins__": {}}, dict(values)
    )


class _Renamed(ast.NodeTransformer):
    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.rename(node.id), mode="eval").body


def renamed(text: str, rename: Callable[[str], str]) -> str:
    """Return the expression with its names replaced by others, or by expressions.
    Strings are in double quotes.
    """
    return ast.unparse(_Renamed(rename).visit(ast.parse(text, mode="eval"))).replace("'", '"')


def wrapped(line: str, indent: str, width: int = 100) -> str:
    """Break a line of code into several, after commas. In an expression these are
    inside of brackets.
    """
    rows = [indent]
    for part in line.split(", "):
        piece = f"{part}, "
        if len(rows[-1]) + len(piece) > width and rows[-1].strip():
            rows.append(f"{indent}    ")
        rows[-1] += piece
    rows[-1] = rows[-1].removesuffix(", ")
    return "\n".join(row.rstrip() for row in rows)
