"""Fused losses of a chunk of logits: what :class:`.autograd.LinearOnePass` does with each, so that no chunk is computed twice."""

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

    @property
    def backend(self) -> str: ...

    @property
    def op(self) -> str:
        """The public op, for messages."""

    def at(self, rows: slice) -> OnePassWork:
        """The same loss of these rows."""

    def gradient_(self, logits: LogitRows) -> Tensor:
        """What the kernel returns per row, ``[S, n]``; the loss's gradient stands over the first model's logits now."""

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        """Positions of the rows with a gradient, or None where dropping the others is not worth it."""

    def loss(self, table: Tensor) -> Tensor:
        """The loss from the table of all rows."""


class TokenWork(NamedTuple):
    """A program on one model's logits."""

    work: PolicyWork
    softmax: SoftmaxParams
    backend: str
    over_vocabulary: bool = False  # the entropy, where rows have kept sets

    @property
    def op(self) -> str:
        return "linear_policy_loss"

    def at(self, rows: slice) -> TokenWork:
        inputs = RowInputs(*(None if t is None else t[..., rows].contiguous() for t in self.work.inputs))  # type: ignore[arg-type]
        return self._replace(work=self.work._replace(inputs=inputs))

    def gradient_(self, logits: LogitRows) -> Tensor:
        table: Tensor = self._called(logits, library.token_loss_grad_, kept_ops.kept_loss_grad_)
        return table

    def gradient(self, logits: LogitRows) -> tuple[Tensor, Tensor]:
        """The table, and the gradient as a tensor of its own."""
        table, grad = self._called(logits, library.token_loss_grad, kept_ops.kept_loss_grad)
        return table, grad

    def _called(self, logits: LogitRows, whole: Any, of_sets: Any) -> Any:
        """What the op gives of rows over the whole vocabulary, or of rows with kept sets."""
        inputs, params, program = self.work
        rows, sets, rest = (logits.rows.ids, logits.rows.temperature), logits.rows.sets, (*self.softmax[:2], False, self.backend)
        if sets is None:
            return library.called(whole, logits.values, *rows, *inputs, params, program, *rest)
        return library.called(of_sets, logits.values, rows[0], *sets[:3], rows[1], *inputs, params, program, self.over_vocabulary, *rest)

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        return rows_with_gradient(table[4], table[5])

    def loss(self, table: Tensor) -> Tensor:
        return table[2].sum()


class TwoWork(NamedTuple):
    """A weighted sum of divergences of two models' logits."""

    work: DivergenceWork
    measure: DivergenceMeasure

    @property
    def op(self) -> str:
        return "linear_distillation_loss"

    @property
    def backend(self) -> str:
        return self.measure.backend

    def at(self, rows: slice) -> TwoWork:
        return self._replace(work=self.work._replace(weights=self.work.weights[rows].contiguous()))

    def gradient_(self, logits: LogitRows) -> Tensor:
        """The kernels' table; with a ``beta`` a row for the JSD besides."""
        softmaxes, backend, beta, _ = self.measure
        two = logits.tensors()
        if beta is None:
            table: Tensor = library.called(library.divergence_loss_grad_, *two, *self.work, *softmaxes, False, backend)
            return table
        table = library.called(library.divergence_stats, *two, *softmaxes, False, backend)
        return torch.cat([table, jsd_ops.generalized_jsd_grad_(*two, self.work.weights, beta, *softmaxes)[None]])

    def rows_with_gradient(self, table: Tensor) -> Tensor | None:
        return rows_with_gradient(self.work.weights)

    def loss(self, table: Tensor) -> Tensor:
        if self.measure.beta is None:
            return weighted_sum(table, *self.work)
        return torch.where(self.work.weights == 0, 0, self.work.weights * table[-1]).sum()


class JointWork(NamedTuple):
    """A program and a weighted sum of divergences, of the same chunk of logits: the rows of the first's table, then those of the second's."""

    token: TokenWork
    two: TwoWork

    @property
    def backend(self) -> str:
        return self.token.backend

    @property
    def op(self) -> str:
        return self.token.op

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
