"""Runs a call of a public op: evaluates an objective on the statistics that a source
gets from a backend, by a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..rows.across import Across
from .plan import Choice, Objective, choose_plan
from .source import Source

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """A resolved call of a public op. Nothing has been computed, so it can be explained
    as well as run.
    """

    source: Source
    objective: Objective[T]
    plan: str = "auto"
    choice: Choice | None = None  # if it was chosen before
    # told of the choice, once the call has succeeded
    keep: Callable[[Choice], None] | None = None


@dataclass(frozen=True)
class Again(Generic[T]):
    """A repeated call. ``direct`` returns the result if it can, else None."""

    direct: Callable[[], T | None]
    resolve: Callable[[], Call[T]]


def run(call: Call[T] | Again[T]) -> T:
    """Return the result of a call."""
    if isinstance(call, Again):
        result = call.direct()
        if result is not None:
            return result
        call = call.resolve()
    source, objective = call.source, call.objective
    across = source.rows.across
    # In a graph the exchange over a sequence's ranks follows that over a vocabulary's,
    # so that all ranks have the same order of collectives.
    late = across is not None and torch.compiler.is_compiling()
    if across is not None and not late:
        agree_on_sequences(across, source, source.rows.keep)
    choice = call.choice or choose_plan(source, objective, call.plan)
    more, unwritten = source.more_metrics(choice.plan), source.version()
    try:
        if choice.plan == "one_pass":
            if across is not None and late:
                agree_on_sequences(across, source, source.rows.keep)
            loss, table = source.one_pass(objective.work(), choice.backend)
            result = objective.from_one_pass(loss, table, choice, more)
        else:
            statistics = source.statistics(objective.reads, choice.backend)
            if across is not None and late:
                agree_on_sequences(across, source, next(iter(statistics.values())))
            result = objective.from_statistics(statistics, choice, more)
    # no memory, Ctrl-C, ...: the tensor may already hold a gradient, or a part of one,
    # instead of logits
    except BaseException:
        if source.version() != unwritten:
            source.close()
        raise
    source.close()
    if call.keep is not None:
        call.keep(choice)
    return result


def agree_on_sequences(across: Across, source: Source, after: Tensor) -> None:
    """Let the ranks agree on a call whose sequences they have together."""
    rows = source.rows
    sequences = 0 if rows.sequences is None else rows.sequences.count
    across.agree(rows.count, sequences, source.info.needs_grad, after.detach())
