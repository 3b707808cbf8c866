"""The row statistics as differentiable torch.

They run where autograd wants a graph of the gradient, and in the transforms of
``torch.func``.

Kernels compute first derivatives only. Under ``create_graph=True`` the backward of a
statistic differentiates its formula here, so autograd gives the second derivatives. It
takes the memory of eager PyTorch: several tensors of the logits' size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.base import VOCABULARY, SoftmaxParams
from ..backends.mean_logit import MEAN_LOGIT
from ..calls.hidden import ChunkSettings, LMHead
from ..calls.sampling_mask import KeptSets
from ..rows.constants import number_like, varies
from ..rows.groups import IGNORE_INDEX
from .ops import without_last_position
from .picks import PICKED, PICKED_IDS

#: The backend of a call whose statistics are these formulas.
TORCH = "torch"


def wants_graph() -> bool:
    """Return, in backward, whether autograd wants a graph of the gradient.

    A compiled graph has none, and PyTorch raises there.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradient(
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of ``formula(*inputs)`` by its inputs, with a graph of their
    own, and None for an input that needs none.
    """
    pairs = [
        (out, g)
        for out, g in zip(formula(*inputs), upstream, strict=True)
        if g is not None and out.requires_grad
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs, grads = [out for out, _ in pairs], [g for _, g in pairs]
    found = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True)
        if pairs and wanted
        else ()
    )
    return [next(found, None) if x is not None and x.requires_grad else None for x in inputs]


def rows(logits: Tensor, drop_last: bool) -> Tensor:
    """``[N, V]`` of a call's logits."""
    z = without_last_position(logits, drop_last)
    return z.reshape(-1, z.size(-1))


def log_probs(
    logits: Tensor, temperature: Tensor, softmax: SoftmaxParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(x, log_softmax(x), masked)`` of ``[N, V]`` logits.

    x is formed as in the kernels. ``masked`` marks the columns without mass, which have
    no gradient.
    """
    z = logits[:, : softmax.vocab_size]
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    # A row without any finite logit is NaN everywhere. Nothing is masked there.
    served = z.amax(-1, keepdim=True).isfinite()
    masked, t = (z == -math.inf) & served, temperature.view(-1, 1)
    x = torch.where(masked, 0, z)
    if math.isfinite(softmax.softcap):
        x = torch.where(x == math.inf, math.nan, softmax.softcap * torch.tanh(x / softmax.softcap))
    # a mask of finfo.min and a temperature below 1
    masked = masked | ((x / t == -math.inf) & served)
    x = torch.where(masked, -math.inf, torch.where(masked, 0, x) / t)
    return x, torch.log_softmax(x, -1), masked


def token_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    names: Sequence[str],
    picked: Tensor | None = None,
    sets: KeptSets | None = None,
) -> tuple[Tensor, ...]:
    """Return the named statistics of ``[N, V]`` logits, ``[N]`` each, as
    :class:`~reweight_ops._core.backends.base.Backend` defines them.

    ``picked`` has ``[N, K]`` ids, for the statistics that are log-probs of them. With
    ``sets``, distributions are over these columns.
    """
    if sets is not None:
        return _kept_stats(logits, ids, temperature, softmax, names, sets)
    inside = ids != IGNORE_INDEX
    x, log_p, _ = log_probs(torch.where(inside[:, None], logits, 0), temperature, softmax)
    bad = inside & ((ids < 0) | (ids >= softmax.total()))
    known = torch.where(inside & ~bad, ids, 0)[:, None]
    # a log-prob of -inf, or -1e38, would make the slope NaN
    finite = torch.where(log_p.exp() == 0, 0, log_p)
    formulas: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: log_p.gather(-1, known)[:, 0],
        "entropy": lambda: -(log_p.exp() * finite).sum(-1),
        # NaN where no column is finite
        "lse": lambda: x.logsumexp(-1) + 0 * log_p.detach().amax(-1),
        "log_sum_p_sq": lambda: (2 * log_p).logsumexp(-1),
        "max_logp": lambda: log_p.detach().amax(-1),
        MEAN_LOGIT: lambda: x.detach().mean(-1) + 0 * log_p.detach().amax(-1),
    }
    found = {
        name: torch.where(inside, torch.where(bad, math.nan, formulas[name]()), 0)
        for name in names
        if name in formulas
    }
    if picked is not None:
        there = inside[:, None] & (picked != IGNORE_INDEX)
        unknown = there & ((picked < 0) | (picked >= softmax.vocab_size))
        logps = log_p.gather(-1, torch.where(there & ~unknown, picked, 0))
        found |= {
            PICKED: torch.where(unknown, math.nan, torch.where(there, logps, 0)),
            PICKED_IDS: picked,
        }
    return tuple(found[name] for name in names)


def _kept_stats(
    logits: Tensor,
    position: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    names: Sequence[str],
    sets: KeptSets,
) -> tuple[Tensor, ...]:
    n, entries = position.numel(), sets.token_ids.numel()
    inside = (sets.row >= 0) & (sets.row < n)
    mask = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    if n and entries:
        mask = mask.index_put(
            (sets.row.clamp(0, n - 1), sets.token_ids), inside.int(), accumulate=True
        )
        at = (sets.bounds[0] + position).clamp(0, entries - 1)
        position = torch.where(position < 0, position, sets.token_ids[at])
    kept, whole = (
        torch.where(mask > 0, logits, -math.inf),
        [name for name in names if name.startswith(VOCABULARY)],
    )
    own = [name for name in names if name not in whole]
    found = dict(zip(own, token_stats(kept, position, temperature, softmax, own), strict=True))
    if whole:
        values = token_stats(
            logits,
            position,
            temperature,
            softmax,
            [name.removeprefix(VOCABULARY) for name in whole],
        )
        found |= dict(zip(whole, values, strict=True))
    return tuple(found[name] for name in names)


def head_logits(hidden: Tensor, head: LMHead, keep: Tensor, settings: ChunkSettings) -> Tensor:
    """Return the ``[M, V]`` logits of a linear head in the dtypes of the chunked head.
    An ignored row is never read.
    """
    weight, bias, a, b, scale = head.cast(settings)
    h, dtype = (
        torch.where(keep[:, None], hidden, 0).to(settings.compute_dtype),
        settings.logits_dtype,
    )
    wide = torch.promote_types(dtype, settings.lora_dtype)
    z = h.to(wide) @ weight.to(wide).t()
    z = z if bias is None else z + bias.to(wide)
    z = (
        z
        if a is None or b is None
        else z + scale * ((h.to(a.dtype) @ a.t()).to(wide) @ b.t().to(wide))
    )
    return z.to(dtype)


def other_logits(
    hidden: Tensor, head: LMHead | None, index: Tensor | None, keep: Tensor, settings: ChunkSettings
) -> Tensor:
    """Return the ``[M, V]`` logits of a frozen second model, from its hidden states and
    head, or as rows of the given logits.
    """
    if head is not None:
        return head_logits(hidden, head, keep, settings)
    flat = rows(hidden, False)
    return flat if index is None else flat[index]


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """``β·KL(q‖m) + (1-β)·KL(p‖m)``, ``m = β·q + (1-β)·p``, of rows of log-probs."""
    # A column without mass in both has no mixture, and its slope would be NaN. It is
    # multiplied by p and q, which are 0 there.
    masked = (log_p == -math.inf) & (log_q == -math.inf)
    share: Any = number_like(beta, log_p) if varies(beta) else beta
    log_share, log_rest = (
        (share.log(), torch.log1p(-share)) if varies(beta) else (math.log(beta), math.log1p(-beta))
    )
    mix = torch.logaddexp(
        torch.where(masked, 0, log_p) + log_rest, torch.where(masked, 0, log_q) + log_share
    )
    to_q, to_p = (
        torch.where(t == -math.inf, 0, t.exp() * (torch.where(t == -math.inf, 0, t) - mix)).sum(-1)
        for t in (log_q, log_p)
    )
    jsd: Tensor = share * to_q + (1 - share) * to_p
    return jsd


def divergence_stats(
    tensors: Sequence[Tensor],
    softmaxes: tuple[int, float, float],
    drop_last: bool,
    beta: float | None = None,
) -> tuple[Tensor, ...]:
    """``(KL(q‖p), KL(p‖q), H(p), H(q))`` of every row, from logits, other logits, ids
    and both temperatures; with ``beta`` also the generalised JSD.
    """
    logits, other, ids, temperature, other_temperature = tensors
    vocab_size, softcap, other_softcap = softmaxes
    inside = (ids != IGNORE_INDEX)[:, None]
    first = (rows(logits, drop_last), temperature, softcap)
    second = (rows(other, False), other_temperature, other_softcap)
    (_, log_p, masked_p), (_, log_q, masked_q) = (
        log_probs(torch.where(inside, z, 0), t, SoftmaxParams(vocab_size, cap))
        for z, t, cap in (first, second)
    )
    found = row_divergences(log_p, log_q, masked_p, masked_q, beta)
    return tuple(torch.where(inside[:, 0], row, 0) for row in found)


def row_divergences(
    log_p: Tensor,
    log_q: Tensor,
    masked_p: Tensor,
    masked_q: Tensor,
    beta: float | None = None,
    whole: bool = True,
) -> tuple[Tensor, ...]:
    """``(KL(q‖p), KL(p‖q), H(p), H(q)[, JSD])`` of rows of log-probs, ``masked`` where
    they are ``-inf``; ``whole``: both sum to 1, so none is negative.
    """
    p, q, a, b = (
        log_p.exp(),
        log_q.exp(),
        torch.where(masked_p, 0, log_p),
        torch.where(masked_q, 0, log_q),
    )
    d = torch.where(masked_p | masked_q, 0, a - b)
    forward, reverse = -(q * d).sum(-1), (p * d).sum(-1)
    if whole:
        forward, reverse = _at_least_zero(forward), _at_least_zero(reverse)
    is_nan = p.isnan().any(-1) | q.isnan().any(-1)
    forward = torch.where((masked_p & ~masked_q).any(-1) & ~is_nan, math.inf, forward)
    reverse = torch.where((masked_q & ~masked_p).any(-1) & ~is_nan, math.inf, reverse)
    found = (forward, reverse, -(p * a).sum(-1), -(q * b).sum(-1))
    return found if beta is None else (*found, generalized_jsd(log_p, log_q, beta))


def _at_least_zero(x: Tensor) -> Tensor:
    """Clamp the value of a divergence at 0 against rounding. Its gradient
    stays whole."""
    return x - x.detach().clamp(max=0)
