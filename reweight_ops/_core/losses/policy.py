"""The public ops: policy losses from logits or from log-probs, and the differentiable row statistics under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall
from ..calls.keywords import (
    DataKeywords,
    DataOptions,
    HeadKeywords,
    HeadOptions,
    PolicyLossKeywords,
    all_options,
    data_options,
    head_options,
)
from ..calls.logits import LogitsCall, resolve_logits
from ..calls.policy import LossCall, resolve_loss
from ..calls.specs import named_spec
from ..engine.autograd import HeadCall
from ..engine.output import PolicyLossOutput, TokenStats
from ..engine.plan import choose_plan, middle, pick, row_statistics, run, target_of
from ..rows.rows import resolve_rows
from ..spec.policy import PolicyLossSpec

#: Public statistic -> the row statistics it is made of.
_STATS = {
    "logps": ("logp",), "entropies": ("entropy",), "lse": ("lse",), "log_sum_p_sq": ("log_sum_p_sq",),
    "max_logp": ("max_logp",), "is_top1": ("logp", "max_logp"), "log1m_p": ("logp",),
}  # fmt: skip

_POLICY_LOSS_OWN = ("spec", "plan", "differentiable_outputs")


def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool = False,
    **keywords: Unpack[HeadKeywords],
) -> Any:
    """Log-probs of the given ids, and the entropies, both differentiable: ``log_softmax(x)[id]`` and ``-Σ p log p`` with ``x = cap·tanh(z/cap)/T``.

    The primitive for a trainer that keeps its own loss.

    Args:
        logits: ``R + (V,)``, fp16, bf16, fp32 or fp64; any batch and row stride, the last dimension contiguous. The op never shifts.
        completion_ids: R, int32 or int64. ``-100``: the row is out.
        completion_mask: R, any dtype; a row is in iff not 0. Rows that are out are never read, give 0, and get a gradient of exact 0.
        return_entropy: also return the entropies.
        temperature: T, a positive number, a 0-d tensor, or one per row (or sequence).
        softcap: the cap of a tanh soft cap on the raw logits, None for off.
        vocab_size: columns of the softmax if the head is padded beyond them; the others get a gradient of exact 0.
        drop_last: logits have one position more than ids (the last is unread, its gradient 0): the layout without a copy in backward.
        consume_logits: write the gradient over the logits in backward; saves one tensor of their size. Using them afterwards is an error.
        backend: ``"auto"``, or ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``, which then never falls back.

    Returns:
        ``logps`` of shape R in fp32 (fp64 for fp64 logits), or ``(logps, entropies)``.

    Raises:
        InvalidCall: a shape, dtype or id that does not fit (on a GPU a bad id gives NaN in its row, without a synchronisation).
        UnsupportedRequest, BackendUnavailable: nobody, or not the named backend, can run this.

    >>> import torch, reweight_ops as rw
    >>> rw.token_logps(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    options = head_options("token_logps", dict(keywords), ("completion_mask", "return_entropy"))
    call = resolve_logits("token_logps", logits, completion_ids, options, {"completion_mask": completion_mask})
    names = ("logp", "lse", "entropy") if return_entropy else ("logp", "lse")
    stats = row_statistics(call, _head(call), names)
    call.mark_consumed()
    logps = call.rows.unflatten(stats["logp"])
    return (logps, call.rows.unflatten(stats["entropy"])) if return_entropy else logps


def token_stats(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    stats: Sequence[str] = ("logps", "entropies"),
    completion_mask: Tensor | None = None,
    **keywords: Unpack[HeadKeywords],
) -> TokenStats:
    """Statistics of every row in one read of the logits; see :class:`TokenStats` for the names, :func:`token_logps` for the arguments.

    ``logps``, ``entropies`` and ``lse`` are differentiable; ``log_sum_p_sq``, ``max_logp``, ``is_top1`` and ``log1m_p`` are not.

    >>> import torch, reweight_ops as rw
    >>> rw.token_stats(torch.zeros(1, 4), torch.tensor([2]), stats=("log_sum_p_sq",)).log_sum_p_sq
    tensor([-1.3863])
    """
    options = head_options("token_stats", dict(keywords), ("completion_mask", "stats"))
    wrong = [name for name in stats if name not in _STATS]
    if wrong or not stats or isinstance(stats, str):
        raise InvalidCall(f"token_stats: stats is {stats!r}; expected some of {', '.join(_STATS)}.")
    call = resolve_logits("token_stats", logits, completion_ids, options, {"completion_mask": completion_mask})
    needed = {part for name in stats for part in _STATS[name]} | {"logp", "lse"}
    found = row_statistics(
        call, _head(call), tuple(name for name in ("logp", "lse", "entropy", "log_sum_p_sq", "max_logp") if name in needed)
    )
    call.mark_consumed()
    keep = call.rows.keep
    values = {"logps": found["logp"], "lse": found["lse"], "entropies": found.get("entropy")}
    values["log_sum_p_sq"] = found["log_sum_p_sq"].detach() if "log_sum_p_sq" in found else None
    values["max_logp"] = found.get("max_logp")
    logp = found["logp"].detach()
    values["is_top1"] = (logp >= found["max_logp"]) & keep if "is_top1" in stats else None
    values["log1m_p"] = torch.where(keep, _log1mexp(logp), 0) if "log1m_p" in stats else None
    return TokenStats(**{name: call.rows.unflatten(v) for name, v in values.items() if name in stats and v is not None})


def _log1mexp(logp: Tensor) -> Tensor:
    return torch.where(logp > -math.log(2), torch.log(-torch.expm1(logp)), torch.log1p(-logp.exp()))


def _head(call: LogitsCall) -> HeadCall:
    choice = pick(call.logits.device, call.logits.dtype, call.backend, None)
    return HeadCall(call.vocab_size, call.softcap, call.drop_last, choice.backend, call.consume)


def policy_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    plan: str = "auto",
    differentiable_outputs: bool = False,
    **keywords: Unpack[PolicyLossKeywords],
) -> PolicyLossOutput:
    """A reweighted policy loss from logits, ``loss_scale · Σ_k coef_k · Σ_i w_ki · u_ki · ℓ_k(row i)``, and its gradient.

    Per-row arguments have exactly one of the shapes R (token), ``R[:-1]`` or ``R[:-1] + (1,)`` (sequence; with ``cu_seqlens`` ``[S]`` or
    ``[S, 1]``), or are a number. Log-probs are fp32 or fp64 and detached.

    Args:
        logits, completion_ids, completion_mask, temperature, softcap, vocab_size, drop_last, backend: as in :func:`token_logps`.
        advantages: per row; None only if the spec does not read it.
        spec: a :class:`PolicyLossSpec` or a method's name.
        plan: ``"auto"``, ``"one_pass"`` (gradient in forward, one read and one write per logit) or ``"two_pass"`` (everything else).
        differentiable_outputs: put ``per_token_logps`` and ``entropies`` into the graph; selects two_pass.
        denominator_mask: which rows count in denominators only (default: the effective mask).
        cu_seqlens: ``[S + 1]``, packed rows; or ``sequence_ids`` with ``num_sequences``; else one sequence per last dimension.
        segment_ids: sub-sequence segments, for :class:`SegmentRatio`.
        group_ids, num_groups: ``[S]``, which prompt each sequence answers, for :class:`GroupContrast`.
        old_per_token_logps: of the behaviour policy; None: on-policy (ratio 1, gradient kept).
        ref_per_token_logps: of the reference policy, if a penalty reads it.
        sampling_per_token_logps: of the sampler, if a weight reads it.
        importance_sampling_ratio, token_weights: detached factors on the surrogate only, already clipped by the caller.
        num_items_in_batch: the final divisor of this call's sum. DDP and FSDP average gradients, so pass total / world_size.
        num_sequences_in_batch: the same for a mean over sequences.
        loss_scale: multiplies loss and gradient before any rounding (GradScaler's scale, 1/accumulation steps); metrics stay unscaled.
        validate: check ids even on a GPU, which waits for it.
        consume_logits: overwrite the logits with their gradient: no extra memory. Using them afterwards is an error.

    Raises:
        InvalidCall, UnsupportedRequest, BackendUnavailable; TypeError for an unknown keyword.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
    >>> out = rw.policy_loss(logits, torch.tensor([[1, 2]]), torch.tensor([1.0]), spec="grpo")
    >>> out.loss
    tensor(-1., grad_fn=<...>)
    >>> out.loss.backward()
    """
    options, data = all_options("policy_loss", dict(keywords), _POLICY_LOSS_OWN)
    call, head = _resolve(logits, completion_ids, advantages, spec, options, data)
    return run(call, head, choose_plan(call, target_of(head), plan, differentiable_outputs), differentiable_outputs)


def _resolve(
    logits: Any, completion_ids: Any, advantages: Any, spec: Any, options: HeadOptions, data: DataOptions
) -> tuple[LossCall, LogitsCall]:
    named = data.named()
    head = resolve_logits("policy_loss", logits, completion_ids, options, {"advantages": advantages, **named}, data.validate)
    return resolve_loss(head.rows, advantages, named_spec("policy_loss", spec), data), head


def policy_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor | float | None,
    *,
    spec: PolicyLossSpec | str,
    entropies: Tensor | None = None,
    log_sum_p_sq: Tensor | None = None,
    **keywords: Unpack[DataKeywords],
) -> PolicyLossOutput:
    """The middle of two_pass alone, for trainers that have log-probs already (verl, prime-rl, OpenRLHF): exact autograd to
    ``per_token_logps`` (R, fp32 or fp64) and to ``entropies`` and ``log_sum_p_sq`` where the spec reads them. Other arguments as in
    :func:`policy_loss`.

    >>> import torch, reweight_ops as rw
    >>> logps = torch.full((1, 2), -1.0, requires_grad=True)
    >>> rw.policy_loss_from_logps(logps, torch.tensor([0.5]), spec="reinforce").loss
    tensor(0.5000, grad_fn=<...>)
    """
    op = "policy_loss_from_logps"
    data = data_options(op, dict(keywords), ("spec", "entropies", "log_sum_p_sq"))
    tensors = {
        "per_token_logps": per_token_logps,
        "advantages": advantages,
        "entropies": entropies,
        "log_sum_p_sq": log_sum_p_sq,
        **data.named(),
    }
    if not isinstance(per_token_logps, Tensor) or per_token_logps.dtype not in (torch.float32, torch.float64):
        got = per_token_logps.dtype if isinstance(per_token_logps, Tensor) else type(per_token_logps).__name__
        raise InvalidCall(f"{op}: per_token_logps is {got}, expected fp32 or fp64 log-probs (.float()).")
    rows = resolve_rows(op, tuple(per_token_logps.shape), per_token_logps.device, per_token_logps.dtype, tensors)
    call = resolve_loss(rows, advantages, named_spec(op, spec), data)
    leaves = {}
    for name, argument, value in (
        ("logp", "per_token_logps", per_token_logps),
        ("entropy", "entropies", entropies),
        ("log_sum_p_sq", "log_sum_p_sq", log_sum_p_sq),
    ):
        if value is not None:
            if tuple(value.shape) != rows.shape:
                raise rows.error(f"{argument} has shape {tuple(value.shape)}, expected {rows.shape}.")
            leaves[name] = torch.where(rows.keep, value.reshape(-1).to(rows.dtype), 0)
        elif name in call.spec.requires:
            raise rows.error(f"the spec reads {name}: pass {argument}.")
    return middle(call, leaves, "torch", differentiable_outputs=False)
