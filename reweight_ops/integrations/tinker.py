"""Tinker's custom losses: a spec as the per-datum function that
``ServiceClient.create_custom_loss`` traces. Imports no Tinker.

::

    loss = custom_loss(rw.methods.advantage_reweighting(alpha=0.3))
    handle = service_client.create_custom_loss(
        loss, input_ranks=loss.input_ranks
    ).result()
    # a datum's loss_fn_inputs["weights"], ["advantages"], ["old_logprobs"]
    weights = token_weights(spec, masks)
    training_client.forward_backward_custom(data, handle)

Tinker runs the loss on the machine of the model, on the log-probs of one datum. It uses
the formulas of the catalogue and none of our kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.calls.specs import named_spec
from .._core.formula.leaves import Leaves, safe_where
from .._core.rows.resolve import resolve_rows
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import Divisors
from ..errors import UnsupportedRequest
from .trainers import check_version

check_version("Tinker")

#: The keys in a datum's ``loss_fn_inputs`` for the leaves that formulas read. Tinker
#: passes ``logprobs``, the current ones.
INPUTS = {
    "adv": "advantages",
    "old_logp": "old_logprobs",
    "ref_logp": "ref_logprobs",
    "sampling_logp": "sampling_logprobs",
}


class _Traceable:
    """``xp`` in functions of torch that fx records: its values are proxies, whose type
    says nothing.
    """

    exp, expm1, log, log1p, sigmoid, tanh, abs = (
        staticmethod(f)
        for f in (
            torch.exp,
            torch.expm1,
            torch.log,
            torch.log1p,
            torch.sigmoid,
            torch.tanh,
            torch.abs,
        )
    )
    where = staticmethod(torch.where)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return torch.clamp(a, max=b) if isinstance(b, (int, float)) else torch.minimum(a, b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return torch.clamp(a, min=b) if isinstance(b, (int, float)) else torch.maximum(a, b)

    @staticmethod
    def clip(x: Any, low: Any, high: Any) -> Any:
        return torch.clamp(x, min=low, max=high)

    @staticmethod
    def stop_gradient(x: Any) -> Any:
        return x if isinstance(x, (int, float)) else x.detach()

    @staticmethod
    def straight_through(slope: Any, value: Any) -> Any:
        return slope + (value - slope).detach()


def _unsupported_reason(spec: PolicyLossSpec) -> str | None:
    if spec.couples_rows:
        return "it couples tokens, and Tinker's graph is of one datum's log-probs, token by token"
    missing = sorted(spec.requires & {"entropy", "log_sum_p_sq"})
    if missing:
        return f"it reads {', '.join(missing)}, and Tinker passes log-probs only"
    if len(set(spec.reductions)) > 1:
        return "its terms have different reductions, and a token has one weight"
    if spec.reduction.weight is not None or not spec.reduction.scalar:
        return f"its reduction, {spec.reduction!r}, gives weights that are unknown before the loss"
    if any(
        not isinstance(v, (int, float))
        for f in (*spec.rules, *spec.weights)
        for v in f.parameters().values()
    ):
        return (
            "it has a hyper-parameter that is a tensor or a formula, which a traced loss "
            "cannot hold"
        )
    if any(not isinstance(p.coef, (int, float)) for p in spec.penalties):
        return "it has a coefficient that is a tensor, which a traced loss cannot hold"
    return None


def custom_loss(spec: PolicyLossSpec | str) -> Any:
    """A token-level spec, or the name of a method, as
    ``loss(logprobs, *inputs) -> (scalar, metrics)``; ``loss.input_ranks`` are the
    ranks.

    The inputs are those of ``advantages``, ``old_logprobs``, ``ref_logprobs`` and
    ``sampling_logprobs`` that the spec reads, and ``weights``: each token's weight in
    the loss, 0 if it is ignored, as :func:`token_weights` gives it. All are ``[T]``,
    fp32. The loss is ``Σ_t weights_t · ℓ_t``, and Tinker sums over the data. Metrics
    are ``custom/tokens:sum``, and ``custom/clipped:sum`` for a loss that clips.

    Raises:
        UnsupportedRequest: a traced loss cannot be the spec; the reason is named.
    """
    spec = named_spec("tinker.custom_loss", spec)
    reason = _unsupported_reason(spec)
    if reason is not None:
        raise UnsupportedRequest(
            f"{spec.name or 'the spec'} cannot be a custom loss of Tinker's: {reason}."
        )
    reads = spec.requires | (
        {"old_logp"} if "log_ratio" in spec.requires and spec.ratio.against == "old" else set()
    )
    names = [name for leaf, name in INPUTS.items() if leaf in reads]

    def compute(logprobs: Any, *inputs: Any) -> Any:
        *stored, weights = inputs
        return _loss(
            spec,
            logprobs,
            dict(zip([leaf for leaf in INPUTS if leaf in reads], stored, strict=True)),
            weights,
        )

    # fx reads the names of a function's code object, and Tinker those of its signature,
    # so they must be parameters.
    arguments = ", ".join(["logprobs", *names, "weights"])
    space: dict[str, Any] = {"compute": compute}
    exec(f"def loss({arguments}):\n    return compute({arguments})", space)
    loss = space["loss"]
    loss.__name__ = spec.name or "loss"
    loss.input_ranks = dict.fromkeys(["logprobs", *names, "weights"], 1)
    return loss


def _loss(
    spec: PolicyLossSpec, logp: Any, stored: dict[str, Any], weights: Any
) -> tuple[Any, dict[str, Any]]:
    xp, keep = _Traceable(), weights != 0
    leaves = {"logp": logp, **stored}
    if "log_ratio" in spec.requires:
        low, high = spec.ratio.bounds()
        drift = logp - stored["old_logp" if spec.ratio.against == "old" else "ref_logp"]
        leaves["log_ratio"] = (
            drift if (low, high) == (-math.inf, math.inf) else torch.clamp(drift, min=low, max=high)
        )
    token = Leaves(safe_where(keep, leaves))
    factors: dict[str, Any] = {"surrogate": None, "all": None}
    for w in spec.weights:
        u = w.weight(xp, token, None)
        u = u.detach() if w.detach else u
        factors[w.scope] = u if factors[w.scope] is None else factors[w.scope] * u
    total: Any = 0.0
    for k, (rule, coef) in enumerate(
        zip(spec.rules, (1.0, *(p.coef for p in spec.penalties)), strict=True)
    ):
        share = weights * coef
        for u in (factors["all"], factors["surrogate"] if k == 0 else None):
            share = share if u is None else share * u
        # A zero weight selects zero, never 0·inf.
        chosen = Leaves(safe_where(keep & (share != 0), leaves)) if spec.weights else token
        total = total + torch.where(share != 0, share * rule.loss(xp, chosen), 0.0)
    metrics = {"custom/tokens:sum": keep.float().sum()}
    clipped = spec.surrogate.clipped(xp, token)
    if clipped is not None:
        metrics["custom/clipped:sum"] = ((clipped[0] | clipped[1]) & keep).float().sum()
    return total.sum(), metrics


def token_weights(
    spec: PolicyLossSpec | str, masks: Sequence[Tensor], **divisors: Any
) -> list[Tensor]:
    """Return a batch's ``weights``, one ``[T]`` fp32 tensor per datum, by the spec's
    reduction of the masks, ``[T]`` each.

    ``num_items_in_batch`` or ``num_sequences_in_batch`` replace the count of this batch
    if it is a part of a larger one.
    """
    spec = named_spec("tinker.token_weights", spec)
    padded = torch.nn.utils.rnn.pad_sequence([m.bool() for m in masks], batch_first=True)
    rows = resolve_rows(
        "token_weights",
        tuple(padded.shape),
        padded.device,
        torch.float32,
        {"completion_mask": padded},
    )
    weights = spec.reduction.row_weights(rows, Divisors(**divisors)).view(padded.shape)
    return [w[: m.numel()] for w, m in zip(weights.unbind(), masks, strict=True)]
