"""The reference backend: plain PyTorch, on any device and in any float dtype, fp64
included.

It is for correctness and not for speed.
"""

from __future__ import annotations

from ..formula.program import evaluate_rows
from . import reference_divergence as divergence
from . import reference_packed as packed
from . import reference_token as token
from .base import Backend, Request


def unsupported_reason(request: Request) -> str | None:
    return (
        None
        if request.dtype.is_floating_point
        else f"logits are {request.dtype}, expected a floating dtype"
    )


BACKEND = Backend(
    name="reference",
    unsupported_reason=unsupported_reason,
    token_stats=token.token_stats,
    token_grad=token.token_grad,
    token_loss_grad=token.token_loss_grad,
    divergence_stats=divergence.divergence_stats,
    divergence_grad=divergence.divergence_grad,
    divergence_loss_grad=divergence.divergence_loss_grad,
    packed_stats=packed.packed_stats,
    packed_grad=packed.packed_grad,
    evaluate_rows=evaluate_rows,
    is_fallback=True,
)
