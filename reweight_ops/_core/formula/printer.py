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
    """How a language writes expressions.

    ``templates`` maps an op to a format string. An infix operand of an infix template
    is put in parentheses.
    """

    templates: Mapping[str, str]
    infix: frozenset[str]
    statement: str
    number: str
    infinity: str
    leaf: str
    reserved: frozenset[str]
    alone: str = "{}"  # how to write a number whose type no other operand tells

    def constant(self, value: float) -> str:
        if math.isnan(value):
            raise TypeError("a formula contains the constant NaN.")
        if math.isinf(value):
            return ("-" if value < 0 else "") + self.infinity
        return self.number.format(repr(float(value)))

    def local(self, name: str) -> str:
        """Return the variable of a hyper-parameter.

        It has the hyper-parameter's name, unless that name means something else in the
        generated function.
        """
        taken = (
            name in self.reserved
            or name in TOKEN_FIELDS
            or re.fullmatch(r"[vd]\d+|rw_\w+|[tp]", name)
        )
        return f"{name}_" if taken else name


def statements(language: Language, roots: Sequence[Expr]) -> tuple[list[str], list[str]]:
    """Return the statements that compute ``roots``, and the expression of each root.

    A node that is used once is written where it is used.
    """
    nodes = walk(*roots)
    uses = Counter(unstopped(a).index for x in nodes if x.op != "stop" for a in x.operands)
    uses.update(unstopped(x).index for x in roots)
    lines: list[str] = []
    # the bool tells whether the text may be an operand without parentheses
    text: dict[int, tuple[str, bool]] = {}

    for x in nodes:
        if x.op == "stop":
            text[x.index] = text[x.args[0].index]
            continue
        if x.op == "const":
            text[x.index] = language.constant(x.args[0]), x.args[0] >= 0
            continue
        if x.op in ("leaf", "param"):
            text[x.index] = (
                (language.leaf.format(x.args[0]) if x.op == "leaf" else language.local(x.args[0])),
                True,
            )
            continue
        infix = x.op in language.infix
        operands = [
            f"({t})" if infix and not atomic else t
            for t, atomic in (text[a.index] for a in x.operands)
        ]
        if all(unstopped(a).op == "const" for a in x.operands):
            operands = [language.alone.format(t) for t in operands]
        written = language.templates[x.op].format(*operands)
        if uses[x.index] > 1:
            name = f"v{len(lines)}"
            lines.append(
                language.statement.format(
                    type="bool" if x.is_bool else "float", name=name, value=written
                )
            )
            text[x.index] = name, True
        else:
            text[x.index] = written, not infix
    return lines, [text[x.index][0] for x in roots]
