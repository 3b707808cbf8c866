"""Fused losses of a chunk of logits. :class:`.autograd.LinearOnePass` evaluates them,
so that no chunk is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...backends.base import LOSS_ROWS, RowInputs, SoftmaxParams
from .. import jsd_ops, kept_ops
from .. import ops as library
from ..autograd import weighted_sum
from ..source import DivergenceWork, PolicyWork
from .gemms import rows_with_gradient
from .measures import DivergenceMeasure, LogitRows, wide_blocks


class OnePassWork(Protocol):
    """A loss that is a sum over rows, bound to some of them."""

    def ran_by(self) -> str:
        """The backend."""

    def op(self) -> str:
        """Return the name of the public op, for messages."""

    def at(self, rows: slice) -> OnePassWork:
        """Return the same loss for these rows."""

    def gradient_(self, logits: LogitRows) -> Tensor:
        """Return the kernel's per-row results ``[S, n]``. The loss's gradient is
        written over the first model's logits.
        """

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        """Return the positions of the rows with a gradient, or None if dropping the
        others is not worth its cost.
        """

    def loss(self, table: Tensor) -> Tensor:
        """Return the loss from the table of all rows."""


class TokenWork(NamedTuple):
    """A program on one model's logits."""

    work: PolicyWork
    softmax: SoftmaxParams
    backend: str
    # whether the entropy of rows with kept sets is over the vocabulary
    over_vocabulary: bool = False

    def ran_by(self) -> str:
        return self.backend

    def op(self) -> str:
        return "linear_policy_loss"

    def at(self, rows: slice) -> TokenWork:
        inputs = RowInputs(
            *(None if t is None else t[..., rows].contiguous() for t in self.work.inputs)  # type: ignore[arg-type]
        )
        return self._replace(work=self.work._replace(inputs=inputs))

    def gradient_(self, logits: LogitRows) -> Tensor:
        table: Tensor = self._called(logits, library.token_loss_grad_, kept_ops.kept_loss_grad_)
        return table

    def gradient(self, logits: LogitRows) -> tuple[Tensor, Tensor]:
        """Return the table, and the gradient as a separate tensor."""
        table, grad = self._called(logits, library.token_loss_grad, kept_ops.kept_loss_grad)
        return table, grad

    def _called(self, logits: LogitRows, whole: Any, of_sets: Any) -> Any:
        """Return what the op gives for rows over the whole vocabulary, or for rows with
        kept sets.
        """
        inputs, params, program = self.work
        rows, sets, rest = (
            (logits.rows.ids, logits.rows.temperature),
            logits.rows.sets(),
            (*self.softmax[:2], False, self.backend),
        )
        if sets is None:
            return library.called(whole, logits.values, *rows, *inputs, params, program, *rest)
        return library.called(
            of_sets,
            logits.values,
            rows[0],
            *sets[:3],
            rows[1],
            *inputs,
            params,
            program,
            self.over_vocabulary,
            *rest,
        )

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        return rows_with_gradient(table[4], table[5])

    def loss(self, table: Tensor) -> Tensor:
        return table[2].sum()


class TwoWork(NamedTuple):
    """A weighted sum of divergences of two models' logits."""

    work: DivergenceWork
    measure: DivergenceMeasure

    def op(self) -> str:
        return "linear_distillation_loss"

    def ran_by(self) -> str:
        return self.measure.backend

    def at(self, rows: slice) -> TwoWork:
        return self._replace(work=self.work._replace(weights=self.work.weights[rows].contiguous()))

    def gradient_(self, logits: LogitRows) -> Tensor:
        """Return the kernels' table. With a ``beta`` it has one more row
        for the JSD."""
        softmaxes, backend, beta, _ = self.measure
        two = logits.tensors()
        if beta is None:
            table: Tensor = library.called(
                library.divergence_loss_grad_, *two, *self.work, *softmaxes, False, backend
            )
            return table
        table = library.called(library.divergence_stats, *two, *softmaxes, False, backend)
        return torch.cat(
            [table, jsd_ops.generalized_jsd_grad_(*two, self.work.weights, beta, *softmaxes)[None]]
        )

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        return rows_with_gradient(self.work.weights)

    def loss(self, table: Tensor) -> Tensor:
        if self.measure.beta is None:
            return weighted_sum(table, *self.work)
        return torch.where(self.work.weights == 0, 0, self.work.weights * table[-1]).sum()


class JointWork(NamedTuple):
    """A program and a weighted sum of divergences of the same chunk of logits.

    The table has the rows of the first, then those of the second.
    """

    token: TokenWork
    two: TwoWork

    def ran_by(self) -> str:
        return self.token.backend

    def op(self) -> str:
        return self.token.op()

    def at(self, rows: slice) -> JointWork:
        return JointWork(self.token.at(rows), self.two.at(rows))

    def gradient_(self, logits: LogitRows) -> Tensor:
        tables = []
        for rows, wide in wide_blocks(logits):
            table, grad = self.token.at(rows).gradient(wide)
            tables.append(torch.cat([table, self.two.at(rows).gradient_(wide)]))
            logits.values[rows] = grad.add_(wide.values)
        return torch.cat(tables, 1)

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        return rows_with_gradient(table[4], table[5], self.two.work.weights)

    def loss(self, table: Tensor) -> Tensor:
        return self.token.loss(table) + self.two.loss(table[len(LOSS_ROWS) :])
