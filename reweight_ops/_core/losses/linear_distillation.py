"""Divergences and distillation from hidden states. The logits of neither the student
nor the teacher exist as a whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..calls.hidden import resolve_hidden
from ..calls.keywords import (
    HiddenLogits,
    LMHeadKeywords,
    LMHeadOptions,
    SoftmaxOptions,
    TopKLogps,
    parse,
)
from ..calls.sampling_mask import refuse_sampling_mask
from ..calls.top_teacher import resolve_top_teacher
from ..calls.two_hidden import OtherOptions, no_ids, resolve_two_hidden
from ..calls.two_logits import NO_TWO
from ..engine.distillation import (
    DistillationLossOutput,
    DistillationObjective,
    check_kind,
    distillation_weights,
)
from ..engine.linear.source import HiddenSource
from ..engine.linear.two_source import TwoHiddenSource
from ..engine.picks import Picks
from ..engine.run import Call
from ..engine.top_teacher import TopTeacherSource
from ..ranges import FixedOpenUnit, FixedPositiveOrInf, NonNegative, Positive, Scalar
from .distillation import divergence_call
from .explain import public_op


@public_op
def linear_token_divergence(
    hidden: Tensor,
    lm_head_weight: Tensor,
    other: HiddenLogits | TopKLogps | Tensor,
    *,
    kind: str = "forward_kl",
    beta: FixedOpenUnit[float] | None = None,
    completion_mask: Tensor | None = None,
    other_temperature: Positive[Scalar] | None = None,
    other_softcap: FixedPositiveOrInf[float] | None = None,
    **keywords: Unpack[LMHeadKeywords],
) -> Call[Tensor]:
    """:func:`token_divergence` from hidden states, a few rows of both models' logits at
    a time.

    p is the softmax of ``logit_scale · (hidden @ lm_head_weightᵀ + lm_head_bias)`` (the
    policy, the student). q is that of ``other`` (the reference, the teacher), which
    gets no gradient. Every kind gives the same number, with the same gradient, as from
    logits.

    Args:
        hidden, lm_head_weight, lm_head_bias, logit_scale, lora: as in
            :func:`linear_token_logps`, the head of p.
        other: ``HiddenLogits(hidden, lm_head_weight, lm_head_bias=, logit_scale=,
            lora=, logits_dtype=)``, of any width and dtype, all detached; or logits ``R
            + (V,)``, any batch and row stride; or ``TopKLogps(token_ids, logps,
            tail=)`` as in :func:`token_divergence`.
        kind, beta, completion_mask, other_temperature, other_softcap: as in
            :func:`token_divergence`.
        vocab_size: the number of columns of the softmax, if the head is padded beyond
            them. It is needed where the two heads are padded differently.
        chunk_rows: rows a chunk. By default the logits of *both* models take at most 96
            MiB on a CPU and 1.25 GiB on a GPU, or 256 rows.
        memory_budget: bytes of both models' logits, as in :func:`linear_token_logps`.

    Returns:
        R in fp32 (fp64 for fp64 hidden states), with gradients to hidden, weight, bias
        and LoRA factors. Backward recomputes the logits of both models if they were not
        kept.

    Raises:
        InvalidCall: a shape or dtype that does not fit, or a tensor of ``other`` that
            requires grad.

    >>> import torch, reweight_ops as rw
    >>> teacher = rw.HiddenLogits(torch.zeros(1, 3), torch.ones(4, 3))
    >>> student = torch.zeros(1, 2), torch.ones(4, 2)
    >>> rw.linear_token_divergence(*student, teacher, kind="reverse_cross_entropy")
    tensor([1.3863])
    """
    op = "linear_token_divergence"
    own = ("kind", "completion_mask", "other_temperature", "other_softcap", "beta")
    options, head = parse(op, dict(keywords), SoftmaxOptions, LMHeadOptions, own=own)
    beta = check_kind(op, kind, beta)
    of_other = OtherOptions(other_temperature, other_softcap)
    source = _source(
        op, hidden, lm_head_weight, other, completion_mask, beta, (options, head, of_other), {}
    )
    return divergence_call(source, kind)


def _source(
    op: str,
    hidden: Any,
    weight: Any,
    other: Any,
    mask: Any,
    beta: float | None,
    options: tuple[SoftmaxOptions, LMHeadOptions, OtherOptions],
    named: dict[str, Any],
) -> TwoHiddenSource | TopTeacherSource:
    softmax, head, of_other = options
    refuse_sampling_mask(op, softmax, NO_TWO)
    if not isinstance(other, TopKLogps):
        return TwoHiddenSource(
            resolve_two_hidden(op, hidden, weight, other, mask, head, softmax, of_other, named),
            beta,
        )
    p = resolve_hidden(
        op, hidden, weight, no_ids(op, hidden), head, softmax, {"completion_mask": mask, **named}
    )
    teacher = resolve_top_teacher(p.rows, other, of_other, p.settings.softmax.total())
    return TopTeacherSource(
        HiddenSource(p, Picks(teacher.ids, name=f"{of_other.name}.token_ids")), teacher, beta
    )


@public_op
def linear_distillation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    teacher: HiddenLogits | TopKLogps | Tensor,
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
    **keywords: Unpack[LMHeadKeywords],
) -> Call[DistillationLossOutput]:
    """:func:`distillation_loss` from hidden states.

    It is ``loss_scale · Σ_i w_i · D(p_i, q_i) / num_items`` without the logits of
    either model.

    ``kind``, ``beta`` and the two models are those of :func:`linear_token_divergence`
    (``teacher`` is its ``other``). ``token_weights``, ``num_items_in_batch`` and
    ``loss_scale`` are those of :func:`distillation_loss`.

    ``one_pass`` (the default if a gradient is needed) computes every gradient in
    forward, with three GEMMs per chunk for the student and one for the teacher.
    ``two_pass`` recomputes both logits in backward (four and two GEMMs), and supports a
    second backward.

    >>> import torch, reweight_ops as rw
    >>> hidden = torch.zeros(1, 2, requires_grad=True)
    >>> teacher = torch.tensor([[0.0, -torch.inf]])
    >>> out = rw.linear_distillation_loss(hidden, torch.eye(2), teacher)
    >>> out.loss.backward()
    >>> hidden.grad
    tensor([[-0.5000,  0.5000]])
    """
    op = "linear_distillation_loss"
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
    options, head = parse(op, dict(keywords), SoftmaxOptions, LMHeadOptions, own=own)
    beta = check_kind(op, kind, beta)
    of_teacher = OtherOptions(teacher_temperature, teacher_softcap, "teacher")
    source = _source(
        op,
        hidden,
        lm_head_weight,
        teacher,
        completion_mask,
        beta,
        (options, head, of_teacher),
        named,
    )
    weights = distillation_weights(source.rows, token_weights, num_items_in_batch, loss_scale)
    return Call(source, DistillationObjective(kind, source.rows, weights), plan)
