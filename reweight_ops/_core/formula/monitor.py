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
    """The monitored formulas. Each is a text, and the place in ``params`` where its
    fields begin.

    ``clip`` has the two formulas of the surrogate, below and above, each 1 or 0; it is
    None if the surrogate does not clip. ``kl`` is a penalty's rule. ``params`` and
    ``rows`` are like those of a :class:`~.loss_program.Program`.
    """

    clip: tuple[tuple[str, int], tuple[str, int]] | None = None
    kl: tuple[str, int] | None = None
    rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, rules: Sequence[type[Rule]], terms: Sequence[str]) -> Monitor:
        """Return the monitor of the rules of a loss, whose program has these terms. The
        surrogate is the first rule.

        Raises TypeError or AttributeError if a kernel cannot evaluate one of the
        formulas.
        """
        clip = trace_clip(rules[0])
        first = 3  # after the bounds of the ratio and the surrogate's coefficient
        at, kl = first, None
        for k, (rule, term) in enumerate(zip(rules, terms, strict=True)):
            if k and kl is None and "ref_logp" in trace_rule(rule).leaves:
                kl = (write_formula(trace_rule(rule)), at)
            at += 1 + parameter_count(term)
        if clip is None:
            return cls(None, kl)
        return cls(((write_formula(clip[0]), first), (write_formula(clip[1]), first)), kl)

    def graph(self) -> list[Expr]:
        """Return ``[low, high, kl]`` as nodes of one graph. An absent formula is 0.

        Leaves are those of a formula, and ``w0, w1, ...``, the parameters of rows.
        Other parameters are ``p0, p1, ...``.
        """
        g, rows = Graph(), dict(self.rows)
        zero = g.const(0.0)

        def parameter(at: int) -> Expr:
            return g.node("leaf", f"w{rows[at]}") if at in rows else g.node("param", f"p{at}")

        def read(text: str, first: int) -> Expr:
            fields = (parameter(first + i) for i in range(parameter_count(text)))
            return read_formula(text, g, lambda: next(fields), lambda name: g.node("leaf", name))

        clips = [zero, zero] if self.clip is None else [read(*formula) for formula in self.clip]
        return [*clips, zero if self.kl is None else read(*self.kl)]
