"""Evaluation of a loss program in torch: its graph is interpreted."""

from __future__ import annotations

import torch
from torch import Tensor

from .interpret import interpret
from .loss_program import ONE_PASS, Program, loss_graph


def evaluate_rows(
    program: Program,
    params: Tensor,
    leaves: dict[str, Tensor],
    row_weights: Tensor,
    outputs: tuple[str, ...] = ONE_PASS,
    keep: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """``[len(outputs), N]``; see :class:`~reweight_ops._core.backends.base.Backend`."""
    graph = loss_graph(program, "log_ratio" in leaves)
    known = leaves | {f"w{k}": w for k, w in enumerate(row_weights)}
    numbers = {f"p{i}": x for i, x in enumerate(params.unbind())}
    values = interpret([graph[name] for name in outputs], known, numbers)
    table = torch.stack([x.expand(row_weights.size(1)) for x in values])
    table = table if keep is None else torch.where(keep, table, 0)
    return table if into is None else into.copy_(table)
