"""An example of every entry of the catalogue, for its docstring: a golden row or the
entry's own arguments, and what the call returns.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .._core.catalogue.registry import CATALOGUE, Entry
from .._core.formula.base import TokenWeight
from .._core.spec.pairs import PairSpec
from .._core.spec.policy import PolicyLossSpec
from ..testing.golden_row import Built, Golden
from ..testing.golden_rows import GOLDEN

_HEAD = '''"""Examples of all entries, by kind and name. ``reweight_ops.codegen`` writes them."""

EXAMPLES: dict[str, tuple[str, str]] = {
'''


def examples_module() -> str:
    """The text of ``_core/catalogue/examples.py``."""
    lines = []
    for kind, entries in CATALOGUE.items():
        for name, entry in entries.items():
            if not entry.function.__module__.startswith("reweight_ops."):
                continue
            found = next(
                (x for row in _rows(entry) if (x := _example(entry, row)) is not None), None
            )
            if found is not None:
                lines.append(f"    {f'{kind}/{name}'!r}: {found!r},\n")
    return f"{_HEAD}{''.join(lines)}}}\n"


def _rows(entry: Entry) -> list[Golden]:
    rows = [row for row in GOLDEN if (row.kind, row.name) == (entry.kind, entry.name)]
    return [*rows, Golden(entry.kind, entry.name, entry.example, None)]


def _text(value: Any) -> str:
    """An argument as one writes it. KeyError: nobody would write it."""
    if isinstance(value, Tensor):
        value = value.tolist()
        return f"torch.tensor({_rounded(value)})"
    if isinstance(value, list):
        return f"torch.tensor({_rounded(value)})".replace("nan", "math.nan").replace(
            "inf", "math.inf"
        )
    if isinstance(value, Built):
        namespace = value.function.__module__.split(".")[1]
        arguments = ", ".join(f"{name}={_text(x)}" for name, x in value.arguments.items())
        return f"rw.{namespace}.{value.function.__name__}({arguments})"
    if isinstance(value, (bool, int, str, float, tuple)) or value is None:
        return repr(round(value, 4) if isinstance(value, float) else value)
    raise KeyError


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def _example(entry: Entry, row: Golden) -> tuple[str, str] | None:
    """What the result's shape is, and the lines of a doctest; None if the row makes
    none.
    """
    scope: dict[str, Any] = {"torch": torch}
    try:
        call = (
            f"{entry.call}({', '.join(f'{name}={_text(x)}' for name, x in row.arguments.items())})"
        )
        given = [_text(x) for x in (*row.init, *row.updates[:1])]
    except KeyError:
        return None
    needs_math = "math." in call or any("math." in x for x in given)
    lines = [
        f"import {'math, ' if needs_math else ''}torch, reweight_ops as rw"
        if "torch." in "".join([call, *given])
        else "import reweight_ops as rw"
    ]
    if row.updates:
        lines += [
            f"step = {call}",
            f"state, result = step.update(step.init({', '.join(given[:-1])}), {given[-1]})",
        ]
        shown = "result"
    else:
        shown = call
    try:
        for line in lines:
            exec(line, scope)
        result = eval(shown, scope)
        if isinstance(result, (PolicyLossSpec, PairSpec, TokenWeight)):
            shown, shape = f"{shown}.name", ""
        elif isinstance(result, tuple) and all(isinstance(x, PolicyLossSpec) for x in result):
            shown, shape = f"[spec.name for spec in {shown}]", ""
        else:
            shape = _shape(result, row, scope)
        shown_result = repr(eval(shown, scope))
    except (TypeError, ValueError, NameError, AttributeError):
        return None
    # prints differ between versions
    if re.search(r"object at|e-0[7-9]|e-[1-9]\d|\binf\b", shown_result):
        return None
    lines.append(shown)
    return shape, "\n".join([*(f">>> {line}" for line in lines), shown_result])


def _shape(result: Any, row: Golden, scope: dict[str, Any]) -> str:
    if isinstance(result, tuple):
        names = getattr(result, "_fields", None) or [f"result {i}" for i in range(len(result))]
        parts = [
            f"``{name}``: {said}"
            for name, x in zip(names, result, strict=True)
            if (said := _shape(x, row, scope))
        ]
        return "; ".join(parts)
    if isinstance(result, (int, float)):
        return "a number"
    if not isinstance(result, Tensor):
        return ""
    if result.dim() == 0:
        return "0-d"
    for name, value in (
        *row.arguments.items(),
        *(("argument of update", x) for x in row.updates[:1]),
    ):
        if isinstance(value, list) and torch.tensor(value).shape == result.shape:
            return f"that of ``{name}``" if name.isidentifier() else f"that of the {name}"
    shapes = [
        f"{name} {list(torch.tensor(x).shape)}"
        for name, x in row.arguments.items()
        if isinstance(x, list)
    ]
    return f"``{list(result.shape)}`` of {', '.join(f'``{x}``' for x in shapes)} in the example"
