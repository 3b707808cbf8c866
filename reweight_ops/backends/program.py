"""A loss program in torch: its graph, interpreted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codegen.evaluate import evaluate
from ..codegen.loss_program import ONE_PASS, STATISTICS, Program, loss_graph
from .base import RowInputs


def evaluate_rows(
    program: Program,
    params: Tensor,
    leaves: dict[str, Tensor],
    row_weights: Tensor,
    outputs: tuple[str, ...] = ONE_PASS,
    keep: Tensor | None = None,
) -> Tensor:
    """``[len(outputs), N]``; see :class:`~reweight_ops.backends.base.Backend`."""
    graph = loss_graph(program, "log_ratio" in leaves)
    known = leaves | {f"w{k}": w for k, w in enumerate(row_weights)}
    numbers = {f"p{i}": x for i, x in enumerate(params.unbind())}
    values = evaluate([graph[name] for name in outputs], known, numbers)
    table = torch.stack([x.expand(row_weights.size(1)) for x in values])
    return table if keep is None else torch.where(keep, table, 0)


def run_program(program: Program, params: Tensor, stats: dict[str, Tensor], inputs: RowInputs, keep: Tensor) -> Tensor:
    """:data:`~reweight_ops.codegen.loss_program.ONE_PASS` of the rows, ``[5, N]``; 0 where not ``keep``."""
    leaves = {name: stats[name] for name in STATISTICS} | inputs.stored()
    return evaluate_rows(program, params, {"old_logp": stats["logp"], **leaves}, inputs.weights, keep=keep)
