"""The middle of two_pass: a loss on stored row statistics, by a backend's
``evaluate_rows``. It is one launch, after those of the statistics of the batch.

It gives the same numbers as
:meth:`~reweight_ops._core.calls.policy.LossCall.token_losses`, which PyTorch
differentiates, and the derivatives from the same evaluation. A compiled graph takes
that method, because its compiler fuses it. So does a loss that is not a program.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.select import load
from ..calls.policy import LossCall
from ..formula.loss_program import Program, loss_graph
from ..rows.primitives import is_traced
from . import again
from .coupled import at_this_point
from .output import Derivatives
from .versions import Versions, arguments_of

#: The statistics by which a loss is differentiated. They name the outputs of its
#: evaluation.
_BY = ("logp", "entropy", "log_sum_p_sq", "log_ratio")


class _StoredRows(torch.autograd.Function):
    """The loss of a table of ``token_losses()``: a sum, or ``[N]`` without a reduction.

    The table begins with the weighted loss, the loss, and the derivatives by
    ``statistics``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        moving: tuple[bool, ...],
        call: LossCall,
        *statistics: Tensor | None,
    ) -> Tensor:
        ctx.moving, ctx.call = moving, call.without_inputs()
        ctx.versions = Versions(itertools.chain(*arguments_of(call)))
        ctx.save_for_backward(table, *statistics)
        ctx.set_materialize_grads(False)
        return table[0].sum() if call.spec.reduction.scalar else table[0].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        at = [i for i, moves in enumerate(ctx.moving) if moves]
        if upstream is None or not at:
            return (None,) * (3 + len(ctx.moving))
        table, *statistics = ctx.saved_tensors
        if again.wants_graph():
            ctx.versions.check_graph()
            # The formula takes the statistics alone. The ratio follows from the
            # log-probs.
            return (
                None,
                None,
                None,
                *again.gradient(_formula(ctx.call), statistics[:-1], (upstream,)),
                None,
            )
        begin = at[0]
        scaled = table[2 + begin : 3 + at[-1]] * upstream
        return (
            None,
            None,
            None,
            *[scaled[i - begin] if moves else None for i, moves in enumerate(ctx.moving)],
        )


def _formula(call: LossCall) -> Callable[..., tuple[Tensor]]:
    def total(*statistics: Tensor | None) -> tuple[Tensor]:
        known = {name: x for name, x in zip(_BY, statistics, strict=False) if x is not None}
        weighted = call.token_losses(known).weighted_loss
        return (weighted.sum() if call.spec.reduction.scalar else weighted,)

    return total


def evaluator_of(call: LossCall, logp: Tensor) -> str | None:
    """Return the backend whose row kernels evaluate a loss of log-probs that the caller
    has, or None if PyTorch does.
    """
    primitives = call.rows.primitives
    known = primitives is not None and _is_evaluated(call, logp, primitives.name)
    return primitives.name if primitives is not None and known else None


def _is_evaluated(call: LossCall, logp: Tensor, backend: str) -> bool:
    found, rows = load(backend), call.rows
    return not (
        call.spec.stored_program is None
        or found.evaluate_rows is None
        or found.is_fallback
        or not rows.count
        or rows.dtype != torch.float32
        or call.inputs_require_grad
        or is_traced(logp)
        # autograd differentiates a coupled reduction
        or (torch.is_inference_mode_enabled() and call.spec.is_coupled)
        # a rank without rows has no kernels, and must sum over ranks as often as others
        or (rows.across is not None and (call.spec.is_coupled or call.spec.staged is not None))
    )


class Evaluated(NamedTuple):
    """A loss on stored rows.

    ``per_row`` ``[N]`` is without row weights. ``by`` are the derivatives by logp and
    entropy, or computes them where PyTorch forms the ratio. ``table`` is that of the
    row weights, if the loss has stages.
    """

    loss: Tensor
    per_row: Tensor
    by: Derivatives | Callable[[], Derivatives]
    table: Tensor | None


def evaluate_stored(
    call: LossCall, statistics: dict[str, Tensor], backend: str
) -> Evaluated | None:
    """Return the loss from differentiable statistics, or None if the backend or the
    loss has no such evaluation.
    """
    program, evaluate = call.spec.stored_program, load(backend).evaluate_rows
    if program is None or evaluate is None or not _is_evaluated(call, statistics["logp"], backend):
        return None
    detached = {name: t.detach() for name, t in statistics.items()}
    leaves = {**call.stored(), **detached}
    leaves.setdefault("old_logp", detached["logp"])
    inputs, params = dict(statistics), call.params
    pointwise = call.spec.ratio.one_pass_unsupported_reason is None
    # Without a reduction each row has its own upstream. Autograd takes it through the
    # ratio.
    scalar = call.spec.reduction.scalar
    averaged = call.averaged(detached["logp"], params) if scalar else None
    if averaged is not None:
        primitives, masked = call.rows.primitives, call.rows.masked
        assert primitives is not None and primitives.ratio is not None and masked is not None
        leaves["log_ratio"], means = primitives.ratio(masked, averaged)
    elif not pointwise:
        inputs["log_ratio"] = call.log_ratio(statistics["logp"])
        # one sequence may be an expanded number
        leaves["log_ratio"] = inputs["log_ratio"].detach().contiguous()
    filled = call.stored_weights(leaves, evaluate)
    weights = filled[: program.table_rows()]  # a formula may not read all that it is given
    outputs = ["weighted_loss", "loss", *[f"d_{x}" for x in (_BY[:3] if pointwise else _BY)]]
    table = weights.new_empty((len(outputs), weights.size(1)))
    into, unknown = table, None
    if call.spec.is_coupled:
        weights, unknown = at_this_point(
            call, program, params, leaves, weights, evaluate, table[:2]
        )
        outputs, into = outputs[2:], table[2:]
    evaluate(program, params, leaves, weights, tuple(outputs), call.rows.keep, into)
    if unknown is not None and not pointwise:
        table[2].masked_fill_(unknown, math.nan)
    moves = _moving(program, not pointwise)
    if averaged is not None:
        assert primitives is not None and primitives.adjoint is not None and masked is not None
        primitives.adjoint(masked, averaged, means, table[5], table[2])
        moves = moves | {"logp"}
    moving = tuple([name in inputs and name in moves for name in _BY])
    loss = _StoredRows.apply(table, moving, call, *[inputs.get(name) for name in _BY])  # type: ignore[no-untyped-call]
    rows_table = None if call.spec.staged is None else filled
    if pointwise or averaged is not None or "log_ratio" not in moves:
        return Evaluated(loss, table[1], (table[2], table[3]), rows_table)
    by = functools.partial(_through_ratio, call.without_inputs(), detached["logp"], table)
    return Evaluated(loss, table[1], by, rows_table)


def _through_ratio(call: LossCall, logp: Tensor, table: Tensor) -> Derivatives:
    """Return the derivatives by logp and entropy, with the path through a ratio that
    PyTorch forms.
    """
    with torch.enable_grad():
        probe = logp.clone().requires_grad_()
        ratio = call.log_ratio(probe)
        (through,) = torch.autograd.grad(ratio, probe, table[5]) if ratio.requires_grad else (0,)
    return table[2] + through, table[3]


@functools.lru_cache(maxsize=512)
def _moving(program: Program, given_ratio: bool) -> frozenset[str]:
    """Return the statistics by which a loss has a gradient."""
    graph = loss_graph(program, given_ratio)
    return frozenset(name for name in _BY if f"d_{name}" in graph.names and graph.moves(name))
