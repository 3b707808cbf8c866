"""Two logits tensors in Triton: one launch for statistics, for a gradient, or for both.

A few long rows are split over programs as in :mod:`..backends.triton`: slots of
segments, their merge, and, if requested, the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.config import divergence_config
from ...triton_kernels.divergence import SLOT, divergence_kernel, partial_divergence_kernel
from . import triton_launch
from .base import DIVERGENCE_STATS, DivergenceInputs, rows_of


class _Call:
    """The common arguments of the launches of one call."""

    def __init__(self, two: DivergenceInputs, out: Tensor | None) -> None:
        x, y = two.logits, two.other
        self.two, self.rows, self.out = two, two.ids.numel(), x if out is None else out
        wave = triton_launch.wave(x.device)
        self.config = divergence_config(two.softmax.vocab_size, x.element_size(), y.element_size())
        self.segments = -(-two.softmax.vocab_size // self.config.segment)
        self.split = triton_launch.is_split(self.rows, self.segments, x.device)
        others, align = rows_of(y), min(triton_launch.alignment(t) for t in (x, y))
        self.where = *rows_of(x), others.batch_stride, others.row_stride
        self.strides = int(two.temperature.numel() > 1), int(two.other_temperature.numel() > 1)
        self.caps = [
            1.0 if h.softcap == float("inf") else h.softcap
            for h in (two.softmax, two.other_softmax)
        ]
        self.meta: dict[str, Any] = {
            "SEGMENT": self.config.segment,
            "SLOTS": self.config.slots,
            "VECTORS": self.config.vectors,
            "E": self.config.vector,
            "P_CAP": two.softmax.softcap != float("inf"),
            "Q_CAP": two.other_softmax.softcap != float("inf"),
            "ALIGN": align,
            "shape": self.config.stats,
            "wave": wave,
        }
        self.peel = triton_launch.alignment(self.out) < 16
        alike = x.dtype == y.dtype and all(triton_launch.begin_alike(t, self.out) for t in (x, y))
        whole = alike or (align == 16 and not self.peel)
        self.grad_align = 16 if whole else min(x.element_size(), y.element_size())

    def partial(self) -> Tensor:
        """The slots of every segment."""
        two = self.two
        slots = torch.empty(
            (self.rows, self.segments, SLOT.value, self.config.slots),
            dtype=torch.float32,
            device=two.logits.device,
        )
        triton_launch.launch(
            partial_divergence_kernel,
            self.rows * self.segments,
            two.logits,
            two.other,
            two.ids,
            two.temperature,
            two.other_temperature,
            slots,
            *self.strides,
            *self.where,
            two.softmax.vocab_size,
            *self.caps,
            **self.meta,
        )
        return slots

    def launch(
        self,
        grid: int,
        table: Tensor,
        derivatives: Tensor,
        partial: Tensor,
        *,
        stats: bool,
        grad: bool,
        logs: bool,
    ) -> None:
        two, to = self.two, rows_of(self.out)
        triton_launch.launch(
            divergence_kernel,
            grid,
            two.logits,
            two.other,
            self.out,
            two.ids,
            two.temperature,
            two.other_temperature,
            table,
            derivatives,
            partial,
            self.rows,
            *self.strides,
            *self.where,
            to.batch_stride,
            to.row_stride,
            two.softmax.vocab_size,
            two.logits.size(-1),
            *self.caps,
            STATS=stats,
            GRAD=grad,
            LOGS=logs,
            SPLIT=self.split,
            GRAD_ALIGN=self.grad_align if grad else 16,
            PEEL=grad and self.peel,
            EMULATE=triton_launch.interpreted() and two.logits.dtype == torch.bfloat16,
            **self.meta,
        )


def _launch(
    two: DivergenceInputs,
    table: Tensor,
    out: Tensor | None,
    derivatives: Tensor,
    *,
    stats: bool,
    logs: bool,
) -> None:
    if not two.ids.numel():
        return
    call = _Call(two, out)
    grad = out is not None
    if not call.split:
        call.launch(call.rows, table, derivatives, table, stats=stats, grad=grad, logs=logs)
        return
    if stats:
        call.launch(
            call.rows, table, derivatives, call.partial(), stats=True, grad=False, logs=False
        )
    if grad:
        chunks = -(-two.logits.size(-1) // call.config.segment)
        call.launch(
            call.rows * chunks, table, derivatives, table, stats=False, grad=True, logs=logs
        )


def divergence_stats(two: DivergenceInputs) -> Tensor:
    table = torch.empty(
        (len(DIVERGENCE_STATS), two.ids.numel()), dtype=torch.float32, device=two.logits.device
    )
    _launch(two, table, None, table, stats=True, logs=False)
    return table


def divergence_grad(two: DivergenceInputs, table: Tensor, derivatives: Tensor, out: Tensor) -> None:
    _launch(two, table, out, derivatives.contiguous(), stats=False, logs=True)


def divergence_loss_grad(
    two: DivergenceInputs, constants: Tensor, weights: Tensor, out: Tensor
) -> Tensor:
    table = torch.empty(
        (len(DIVERGENCE_STATS), two.ids.numel()), dtype=torch.float32, device=two.logits.device
    )
    _launch(two, table, out, constants[:, None] * weights, stats=True, logs=True)
    return table
