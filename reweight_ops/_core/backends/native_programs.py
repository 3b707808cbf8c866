"""Loss programs for the compiled backends, which interpret them from a table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..formula.loss_program import ONE_PASS, Program, loss_graph
from ..formula.table import OPERATIONS, Table, build_table


class Compiled(NamedTuple):
    """A program for a module, and the facts that a launch needs about it."""

    table: Any  # an object of the module's own class
    parameters: int
    reads_p_sq: bool
    entropy_gradient: bool
    words: Tensor  # what the table points at


class Programs:
    """The programs of a module: any that fits in the registers of its kernels."""

    def __init__(self, module: Any) -> None:
        if tuple(module.operations) != OPERATIONS:
            raise BackendUnavailable(
                f"{module.__name__} has other operations; rebuild it with pip install -e ."
            )
        self.module = module

    def program_unsupported_reason(self, program: Program) -> str | None:
        """Return why the module cannot run a program."""
        registers, most = build_table(loss_graph(program)).registers, self.module.max_registers
        return (
            f"the loss takes {registers} registers, one pass holds {most}"
            if registers > most
            else None
        )

    def compile(self, program: Program, device: torch.device) -> Compiled:
        """Return the program where kernels on ``device`` read it.

        The first call uploads it, before a CUDA graph is captured.
        """
        graph = loss_graph(program)
        table = build_table(graph)
        words = torch.tensor(table.words(), dtype=torch.int64, device="cpu").to(device)
        reads_p_sq = "log_sum_p_sq" in graph.reads() or graph.moves("log_sum_p_sq")
        return Compiled(
            self.load(table, words), graph.parameters, reads_p_sq, graph.moves("entropy"), words
        )

    def load(self, table: Table, words: Tensor) -> Any:
        """Return the module's own view of a table."""
        counts = (
            table.parameters,
            len(table.constants),
            table.uniform_levels,
            len(table.levels),
            table.uniform,
            len(table.instructions),
            table.inputs,
            table.rows,
            table.registers,
        )
        return self.module.Table(
            words.data_ptr(), counts, (*table.outputs, *[0] * len(ONE_PASS))[: len(ONE_PASS)]
        )
