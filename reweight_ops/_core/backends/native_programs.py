"""Loss programs for the compiled backends: as a table, which a module interprets, or by the rules that are compiled into it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..formula.loss_program import ONE_PASS, Program, loss_graph
from ..formula.printer import own_rules, own_weights
from ..formula.table import MAX_REGISTERS, OPERATIONS, Table, build_table
from ..formula.text import write_formula
from ..formula.trace import trace_rule, trace_weight


class Compiled(NamedTuple):
    """A program for a module, and what a launch must know of it."""

    program: Any  # of the module's own class
    parameters: int
    reads_p_sq: bool
    entropy_gradient: bool
    words: Tensor | None = None  # what a table points at


def _compiled(program: Program, own: Any, words: Tensor | None = None) -> Compiled:
    graph = loss_graph(program)
    reads_p_sq = "log_sum_p_sq" in graph.reads() or graph.moves("log_sum_p_sq")
    return Compiled(own, graph.parameters, reads_p_sq, graph.moves("entropy"), words)


class Programs(Protocol):
    """How a module runs programs; a reason for each that it cannot."""

    def why_not(self, program: Program) -> str | None: ...

    def compile(self, program: Program, device: torch.device) -> Compiled: ...


class Tables:
    """Any program, interpreted."""

    def __init__(self, module: Any) -> None:
        if tuple(module.operations) != OPERATIONS:
            raise BackendUnavailable(f"{module.__name__} knows other operations; rebuild it with pip install -e .")
        self.module = module

    def why_not(self, program: Program) -> str | None:
        registers = build_table(loss_graph(program)).registers
        return f"the loss takes {registers} registers, one pass holds {MAX_REGISTERS}" if registers > MAX_REGISTERS else None

    def compile(self, program: Program, device: torch.device) -> Compiled:
        table = build_table(loss_graph(program))
        words = torch.tensor(table.words(), dtype=torch.int64).to(device)
        return _compiled(program, self.load(table, words), words)

    def load(self, table: Table, words: Tensor) -> Any:
        """The module's own view of a table, whose words live where the kernels read them."""
        outputs = (*table.outputs, *[0] * len(ONE_PASS))[: len(ONE_PASS)]
        return self.module.Table(
            words.data_ptr(), table.parameters, len(table.constants), table.uniform, len(table.instructions), table.inputs,
            table.terms, table.registers, outputs,
        )  # fmt: skip


class CompiledRules:
    """Programs of at most four of the package's own rules and four of its weights, each recognised by its formula."""

    _MOST = 4

    def __init__(self, module: Any) -> None:
        self.module = module

    def why_not(self, program: Program) -> str | None:
        if max(len(program.terms), len(program.weights)) > self._MOST:
            return f"one pass evaluates at most {self._MOST} terms and {self._MOST} weights"
        weights = [formula for formula, _ in program.weights]
        for what, texts, names, built in (
            ("rule", program.terms, _rule_names(), self.module.rules()),
            ("weight", weights, _weight_names(), self.module.weights()),
        ):
            for text in texts:
                if names.get(text) not in built:
                    return f"a {what} is not compiled in: {text!r}"
        return None

    def compile(self, program: Program, device: torch.device) -> Compiled:
        terms = [_rule_names()[text] for text in program.terms]
        weights = [(_weight_names()[text], scope == "all") for text, scope in program.weights]
        return _compiled(program, self.module.Program(terms, weights))


@functools.cache
def _rule_names() -> dict[str, str]:
    return {write_formula(trace_rule(cls)): name for name, cls in own_rules().items()}


@functools.cache
def _weight_names() -> dict[str, str]:
    return {write_formula(trace_weight(cls)): name for name, cls in own_weights().items()}
