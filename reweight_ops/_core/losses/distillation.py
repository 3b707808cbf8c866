"""The public ops on two logits tensors: per-token divergences with a gradient, and the
distillation loss in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall
from ..calls.keywords import SoftmaxKeywords, SoftmaxOptions, TopKLogps, parse
from ..calls.logits import resolve_logits
from ..calls.sampling_mask import refuse_sampling_mask
from ..calls.top_teacher import resolve_top_teacher
from ..calls.two_hidden import OtherOptions
from ..calls.two_logits import NO_TWO, resolve_two_logits
from ..catalogue.registry import published
from ..engine.chunked_rows import formula_call
from ..engine.distillation import (
    GENERALIZED_JSD,
    KINDS,
    STATISTICS,
    DistillationLossOutput,
    DistillationObjective,
    check_kind,
    distillation_weights,
    divergence_of,
)
from ..engine.jsd_source import JsdSource, jsd_rows
from ..engine.picks import Picks
from ..engine.run import Call
from ..engine.source import Source
from ..engine.sources import LogitsSource, TwoLogitsSource
from ..engine.statistics import StatisticsObjective
from ..engine.top_teacher import TopTeacherSource
from ..ranges import FixedOpenUnit, FixedPositiveOrInf, NonNegative, Positive, Scalar
from .explain import public_op


@published(
    "Full-vocabulary KL to a reference or teacher",
    kind="divergence",
    level="token",
    plan="two passes",
    arxiv="1503.02531",
    certainty="verified",
)
@public_op
def token_divergence(
    logits: Tensor,
    other_logits: Tensor | TopKLogps,
    *,
    kind: str = "forward_kl",
    beta: FixedOpenUnit[float] | None = None,
    completion_mask: Tensor | None = None,
    other_temperature: Positive[Scalar] | None = None,
    other_softcap: FixedPositiveOrInf[float] | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Call[Tensor]:
    """The divergence of two next-token distributions over the whole vocabulary, per
    token.

    It has a gradient to ``logits``.

    With p the softmax of ``logits`` (the policy, the student) and q that of
    ``other_logits`` (the reference, the teacher; detached)::

        forward_kl             KL(q‖p) = Σ q·(log q - log p)
                               gradient 1/T·(p - q)
        reverse_kl             KL(p‖q) = Σ p·(log p - log q)
                               gradient 1/T·p·(log p - log q - KL)
        jeffreys               their sum
        cross_entropy          H(q, p) = -Σ q·log p
        reverse_cross_entropy  H(p, q)
        symmetric_cross_entropy
                               half of each
        generalized_jsd        β·KL(q‖m) + (1-β)·KL(p‖m), m = β·q + (1-β)·p: Agarwal
                               et al. 2023, arXiv:2306.13649 (a composite in chunks)

    Forward reads each tensor once. Backward reads each once more and writes once.
    KL(q‖p) is ``inf`` iff a column has p = 0 (a ``-inf`` logit) and q > 0. KL(p‖q) is
    ``inf`` iff a column has q = 0 and p > 0, and its gradient is then NaN in that row.
    ``0·log 0 = 0``. A column with p = 0 has gradient 0.

    Args:
        other_logits: the same rows, any of fp16, bf16 and fp32 beside any other (fp64
            beside fp64); or ``TopKLogps(token_ids, logps, tail=)``, a teacher's stored
            log-probs of K ids: the divergence of what those leave of both
            distributions, from K logits and one log-sum-exp of p.
        completion_mask: R. Ignored rows are never read. Their result is 0, and their
            gradient is exactly 0.
        kind: one of the kinds above.
        beta: of ``generalized_jsd`` only. The default is 0.5 (0 would be forward_kl,
            and 1 reverse_kl).
        other_temperature: the temperature of q; default: that of p.
        other_softcap: the soft cap of the logits of q; default: none.
        vocab_size: the number of columns of the softmax, if the head is padded beyond
            them. It is needed where the two heads are padded differently.
        logits, temperature, softcap, drop_last, consume_logits, backend: as in
            :func:`token_logps`.

    Returns:
        R in fp32 (fp64 for fp64 logits).

    >>> import torch, reweight_ops as rw
    >>> rw.token_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.6931])
    """
    op = "token_divergence"
    own = ("kind", "completion_mask", "other_temperature", "other_softcap", "beta")
    (options,) = parse(op, dict(keywords), SoftmaxOptions, own=own)
    beta = check_kind(op, kind, beta)
    if isinstance(other_logits, TopKLogps):
        of_other = OtherOptions(other_temperature, other_softcap)
        source = _top_teacher(
            op, logits, other_logits, beta, options, of_other, {"completion_mask": completion_mask}
        )
        return divergence_call(source, kind)
    both = TwoLogitsSource(
        resolve_two_logits(
            op, logits, other_logits, completion_mask, options, other_temperature, other_softcap, {}
        )
    )
    if beta is None:
        return divergence_call(both, kind)
    return (
        divergence_call(JsdSource(both, beta), kind)
        if both.both.p.shard is not None
        else formula_call(jsd_rows(both, beta))
    )


def divergence_call(source: Source, kind: str) -> Call[Tensor]:
    """Return the call of an op that returns the divergence of that kind per token."""
    reads = STATISTICS if kind in KINDS else (*STATISTICS, GENERALIZED_JSD)
    return Call(
        source,
        StatisticsObjective(
            reads,
            lambda found: source.rows.unflatten(
                divergence_of(kind, tuple(found[name] for name in reads))
            ),
        ),
    )


def _top_teacher(
    op: str,
    logits: Any,
    given: TopKLogps,
    beta: float | None,
    options: SoftmaxOptions,
    of_other: OtherOptions,
    named: dict[str, Any],
) -> TopTeacherSource:
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise InvalidCall(f"{op}: logits must be a tensor R + (V,).")
    refuse_sampling_mask(op, options, NO_TWO)
    *batch, positions = logits.shape[:-1]
    ids = torch.zeros(
        *batch, positions - int(options.drop_last), dtype=torch.int64, device=logits.device
    )
    p = resolve_logits(op, logits, ids, options, named)
    teacher = resolve_top_teacher(p.rows, given, of_other, p.softmax.total())
    return TopTeacherSource(
        LogitsSource(p, Picks(teacher.ids, name=f"{of_other.name}.token_ids")), teacher, beta
    )


@public_op
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | TopKLogps,
    *,
    kind: str = "forward_kl",
    beta: FixedOpenUnit[float] | None = None,
    completion_mask: Tensor | None = None,
    token_weights: Tensor | float | None = None,
    num_items_in_batch: NonNegative[float | Tensor] | None = None,
    loss_scale: NonNegative[float | Tensor] = 1.0,
    plan: str = "auto",
    teacher_temperature: Positive[Scalar] | None = None,
    teacher_softcap: FixedPositiveOrInf[float] | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Call[DistillationLossOutput]:
    """The distillation loss ``loss_scale · Σ_i w_i · D(p_i, q_i) / num_items``.

    It reads each tensor once and writes the gradient once.

    ``kind``, ``beta`` and the tensors are those of :func:`token_divergence`
    (``teacher_logits`` is its ``other_logits``). The caller applies Hinton's factor T²:
    ``loss_scale=T**2``.

    ``one_pass`` (the default if a gradient is needed) computes the gradient in forward.
    A second backward raises; ``plan="two_pass"`` keeps the logits for it.
    ``consume_logits=True`` writes the gradient over the logits and needs no extra
    memory. ``generalized_jsd`` and a teacher of ``TopKLogps`` take two passes.

    Args:
        token_weights: the factor w of each row, detached.
        num_items_in_batch: the final divisor; default: the number of valid rows.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> out = rw.distillation_loss(logits, torch.tensor([[0.0, -torch.inf]]))
    >>> out.loss.backward()
    >>> logits.grad
    tensor([[-0.5000,  0.5000]])
    """
    op = "distillation_loss"
    named = {
        "token_weights": token_weights,
        "num_items_in_batch": num_items_in_batch,
        "loss_scale": loss_scale,
    }
    own = (
        "kind",
        "beta",
        "completion_mask",
        *named,
        "plan",
        "teacher_temperature",
        "teacher_softcap",
    )
    (options,) = parse(op, dict(keywords), SoftmaxOptions, own=own)
    beta = check_kind(op, kind, beta)
    source: TopTeacherSource | TwoLogitsSource | JsdSource
    if isinstance(teacher_logits, TopKLogps):
        of_teacher = OtherOptions(teacher_temperature, teacher_softcap, "teacher")
        source = _top_teacher(
            op,
            logits,
            teacher_logits,
            beta,
            options,
            of_teacher,
            {"completion_mask": completion_mask, **named},
        )
    else:
        both = resolve_two_logits(
            op,
            logits,
            teacher_logits,
            completion_mask,
            options,
            teacher_temperature,
            teacher_softcap,
            named,
        )
        source = TwoLogitsSource(both) if beta is None else JsdSource(TwoLogitsSource(both), beta)
    weights = distillation_weights(source.rows, token_weights, num_items_in_batch, loss_scale)
    return Call(source, DistillationObjective(kind, source.rows, weights), plan)
