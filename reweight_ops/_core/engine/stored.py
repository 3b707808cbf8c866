"""The middle of two_pass as one launch: a pointwise loss on stored row statistics, by a backend's ``evaluate_rows``.

The same numbers as :meth:`~reweight_ops._core.calls.policy.LossCall.evaluate`, which PyTorch differentiates, with the derivatives from the same
evaluation. A compiled graph takes that one, for its compiler fuses it, and so does a loss that is no program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.select import load
from ..calls.policy import LossCall
from ..formula.loss_program import Program, loss_graph
from ..spec.ratio import SequenceRatio

#: What a loss is differentiated by, and the outputs of its evaluation.
_BY = ("logp", "entropy", "log_sum_p_sq", "log_ratio")


class _StoredRows(torch.autograd.Function):
    """``(loss, table)`` of ``evaluate()``, whose table begins with the weighted loss, the loss, and the derivatives by ``statistics``."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, moving: tuple[bool, ...], *statistics: Tensor) -> Tensor:
        ctx.moving = moving
        ctx.save_for_backward(table)
        ctx.set_materialize_grads(False)
        return table[0].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (2 + len(ctx.moving))
        (table,) = ctx.saved_tensors
        at = [i for i, moves in enumerate(ctx.moving) if moves]
        if not at:
            return (None,) * (2 + len(ctx.moving))
        begin = at[0]
        scaled = table[2 + begin : 3 + at[-1]] * upstream
        return None, None, *(scaled[i - begin] if moves else None for i, moves in enumerate(ctx.moving))


def evaluate_stored(call: LossCall, statistics: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor, bool] | None:
    """``(loss, table, total)`` from differentiable statistics; None if the backend or the loss has no such evaluation.

    The table's rows are the weighted loss, the loss and the derivatives by logp, entropy and log_sum_p_sq: ``total`` says whether those
    through the ratio are among them.
    """
    program, rows, found = call.spec.stored_program, call.rows, load(backend)
    if torch.compiler.is_compiling() or program is None or found.evaluate_rows is None or found.is_fallback or not rows.count:
        return None
    if rows.dtype != torch.float32 or any(t is not None and t.requires_grad for t in (call.adv, call.factor)):
        return None
    logp, detached = statistics["logp"], {name: t.detach() for name, t in statistics.items()}
    leaves = {**call.stored(), **detached}
    leaves.setdefault("old_logp", detached["logp"])
    params, weights = call.params, call.row_weights(detached)
    ratio, inputs = call.spec.ratio, dict(statistics)
    fused = type(ratio) is SequenceRatio and rows.verbs is not None
    pointwise = ratio.one_pass_obstacle is None
    means = None
    if fused:
        assert rows.verbs is not None and rows.masked is not None and isinstance(ratio, SequenceRatio)
        old = call.ref_logp if ratio.against == "ref" else call.old_logp
        leaves["log_ratio"], means = rows.verbs.ratio(rows.masked, rows.run, detached["logp"], old, params, ratio.normalize)
    elif not pointwise:
        inputs["log_ratio"] = call.log_ratio(logp)
        leaves["log_ratio"] = inputs["log_ratio"].detach()
    outputs = ("weighted_loss", "loss", *(f"d_{name}" for name in (_BY[:3] if pointwise else _BY)))
    table = found.evaluate_rows(program, params, leaves, weights, outputs, rows.keep)
    if means is not None:
        assert rows.verbs is not None and rows.masked is not None and isinstance(ratio, SequenceRatio)
        rows.verbs.adjoint(rows.masked, rows.run, table[5], table[2], params, means, ratio.normalize, ratio.gradient == "sequence")
    moving = tuple(name in inputs and (_moves(program, name, not pointwise) or (fused and name == "logp")) for name in _BY)
    loss = _StoredRows.apply(table, moving, *(inputs.get(name) for name in _BY))  # type: ignore[no-untyped-call]
    return loss, table, pointwise or fused


def _moves(program: Program, name: str, given: bool) -> bool:
    return loss_graph(program, given).moves(name)
