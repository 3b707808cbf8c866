"""The two autograd Functions of the package: statistics (two_pass) and the one-pass loss.

Both call registered custom ops only, so torch.compile traces through. What is saved goes through ``save_for_backward``: the version
counters then catch a tensor that was changed in between, and nothing is kept alive (or cloned) longer than autograd needs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import ReweightOpsError
from . import ops as library


class HeadCall(NamedTuple):
    """What the head and the layout contribute to a call of an op; primitives only, they cross the op boundary."""

    vocab_size: int
    softcap: float
    drop_last: bool
    backend: str
    consume: bool


def hand_out_once(ctx: Any, op: str) -> None:
    """Raise at a second backward through a one-pass loss: the first scaled the gradient in place and gave it away."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "spent", False):
        raise ReweightOpsError(
            f"{op}: a second backward through a one-pass loss. Its gradient was handed out by the first; "
            'plan="two_pass" computes it in backward and supports retain_graph=True.'
        )
    ctx.spent = True


class RowStatistics(torch.autograd.Function):
    """``(logp, entropy, lse, log_sum_p_sq)`` of every row, differentiable with respect to the logits. ``[4, N]`` before unbinding."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: Tensor, head: HeadCall, stats: str) -> tuple[Tensor, ...]:
        rows = library.token_stats(logits, ids, temperature, head.vocab_size, head.softcap, head.drop_last, stats, head.backend)
        ctx.set_materialize_grads(False)
        ctx.head, ctx.names = head, stats.split(",")
        outputs = rows.unbind()
        fixed = [t for name, t in zip(ctx.names, outputs, strict=True) if name == "max_logp"]
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(logits, ids, temperature, *outputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ids, temperature, *stats = ctx.saved_tensors
        known = dict(zip(ctx.names, stats, strict=True))
        by = {name: None if g is None else g.contiguous() for name, g in zip(ctx.names, grads, strict=True)}
        if all(by.get(name) is None for name in ("logp", "entropy", "lse", "log_sum_p_sq")):
            return (None,) * 5
        head = ctx.head
        arguments = (
            logits, ids, temperature, known["logp"], known["lse"], known.get("entropy"), known.get("log_sum_p_sq"),
            by.get("logp"), by.get("entropy"), by.get("lse"), by.get("log_sum_p_sq"),
            head.vocab_size, head.softcap, head.drop_last, head.backend,
        )  # fmt: skip
        if library.may_overwrite(head.consume):
            library.token_grad_(*arguments)
            return logits, None, None, None, None
        return library.token_grad(*arguments), None, None, None, None


class OnePassLoss(torch.autograd.Function):
    """``(loss, rows)``: the gradient for upstream 1 is computed in forward; backward hands it out, scaled on device if it must be."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        inputs: tuple[Tensor | None, ...],
        params: Tensor,
        program: str,
        head: HeadCall,
    ) -> tuple[Tensor, Tensor]:
        arguments = (logits, ids, temperature, *inputs, params, program, head.vocab_size, head.softcap, head.drop_last, head.backend)
        if head.consume:
            rows, grad = library.token_loss_grad_(*arguments), logits
        else:
            rows, grad = library.token_loss_grad(*arguments)
        ctx.set_materialize_grads(False)
        ctx.backend = head.backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rows)
        return rows[2].sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _rows: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        hand_out_once(ctx, "policy_loss")
        (grad,) = ctx.saved_tensors
        return library.scaled(grad, upstream, ctx.backend), None, None, None, None, None, None
