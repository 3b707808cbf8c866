"""The public ops from hidden states. They give the same numbers as from logits, which
never exist as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from ..calls.hidden import resolve_hidden
from ..calls.keywords import (
    LinearPolicyLossKeywords,
    LMHeadKeywords,
    LMHeadOptions,
    PolicyOptions,
    SoftmaxOptions,
    Teacher,
    TopKLogps,
    check_flag,
    parse,
)
from ..calls.policy import resolve_loss
from ..calls.sampling_mask import refuse_sampling_mask
from ..calls.specs import named_spec
from ..calls.two_hidden import OtherOptions, beside
from ..calls.two_logits import NO_TWO
from ..engine.distillation import DistillationObjective, check_kind
from ..engine.linear.source import HiddenSource
from ..engine.linear.taught_source import TaughtSource
from ..engine.linear.two_source import TwoHiddenSource
from ..engine.output import PolicyLossOutput, TokenStats
from ..engine.policy import PolicyObjective
from ..engine.run import Call
from ..engine.taught import TaughtObjective
from ..ranges import Count
from ..rows.rows import Rows
from ..spec.policy import PolicyLossSpec
from .explain import public_op
from .statistics import check_stats, logps_call, resolve_picks, stats_call


@overload
def linear_token_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: Literal[False] = False,
    **keywords: Unpack[LMHeadKeywords],
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: Literal[True],
    **keywords: Unpack[LMHeadKeywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_token_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool,
    **keywords: Unpack[LMHeadKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...


@public_op
def linear_token_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool = False,
    **keywords: Unpack[LMHeadKeywords],
) -> Call[Tensor | tuple[Tensor, Tensor]]:
    """:func:`token_logps` from hidden states, a few rows of logits at a time.

    The logits are ``logit_scale · (hidden @ lm_head_weightᵀ + lm_head_bias)``.

    Args:
        hidden: ``R + (D,)``, the hidden states before the head.
        lm_head_weight: ``[V, D]`` in the same dtype (or under autocast, which casts as
            ``F.linear`` does).
        completion_ids, completion_mask, return_entropy, temperature, softcap,
            vocab_size, sampling_mask, entropy_over, backend: as in :func:`token_logps`.
        lm_head_bias: ``[V]``.
        logit_scale: a positive factor of the logits, before the soft cap.
        logits_dtype: dtype of a chunk's logits (default: hidden's). ``torch.float32``
            from 16-bit operands rounds once less.
        accumulate_dtype: dtype in which the weight's gradient is summed over chunks.
            The default is the weight's dtype if that is fp32 (also under autocast), or
            if there are at most 8 chunks, each of which rounds the sum once. Otherwise
            it is fp32, rounded once, and takes a buffer of the weight's size.
        chunk_rows: rows a chunk; default: multiples of 64, at most 96 MiB of logits on
            a CPU and 1.25 GiB on a GPU, or 256 rows.
        memory_budget: bytes of logits. It bounds a chunk. The rest of it keeps chunks
            for backward, which are then not recomputed. Default: one chunk.
        lora: ``Lora(a, b, scale)``, a low-rank term of the head.
        row_index: ``[M]`` int64, flat positions of the rows to compute, each once. The
            host knows them, so nothing waits. They must include the valid rows (checked
            on a CPU, and with ``validate=True``).
        compact_rows: drop the ignored rows before the first GEMM, and rows without a
            coefficient from the backward ones. On a CPU it costs nothing and is the
            default. On a GPU it waits: once for the rows, and in backward once
            (one_pass: in forward, once a chunk); off by default, and under CUDA-graph
            capture.

    Gradients go to hidden, weight, bias and the LoRA factors that require them. Any
    upstream gradient is allowed, per row too. Backward recomputes the logits of the
    chunks that were not kept (one more GEMM). For one ``chunk_rows`` the results of a
    row are the same bits at any position, because the last chunk is padded.

    >>> import torch, reweight_ops as rw
    >>> rw.linear_token_logps(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    op = "linear_token_logps"
    check_flag(op, "return_entropy", return_entropy)
    options, head = parse(
        op, dict(keywords), SoftmaxOptions, LMHeadOptions, own=("completion_mask", "return_entropy")
    )
    named = {"completion_mask": completion_mask}
    return logps_call(
        HiddenSource(
            resolve_hidden(op, hidden, lm_head_weight, completion_ids, head, options, named)
        ),
        return_entropy,
    )


@public_op
def linear_token_stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    stats: Sequence[str] = ("logps", "entropies"),
    selected_ids: Tensor | None = None,
    top_k: Count[int] | None = None,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[LMHeadKeywords],
) -> Call[TokenStats]:
    """:func:`token_stats` from hidden states, a few rows of logits at a time.

    The names and gradients are the same, and one set of GEMMs serves all.

    The other arguments are those of :func:`linear_token_logps`.

    >>> import torch, reweight_ops as rw
    >>> hidden, head, ids = torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2])
    >>> out = rw.linear_token_stats(hidden, head, ids, stats=("log_sum_p_sq",))
    >>> out.log_sum_p_sq
    tensor([-1.3863])
    """
    op = "linear_token_stats"
    options, head = parse(
        op,
        dict(keywords),
        SoftmaxOptions,
        LMHeadOptions,
        own=("completion_mask", "stats", "selected_ids", "top_k"),
    )
    check_stats(op, stats, selected_ids=selected_ids, top_k=top_k)
    named = {"completion_mask": completion_mask, "selected_ids": selected_ids}
    resolved = resolve_hidden(op, hidden, lm_head_weight, completion_ids, head, options, named)
    picks = resolve_picks(resolved.rows, selected_ids, top_k, resolved.settings.softmax.total())
    return stats_call(HiddenSource(resolved, picks), stats, picks)


@public_op
def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    plan: str = "auto",
    differentiable_outputs: bool = False,
    teacher: Teacher | None = None,
    **keywords: Unpack[LinearPolicyLossKeywords],
) -> Call[PolicyLossOutput]:
    """:func:`policy_loss` from hidden states.

    It takes the arguments of :func:`linear_token_logps` and of :func:`policy_loss`.

    ``one_pass`` computes every gradient in forward with three GEMMs per chunk.
    ``two_pass`` recomputes the logits in backward (four GEMMs).

    ``teacher=Teacher(HiddenLogits(...) or logits, coef, kind="reverse_kl")`` adds
    ``coef · Σ_i w_i · D(p_i, q_i)``, a divergence over the whole vocabulary in the same
    chunks. w are the row weights of the spec's reduction. They include
    ``num_items_in_batch`` and ``loss_scale``, but not ``token_weights``. In both plans
    the result is the sum of this loss and :func:`linear_distillation_loss`, but the
    policy's logits are computed only once. The budget of a chunk is then for the logits
    of both models. Both gradients are computed in fp32 a few rows at a time, and their
    sum is rounded once. ``out.teacher`` has the divergences.

    Args:
        teacher: a :class:`Teacher`, whose term is added to the loss.

    >>> import torch, reweight_ops as rw
    >>> hidden = torch.zeros(1, 2, 3, requires_grad=True)
    >>> ids = torch.tensor([[1, 2]])
    >>> rw.linear_policy_loss(hidden, torch.ones(4, 3), ids, 1.0, spec="grpo").loss
    tensor(-1., grad_fn=<...>)
    """
    op = "linear_policy_loss"
    own = ("spec", "plan", "differentiable_outputs", "teacher")
    check_flag(op, "differentiable_outputs", differentiable_outputs)
    options, data, head = parse(
        op, dict(keywords), SoftmaxOptions, PolicyOptions, LMHeadOptions, own=own
    )
    named = {"advantages": advantages, **data.named()}
    resolved = resolve_hidden(
        op, hidden, lm_head_weight, completion_ids, head, options, named, data.validate
    )
    call = resolve_loss(resolved.rows, advantages, named_spec(op, spec), data)
    objective = PolicyObjective(call, differentiable_outputs)
    if teacher is None:
        return Call(HiddenSource(resolved), objective, plan)
    refuse_sampling_mask(op, options, NO_TWO)
    beta = check_teacher(resolved.rows, teacher)
    of_teacher = OtherOptions(teacher.temperature, teacher.softcap, "teacher")
    keep = resolved.rows.unflatten(resolved.rows.keep)
    both = beside(
        resolved, {**named, "hidden": hidden}, teacher.logits, keep, head, options, of_teacher
    )
    weights = (teacher.coef * call.reduction_weights()).to(resolved.rows.dtype)
    taught = TaughtObjective(objective, DistillationObjective(teacher.kind, resolved.rows, weights))
    return Call(TaughtSource(TwoHiddenSource(both, beta)), taught, plan)


def check_teacher(rows: Rows, teacher: Any) -> float | None:
    """Return the ``beta`` of a teacher's term, None for kinds without one. Raises for
    an invalid term.
    """
    if not isinstance(teacher, Teacher):
        raise rows.error(
            f"teacher is a {type(teacher).__name__}, expected a Teacher(logits, coef)."
        )
    if isinstance(teacher.logits, TopKLogps):
        raise rows.error(
            "teacher.logits is a TopKLogps: add linear_distillation_loss(...).loss, which reads "
            "only a few of the policy's logits."
        )
    coef = teacher.coef
    if isinstance(coef, Tensor) and (coef.dim() != 0 or coef.requires_grad):
        raise rows.error(
            "teacher.coef must be a number, or a 0-d tensor that does not require grad."
        )
    if not isinstance(coef, Tensor) and not 0 <= coef < math.inf:
        raise rows.error(f"teacher.coef is {coef}, expected a number in [0, inf).")
    return check_kind(rows.op, teacher.kind, teacher.beta)
