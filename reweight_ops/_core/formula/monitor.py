"""What the metrics of a loss evaluate in every row: which tokens the surrogate clips, and the divergence from the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .base import Rule
from .text import read_formula, write_formula
from .trace import Expr, Graph, trace_clip, trace_rule


class Monitor(NamedTuple):
    """By the texts of formulas, like a :class:`~.loss_program.Program`, whose ``params`` it reads.

    ``clip``: below and above, 1 or 0, of the surrogate; None if it does not clip. ``kl``: a penalty's rule, and where its fields begin.
    """

    clip: tuple[str, str] | None = None
    kl: tuple[str, int] | None = None

    @classmethod
    def of(cls, rules: Sequence[type[Rule]]) -> Monitor:
        """Of the rules of a loss, the surrogate first. TypeError or AttributeError if a formula is none that a kernel can evaluate."""
        clip = trace_clip(rules[0])
        first = 3  # after the bounds of the ratio and the surrogate's coefficient
        at, kl = first + len(rules[0].parameter_names()), None
        for rule in rules[1:]:
            if kl is None and "ref_logp" in trace_rule(rule).leaves:
                kl = (write_formula(trace_rule(rule)), at + 1)
            at += 1 + len(rule.parameter_names())
        return cls(None if clip is None else (write_formula(clip[0]), write_formula(clip[1])), kl)

    def graph(self) -> list[Expr]:
        """``[low, high, kl]`` as nodes of one graph; 0 for what there is not. Leaves are a formula's, parameters ``p0, p1, ...``."""
        g = Graph()
        zero = g.const(0.0)

        def read(text: str, first: int) -> Expr:
            fields = (g.node("param", f"p{first + i}") for i in range(int(text.split(" ")[0])))
            return read_formula(text, g, lambda: next(fields), lambda name: g.node("leaf", name))

        clips = [zero, zero] if self.clip is None else [read(text, 3) for text in self.clip]
        return [*clips, zero if self.kl is None else read(*self.kl)]
