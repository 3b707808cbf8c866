"""Gradients of a one-pass loss to stored log-probs.

They are the derivatives of the graph that the kernel evaluates, on ``[N]`` vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedRequest
from ..calls.policy import LossCall
from ..formula.program import evaluate_rows
from . import again


class _GivenDerivatives(torch.autograd.Function):
    """A loss with known derivatives ``[K, N]`` by ``inputs``. Its other derivatives
    pass through unchanged.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, derivatives: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(derivatives)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if again.wants_graph():
            raise UnsupportedRequest(
                "create_graph=True asks a one-pass loss for second derivatives by stored "
                'log-probs: plan="two_pass" has them.'
            )
        (derivatives,) = ctx.saved_tensors
        return upstream, None, *(torch.where(d == 0, 0, d * upstream) for d in derivatives)


def with_derivatives(call: LossCall, loss: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    """Return the loss, differentiable to the call's stored log-probs that
    require grad."""
    inputs = call.differentiated()
    program = call.spec.program
    if not inputs or program is None:
        return loss
    with torch.no_grad():
        leaves = {**statistics, "old_logp": statistics["logp"], **call.stored()}
        outputs = tuple(f"d_{name}" for name in inputs)
        derivatives = evaluate_rows(
            program, call.params, leaves, call.row_weights(), outputs, call.rows.keep
        )
    found: Tensor = _GivenDerivatives.apply(loss, derivatives, *inputs.values())  # type: ignore[no-untyped-call]
    return found
