"""The statistics of the batch that a loss in stages reads, as rows of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..formula.base import Formula
from ..formula.interpret import interpret_number
from ..formula.stages import Operand, Staged, formulas_of, values_of
from ..rows.batch import statistics_into
from ..rows.constants import parameter_vector
from ..rows.rows import Rows


class Table:
    """The table ``[R, N]`` of a loss in stages.

    ``leaves`` are those that its formulas read, detached. ``evaluate`` is a backend's
    ``evaluate_rows``. ``bounds`` are those of the ratio.
    """

    def __init__(
        self,
        rows: Rows,
        staged: Staged,
        roots: Sequence[Formula],
        leaves: dict[str, Tensor],
        bounds: tuple[Any, Any],
        evaluate: Callable[..., Tensor],
    ) -> None:
        self._rows, self._staged, self._leaves = rows, staged, leaves
        self._formulas = formulas_of(roots)
        self._bounds, self._evaluate = bounds, evaluate
        self.values = rows.keep.new_empty((staged.rows, rows.count), dtype=rows.dtype)

    def params(self, values: tuple[Any, ...]) -> Tensor:
        numbers = (*self._bounds, *values_of(values, self._formulas))
        return parameter_vector(numbers, self._rows.dtype, self._rows.device)

    def fill(self) -> Tensor:
        """Return the table. Its first rows, the row weights, are the caller's to
        fill.
        """
        table, rows = self.values, self._rows
        for (i, name), row in self._staged.given:
            formula = self._formulas[i]
            given = rows.flatten_per_token(f"{formula.name}.{name}", getattr(formula, name))
            table[row].copy_(given)
        for stage in self._staged.stages:
            if stage.program is not None:
                count = len(stage.program.terms)
                self._evaluate(
                    stage.program,
                    self.params(stage.values),
                    self._leaves,
                    table[: stage.program.table_rows()],
                    tuple([f"d_w{k}" for k in range(count)]),
                    rows.keep,
                    table[stage.begin : stage.begin + count],
                )
            for statistic in stage.statistics:
                operands = [self._operand(x) for x in statistic.operands]
                first = len(operands) - len(statistic.keywords)
                keywords = dict(zip(statistic.keywords, operands[first:], strict=True))
                into = table[statistic.row]
                compute = getattr(statistics_into(rows, into), statistic.name)
                found = compute(*operands[:first], **keywords)
                if found is not into:  # of PyTorch, which may be one number
                    into.copy_(found)
        return table

    def _operand(self, x: Operand) -> Any:
        if x.row is not None:
            row = self.values[x.row]
            if x.is_of_call:
                return row[0]
            return row != 0 if x.is_condition else row
        if x.leaf is not None:
            return self._leaves[x.leaf]
        values = values_of(x.fields, self._formulas)
        return interpret_number(x.number, values, self._rows.dtype)
