"""Turn expression graphs into statements of a language with infix operators."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .base import TOKEN_FIELDS
from .trace import Expr, unstopped, walk


class Language(NamedTuple):
    """``templates``: op to format string; an operand of an infix template is put in parentheses if it is infix itself."""

    templates: Mapping[str, str]
    infix: frozenset[str]
    statement: str
    number: str
    infinity: str
    leaf: str
    reserved: frozenset[str]
    alone: str = "{}"  # a number where the language does not know its type from another operand

    def constant(self, value: float) -> str:
        if math.isnan(value):
            raise TypeError("a formula contains the constant NaN.")
        if math.isinf(value):
            return ("-" if value < 0 else "") + self.infinity
        return self.number.format(repr(float(value)))

    def local(self, name: str) -> str:
        """The variable of a hyper-parameter: its own name, unless that means something else in the generated function."""
        taken = name in self.reserved or name in TOKEN_FIELDS or re.fullmatch(r"[vd]\d+|rw_\w+|[tp]", name)
        return f"{name}_" if taken else name


def statements(language: Language, roots: Sequence[Expr]) -> tuple[list[str], list[str]]:
    """Statements that compute ``roots``, and the expression of each root. What is used once is written where it is used."""
    nodes = walk(*roots)
    uses = Counter(unstopped(a).index for x in nodes if x.op != "stop" for a in x.operands)
    uses.update(unstopped(x).index for x in roots)
    lines: list[str] = []
    text: dict[int, tuple[str, bool]] = {}  # the second: may stand as an operand without parentheses

    for x in nodes:
        if x.op == "stop":
            text[x.index] = text[x.args[0].index]
            continue
        if x.op == "const":
            text[x.index] = language.constant(x.args[0]), x.args[0] >= 0
            continue
        if x.op in ("leaf", "param"):
            text[x.index] = (language.leaf.format(x.args[0]) if x.op == "leaf" else language.local(x.args[0])), True
            continue
        infix = x.op in language.infix
        operands = [f"({t})" if infix and not atomic else t for t, atomic in (text[a.index] for a in x.operands)]
        if all(unstopped(a).op == "const" for a in x.operands):
            operands = [language.alone.format(t) for t in operands]
        written = language.templates[x.op].format(*operands)
        if uses[x.index] > 1:
            name = f"v{len(lines)}"
            lines.append(language.statement.format(type="bool" if x.is_bool else "float", name=name, value=written))
            text[x.index] = name, True
        else:
            text[x.index] = written, not infix
    return lines, [text[x.index][0] for x in roots]
