"""The public ops of pair losses: from logits, from hidden states, from log-probs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall, UnsupportedRequest
from ..calls.hidden import resolve_hidden
from ..calls.keywords import (
    LMHeadKeywords,
    LMHeadOptions,
    PairKeywords,
    PairOptions,
    SoftmaxKeywords,
    SoftmaxOptions,
    parse,
)
from ..calls.logits import resolve_logits
from ..calls.logps import resolve_logps
from ..calls.specs import named_pair_spec
from ..calls.two_logits import resolve_two_logits
from ..engine.linear.source import HiddenSource
from ..engine.pairs import PairObjective, PreferenceLossOutput, resolve_pairs
from ..engine.run import Call
from ..engine.sources import JoinedSource, LogitsSource, LogpsSource, TwoLogitsSource
from ..rows.pairs import from_first_difference
from ..spec.pairs import PairSpec
from .explain import public_op


class PreferenceKeywords(PairKeywords, SoftmaxKeywords, total=False):
    """The keywords of a pair loss from logits."""


class LinearPreferenceKeywords(PairKeywords, LMHeadKeywords, total=False):
    """The keywords of a pair loss from hidden states."""


@public_op
def preference_loss(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    spec: PairSpec | str,
    **keywords: Unpack[PreferenceKeywords],
) -> Call[PreferenceLossOutput]:
    """A loss of pairs of completions from logits, and its gradient.

    The loss is ``loss_scale · mean_i w_i · Σ_k coef_k · ℓ_k(pair i)``.

    Every backend reads the logits twice and writes their gradient once
    (:func:`token_logps`). In between there are only ``[S]`` vectors in torch.

    Args:
        logits, completion_ids, temperature, softcap, vocab_size, drop_last,
            consume_logits, backend: as in :func:`token_logps`.
        spec: a :class:`PairSpec` or the name of a pair loss. If the loss has arguments
            without a default, it is a call: ``rw.preference.inpo(...)``.
        completion_mask: R; 0 marks an ignored row. A pair is ignored iff both its
            sequences are, and then it counts in no mean.
        pairs: ``"halves"`` (TRL: all chosen sequences, then all rejected) or
            ``"interleaved"`` (chosen, rejected, chosen, ...).
        cu_seqlens: ``[S + 1]``, packed rows; or ``sequence_ids`` with
            ``num_sequences``; else one sequence per last dimension.
        ref_per_token_logps: R, log-probs of the reference model; fp32 or fp64,
            detached.
        ref_sequence_logps: ``[S]``, instead of these: already summed as the spec's
            score sums them.
        old_per_token_logps: R, log-probs of the policy that sampled the pairs (INPO);
            or ``old_sequence_logps``.
        ref_logits: a second logits tensor of the shape of ``logits``, for a spec that
            reads KL(π_ref‖π) (SparsePO): one read of each.
        num_pairs_in_batch: the final divisor of this call's sum, instead of its number
            of pairs.
        loss_scale: multiplies loss and gradient before any rounding.

    Raises:
        InvalidCall: a shape or dtype that does not fit, a missing input that the spec
            needs, or an input that it does not read.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
    >>> ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    >>> ref = torch.tensor([-5.0, -4.0])
    >>> out = rw.preference_loss(logits, ids, spec="dpo", ref_sequence_logps=ref)
    >>> out.loss
    tensor(0.6444, grad_fn=<...>)
    """
    op = "preference_loss"
    softmax, options = parse(op, dict(keywords), SoftmaxOptions, PairOptions, own=("spec",))
    spec = named_pair_spec(op, spec)
    tensors = {**options.named(), "completion_mask": _mask(op, spec, options, completion_ids)}
    resolved = resolve_logits(op, logits, completion_ids, softmax, tensors, options.validate)
    rows, source = resolved.rows, LogitsSource(resolved)
    objective = PairObjective(resolve_pairs(rows, spec, options))
    if options.ref_logits is None:
        return Call(source, objective)
    if resolved.consume:
        raise rows.error(
            "consume_logits=True and ref_logits exclude each other: two backward passes read "
            "the logits."
        )
    keep = rows.unflatten(rows.keep)
    both = resolve_two_logits(
        op, logits, options.ref_logits, keep, softmax, softmax.temperature, softmax.softcap, {}
    )
    return Call(JoinedSource(source, TwoLogitsSource(both)), objective)


@public_op
def preference_loss_from_logps(
    per_token_logps: Tensor,
    *,
    spec: PairSpec | str,
    completion_ids: Tensor | None = None,
    log_sum_p_sq: Tensor | None = None,
    **keywords: Unpack[PairKeywords],
) -> Call[PreferenceLossOutput]:
    """A loss of pairs from log-probs, for trainers that have them already.

    It is exact under autograd to ``per_token_logps`` (R, fp32 or fp64) and to
    ``per_token_kl``.

    The other arguments are those of :func:`preference_loss`.

    Args:
        completion_ids: R, only for specs that read where a pair first differs.
        log_sum_p_sq: R, for WPO.

    >>> import torch, reweight_ops as rw
    >>> logps = torch.tensor([[-1.0, -2.0], [-2.0, -3.0]], requires_grad=True)
    >>> ref = torch.tensor([-4.0, -4.0])
    >>> rw.preference_loss_from_logps(logps, spec="dpo", ref_sequence_logps=ref).loss
    tensor(0.5981, grad_fn=<...>)
    """
    op = "preference_loss_from_logps"
    (options,) = parse(
        op, dict(keywords), PairOptions, own=("spec", "completion_ids", "log_sum_p_sq")
    )
    if options.ref_logits is not None:
        raise InvalidCall(
            f"{op}: ref_logits needs the policy's logits; pass per_token_kl=token_divergence(...)."
        )
    spec = named_pair_spec(op, spec)
    tensors = {**options.named(), "completion_mask": _mask(op, spec, options, completion_ids)}
    rows = resolve_logps(op, per_token_logps, tensors, options.validate)
    call = resolve_pairs(rows, spec, options)
    given = {"logp": per_token_logps.reshape(-1)}
    if ("log_sum_p_sq" in spec.requires) != (log_sum_p_sq is not None):
        raise rows.error(
            "the spec reads log_sum_p_sq: pass it."
            if log_sum_p_sq is None
            else "the spec does not read log_sum_p_sq."
        )
    if log_sum_p_sq is not None:
        given["log_sum_p_sq"] = rows.flatten_per_token("log_sum_p_sq", log_sum_p_sq)
    return Call(LogpsSource(rows, given), PairObjective(call))


@public_op
def linear_preference_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    spec: PairSpec | str,
    **keywords: Unpack[LinearPreferenceKeywords],
) -> Call[PreferenceLossOutput]:
    """:func:`preference_loss` from hidden states, a few rows of logits at a time.

    The head arguments are those of :func:`linear_token_logps`.

    >>> import torch, reweight_ops as rw
    >>> hidden = torch.zeros(2, 3, 5, requires_grad=True)
    >>> ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    >>> head, ref = torch.ones(4, 5), {"ref_sequence_logps": torch.tensor([-5.0, -4.0])}
    >>> out = rw.linear_preference_loss(hidden, head, ids, spec="dpo", **ref)
    >>> out.loss
    tensor(0.6444, grad_fn=<...>)
    """
    op = "linear_preference_loss"
    softmax, options, head = parse(
        op, dict(keywords), SoftmaxOptions, PairOptions, LMHeadOptions, own=("spec",)
    )
    spec = named_pair_spec(op, spec)
    if options.ref_logits is not None:
        raise UnsupportedRequest(
            f"{op}: this op avoids logits as a whole, such as ref_logits; pass per_token_kl."
        )
    tensors = {**options.named(), "completion_mask": _mask(op, spec, options, completion_ids)}
    resolved = resolve_hidden(
        op, hidden, lm_head_weight, completion_ids, head, softmax, tensors, options.validate
    )
    return Call(HiddenSource(resolved), PairObjective(resolve_pairs(resolved.rows, spec, options)))


def _mask(op: str, spec: PairSpec, options: PairOptions, completion_ids: Any) -> Any:
    """Return the completion mask that the spec makes of the caller's."""
    if spec.tokens == "completion":
        if completion_ids is not None and op.endswith("_from_logps"):
            raise InvalidCall(
                f"{op}: completion_ids would have no effect: the spec's tokens are 'completion'. "
                "Leave it out, and mask ignored tokens with completion_mask."
            )
        return options.completion_mask
    if options.cu_seqlens is not None or options.sequence_ids is not None:
        raise InvalidCall(
            f"{op}: tokens='from_first_difference' compares columns: pass [B, T] tensors, not "
            "packed rows."
        )
    if not isinstance(completion_ids, Tensor):
        raise InvalidCall(f"{op}: tokens='from_first_difference' needs completion_ids.")
    return from_first_difference(completion_ids, options.completion_mask, pairs=options.pairs)
