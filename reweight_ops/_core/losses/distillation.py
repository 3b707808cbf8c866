"""The public ops on two logits tensors: per-token divergences with a gradient, and the distillation loss in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall
from ..calls.keywords import HeadKeywords, head_options
from ..calls.two_logits import TwoCall, resolve_two
from ..catalogue.registry import published
from ..engine.chunked_rows import per_row
from ..engine.divergence_ops import DivergenceStatistics, OnePassDivergence, weighted_sum
from ..rows.constants import parameter_vector

#: Kind to the coefficients of (KL(q‖p), KL(p‖q), H(p), H(q)). The last has no gradient: q is the other tensor's.
KINDS = {
    "forward_kl": (1.0, 0.0, 0.0, 0.0),
    "reverse_kl": (0.0, 1.0, 0.0, 0.0),
    "jeffreys": (1.0, 1.0, 0.0, 0.0),
    "cross_entropy": (1.0, 0.0, 0.0, 1.0),
    "reverse_cross_entropy": (0.0, 1.0, 1.0, 0.0),
    "symmetric_cross_entropy": (0.5, 0.5, 0.5, 0.5),
}
_OWN = ("kind", "completion_mask", "other_temperature", "other_softcap", "beta")


@published(
    "token_divergence", "Full-vocabulary KL to a reference or teacher", kind="divergence", level="token", plan="two passes", arxiv="1503.02531",
    paper="Distilling the Knowledge in a Neural Network", certainty="verified",
)  # fmt: skip
def token_divergence(
    logits: Tensor,
    other_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    completion_mask: Tensor | None = None,
    other_temperature: Any = None,
    other_softcap: float | None = None,
    **keywords: Unpack[HeadKeywords],
) -> Tensor:
    """The divergence of two next-token distributions over the whole vocabulary, per token, with its gradient to ``logits``.

    With p the softmax of ``logits`` (the policy, the student) and q that of ``other_logits`` (the reference, the teacher; detached)::

        forward_kl               KL(q‖p) = Σ q·(log q - log p)          gradient 1/T·(p - q)
        reverse_kl               KL(p‖q) = Σ p·(log p - log q)          gradient 1/T·p·(log p - log q - KL)
        jeffreys                 their sum
        cross_entropy            H(q, p) = -Σ q·log p                   reverse_cross_entropy  H(p, q);   symmetric_cross_entropy  half of each
        generalized_jsd          β·KL(q‖m) + (1-β)·KL(p‖m), m = β·q + (1-β)·p: Agarwal et al. 2023, arXiv:2306.13649 (a composite in chunks)

    One read of each tensor forward, one more of each and one write backward. KL(q‖p) is ``inf`` iff a column has p = 0 (a ``-inf`` logit) and q > 0,
    KL(p‖q) iff one has q = 0 and p > 0, whose gradient is then NaN in that row; ``0·log 0 = 0``. A column with p = 0 has gradient 0.

    Args:
        logits: ``R + (V,)``; other_logits: the same rows, any of fp16, bf16 and fp32 beside any other (fp64 beside fp64).
        completion_mask: R; rows that are out are never read, give 0, and get a gradient of exact 0.
        beta: of ``generalized_jsd`` only, in (0, 1); default 0.5.
        other_temperature, other_softcap: q's own; default: the temperature of p, and no soft cap.
        temperature, softcap, vocab_size, drop_last, consume_logits, backend: as in :func:`token_logps`. ``vocab_size`` is needed where the two heads are padded
            differently.

    Returns:
        R in fp32 (fp64 for fp64 logits).

    >>> import torch, reweight_ops as rw
    >>> rw.token_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.6931])
    """
    op = "token_divergence"
    options = head_options(op, dict(keywords), _OWN)
    if kind not in (*KINDS, "generalized_jsd"):
        raise InvalidCall(f"{op}: kind is {kind!r}, expected one of {', '.join(KINDS)}, generalized_jsd.")
    if beta is not None and kind != "generalized_jsd":
        raise InvalidCall(f"{op}: beta belongs to kind='generalized_jsd'; with {kind!r} it would have no effect.")
    call = resolve_two(op, logits, other_logits, completion_mask, options, other_temperature, other_softcap, {})
    if kind == "generalized_jsd":
        return _generalized_jsd(call, 0.5 if beta is None else beta)
    values = _statistics(call)
    call.p.mark_consumed()
    used = [c * x for c, x in zip(KINDS[kind], values, strict=True) if c]
    return call.p.rows.unflatten(sum(used[1:], used[0]))


def _statistics(call: TwoCall) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = DivergenceStatistics.apply(*call.arguments, call.heads, call.p.consume)  # type: ignore[no-untyped-call]
    return found


def _generalized_jsd(call: TwoCall, beta: float) -> Tensor:
    if not 0 < beta < 1:
        raise InvalidCall(f"token_divergence: beta is {beta}, expected a number in (0, 1); 0 is forward_kl and 1 reverse_kl.")

    def rows(x: Tensor, y: Tensor) -> Tensor:
        p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
        # A column without mass in either has no mixture, whose slope would be NaN; it is multiplied by their p and q, which are 0.
        dead = (p == -math.inf) & (q == -math.inf)
        mix = torch.logaddexp(torch.where(dead, 0, p) + math.log1p(-beta), torch.where(dead, 0, q) + math.log(beta))
        both = [torch.where(t == -math.inf, 0, t.exp() * (torch.where(t == -math.inf, 0, t) - mix)).sum(-1) for t in (q, p)]
        return beta * both[0] + (1 - beta) * both[1]

    return per_row("token_divergence", call, rows)


@dataclass(frozen=True)
class DistillationLossOutput:
    """The result of :func:`distillation_loss`; all but ``loss`` are detached, of shape R, 0 where a row is out.

    ``per_token_divergence``: before weights. ``forward_kl``, ``reverse_kl``, ``entropies`` (of the student) and ``teacher_entropies`` come with the same read.
    """

    loss: Tensor
    per_token_divergence: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    entropies: Tensor
    teacher_entropies: Tensor
    plan: str
    backend: str


_LOSS_OWN = (
    "kind",
    "completion_mask",
    "token_weights",
    "num_items_in_batch",
    "loss_scale",
    "plan",
    "teacher_temperature",
    "teacher_softcap",
)


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    completion_mask: Tensor | None = None,
    token_weights: Tensor | float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    plan: str = "auto",
    teacher_temperature: Any = None,
    teacher_softcap: float | None = None,
    **keywords: Unpack[HeadKeywords],
) -> DistillationLossOutput:
    """``loss_scale · Σ_i w_i · D(p_i, q_i) / num_items``: distillation with one read of each tensor and one write of the gradient.

    ``kind`` and the tensors are those of :func:`token_divergence` (``teacher_logits`` is its ``other_logits``); ``token_weights`` w are per row, detached.
    ``num_items_in_batch`` is the final divisor (default: the rows that are in). Hinton's factor T² is the caller's: ``loss_scale=T**2``.

    ``one_pass`` (the default where a gradient is needed) forms the gradient in forward; a second backward raises, ``plan="two_pass"`` keeps the logits.
    ``consume_logits=True`` writes the gradient over the logits: no extra memory.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> out = rw.distillation_loss(logits, torch.tensor([[0.0, -torch.inf]]))
    >>> out.loss.backward()
    >>> logits.grad
    tensor([[-0.5000,  0.5000]])
    """
    op = "distillation_loss"
    options = head_options(op, dict(keywords), _LOSS_OWN)
    if kind not in KINDS:
        raise InvalidCall(f"{op}: kind is {kind!r}, expected one of {', '.join(KINDS)} (token_divergence has generalized_jsd).")
    if plan not in ("auto", "one_pass", "two_pass"):
        raise InvalidCall(f"{op}: plan is {plan!r}, expected one of auto, one_pass, two_pass.")
    named = {"token_weights": token_weights, "num_items_in_batch": num_items_in_batch, "loss_scale": loss_scale}
    call = resolve_two(op, logits, teacher_logits, completion_mask, options, teacher_temperature, teacher_softcap, named)
    rows = call.p.rows
    for name in ("num_items_in_batch", "loss_scale"):
        value = named[name]
        if isinstance(value, Tensor) and value.dim() != 0:
            raise rows.error(f"{name} has shape {tuple(value.shape)}, expected a number or a 0-d tensor.")
    divisor = rows.keep.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    factor = (
        torch.ones(rows.count, dtype=rows.dtype, device=rows.device)
        if token_weights is None
        else rows.per_row("token_weights", token_weights)
    )
    if factor.requires_grad:
        raise rows.error("token_weights require grad; here they are detached. For a gradient: (w * token_divergence(...)).sum().")
    weights = (torch.where(rows.keep, factor, 0) * loss_scale / divisor).contiguous()
    constants = parameter_vector(KINDS[kind][:3], rows.dtype, rows.device)
    one_pass = plan != "two_pass" and call.p.needs_grad
    if one_pass:
        loss, table = OnePassDivergence.apply(*call.arguments, constants, weights, call.heads, call.p.consume)  # type: ignore[no-untyped-call]
        values: tuple[Tensor, ...] = tuple(table[:4].unbind())
    else:
        values = _statistics(call)
        loss = weighted_sum(torch.stack(values[:3]), constants, weights)
    if KINDS[kind][3]:  # the teacher's entropy: no gradient
        loss = loss + KINDS[kind][3] * torch.where(weights == 0, 0, weights * values[3]).sum()
    call.p.mark_consumed()
    shown = [rows.unflatten(x.detach()) for x in values]
    used = [c * x for c, x in zip(KINDS[kind], shown, strict=True) if c]
    forward, reverse, entropy, teacher_entropy = shown
    chosen = "one_pass" if one_pass else "two_pass"
    return DistillationLossOutput(loss, sum(used[1:], used[0]), forward, reverse, entropy, teacher_entropy, chosen, call.heads.backend)
