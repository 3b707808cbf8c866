"""The formulas that the metrics of a loss evaluate in every row.

They tell which tokens the surrogate clips, and the divergence from the reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .base import Rule
from .text import parameter_count, read_formula, write_formula
from .trace import Expr, Graph, trace_clip, trace_rule


class Monitor(NamedTuple):
    """The texts of the monitored formulas. They read the ``params`` of a
    :class:`~.loss_program.Program`.

    ``clip`` has the two formulas of the surrogate, below and above, each 1 or 0; it is
    None if the surrogate does not clip. ``kl`` has a penalty's rule and the place where
    its fields begin.
    """

    clip: tuple[str, str] | None = None
    kl: tuple[str, int] | None = None

    @classmethod
    def of(cls, rules: Sequence[type[Rule]], terms: Sequence[str]) -> Monitor:
        """Return the monitor of the rules of a loss, whose program has these terms. The
        surrogate is the first rule.

        Raises TypeError or AttributeError if a kernel cannot evaluate one of the
        formulas.
        """
        clip = trace_clip(rules[0])
        at, kl = 3, None  # after the bounds of the ratio and the surrogate's coefficient
        for k, (rule, term) in enumerate(zip(rules, terms, strict=True)):
            if k and kl is None and "ref_logp" in trace_rule(rule).leaves:
                kl = (write_formula(trace_rule(rule)), at)
            at += 1 + parameter_count(term)
        return cls(None if clip is None else (write_formula(clip[0]), write_formula(clip[1])), kl)

    def graph(self) -> list[Expr]:
        """Return ``[low, high, kl]`` as nodes of one graph. An absent formula is 0.

        Leaves are those of a formula. Parameters are ``p0, p1, ...``.
        """
        g = Graph()
        zero = g.const(0.0)

        def read(text: str, first: int) -> Expr:
            fields = (g.node("param", f"p{first + i}") for i in range(parameter_count(text)))
            return read_formula(text, g, lambda: next(fields), lambda name: g.node("leaf", name))

        clips = [zero, zero] if self.clip is None else [read(text, 3) for text in self.clip]
        return [*clips, zero if self.kl is None else read(*self.kl)]
