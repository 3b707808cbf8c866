"""Two logits tensors in Triton: one launch for statistics, for a gradient, or for both."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels.config import config_for
from ...triton_kernels.divergence import divergence_kernel
from . import triton_launch
from .base import DIVERGENCE_STATS, DivergenceInputs, rows_of

#: Twice the state of one tensor's sweep in every thread: more registers than the kernels on one tensor may have, or they spill.
_REGISTERS = 128


def _launch(two: DivergenceInputs, table: Tensor, out: Tensor | None, coefs: Tensor, *, stats: bool, logs: bool) -> None:
    n = two.ids.numel()
    if not n:
        return
    x, y = two.logits, two.other
    size = max(x.element_size(), y.element_size())
    columns = two.head.vocab_size
    config = config_for(columns, size, triton_launch.wave(x.device))
    rows, others, to = rows_of(x), rows_of(y), rows_of(x if out is None else out)
    tensors = (x, y) if out is None else (x, y, out)
    align = min(triton_launch.alignment(t) for t in tensors)
    caps = [1.0 if h.softcap == float("inf") else h.softcap for h in (two.head, two.other_head)]
    emulate = triton_launch.interpreted() and x.dtype == torch.bfloat16
    triton_launch.launch(
        divergence_kernel, n, x, y, x if out is None else out, two.ids, two.temperature, two.other_temperature, table, coefs,
        n, int(two.temperature.numel() > 1), int(two.other_temperature.numel() > 1),
        *rows, others.batch_stride, others.row_stride, to.batch_stride, to.row_stride,
        columns, x.size(-1), *caps, STATS=stats, GRAD=out is not None, LOGS=logs, BLOCK=config.block, E=config.vector,
        P_CAP=two.head.softcap != float("inf"), Q_CAP=two.other_head.softcap != float("inf"), ALIGN=align, EMULATE=emulate, warps=config.warps,
        registers=_REGISTERS,
    )  # fmt: skip


def divergence_stats(two: DivergenceInputs) -> Tensor:
    table = torch.empty((len(DIVERGENCE_STATS), two.ids.numel()), dtype=torch.float32, device=two.logits.device)
    _launch(two, table, None, table, stats=True, logs=False)
    return table


def divergence_grad(two: DivergenceInputs, table: Tensor, coefs: Tensor, out: Tensor) -> None:
    _launch(two, table, out, coefs.contiguous(), stats=False, logs=True)


def divergence_loss_grad(two: DivergenceInputs, constants: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    table = torch.empty((len(DIVERGENCE_STATS), two.ids.numel()), dtype=torch.float32, device=two.logits.device)
    _launch(two, table, out, constants[:, None] * weights, stats=True, logs=True)
    return table
