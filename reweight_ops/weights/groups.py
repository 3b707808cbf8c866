"""Weights that compare the responses to one prompt at each position: TW-GRPO from their
logits, GTPO from stored entropies.

Both are functions. Their result is a detached tensor ``[B, T]`` for ``token_weights=``
(or :class:`Precomputed`, for every term of the loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import AtLeastOne, Count, Interval, NonNegative, Number, Positive, Real, ranged
from .._core.rows.grouped import indices, whole_number
from ..errors import InvalidCall

#: A chunk of TW-GRPO holds at most this many logits in fp32, a few copies at a time.
_CHUNK = 1 << 24


@weight
class Precomputed(TokenWeight):
    """A weight with given ``values``, one per token or per sequence.

    ``token_weights=`` does the same for the surrogate alone, in one pass.
    """

    values: Real[Number]

    def weight(self, xp, t, batch):
        return xp.where(t.logp == t.logp, self.values, self.values)


@dataclass(frozen=True)
class _Groups:
    index: Tensor  # [B] int64; ``count`` marks a row of no group, which is NaN
    count: int

    def sum(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [count, ...]``."""
        return x.new_zeros(self.count + 1, *x.shape[1:]).index_put(
            (self.index,), x, accumulate=True
        )[: self.count]

    def spread(self, y: Tensor) -> Tensor:
        return torch.cat([y, y.new_full((1, *y.shape[1:]), torch.nan)])[self.index]


def _groups(
    op: str,
    rows: int,
    device: torch.device,
    group_size: int | None,
    group_ids: Tensor | None,
    num_groups: int | None,
) -> _Groups:
    if (group_size is None) == (group_ids is None) or (group_ids is None) != (num_groups is None):
        raise InvalidCall(f"{op}: pass group_size, or group_ids with num_groups.")
    if group_ids is not None and num_groups is not None:
        whole_number(op, "num_groups", num_groups)
        return _Groups(
            indices(op, "group_ids", group_ids, (rows,), num_groups, "num_groups"), num_groups
        )
    assert group_size is not None
    if rows % whole_number(op, "group_size", group_size):
        raise InvalidCall(
            f"{op}: {rows} sequences are not a multiple of group_size = {group_size}."
        )
    return _Groups(torch.arange(rows, device=device) // group_size, rows // group_size)


def _mask(op: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != shape:
        raise InvalidCall(f"{op}: completion_mask has shape {tuple(mask.shape)}, expected {shape}.")
    return mask != 0


@published(
    "Token-Weighted GRPO (focused thinking)",
    arxiv="2505.24718",
    level="group",
    plan="composite",
)
@torch.no_grad()
def tw_grpo(
    logits: Tensor,
    completion_mask: Tensor,
    *,
    max_weight: AtLeastOne[float] = 1.7,
    group_size: Count[int] | None = None,
    group_ids: Tensor | None = None,
    num_groups: Count[int] | None = None,
    temperature: Positive[float] = 1.0,
    chunk_elements: Count[int] = _CHUNK,
) -> Tensor:
    """``w_t = 1 + (max_weight - 1)·n_t``: more weight where the responses to one prompt
    disagree about the next token. ``[B, T]``, 0 where masked.

    ``D_t = mean_g Σ_v (exp(d) - d - 1)`` with
    ``d = clip(mean_g log p_gv - log p_gv, ±11)`` over the prompt's responses g at
    position t; behind a response's end its distribution is uniform. ``n_t`` is D_t
    scaled to [0, 1] by its smallest and largest value over the prompt's positions,
    padding included. Pass the result as ``token_weights=`` of a GRPO spec (0.2, 0.28)
    with a token mean, whose denominator stays unweighted.

    The vocabulary is read twice, in chunks of at most ``chunk_elements`` fp32 numbers,
    and the weights are detached. Differs from the paper: the formula is the authors'
    code's, whose weights carry a gradient and whose ratio is always 1;
    ``max_weight=1.7`` is of its training script.

    >>> import torch, reweight_ops as rw
    >>> rw.weights.tw_grpo(torch.zeros(2, 3, 5), torch.ones(2, 3), group_size=2)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if logits.dim() != 3:
        raise InvalidCall(f"tw_grpo: logits have shape {tuple(logits.shape)}, expected [B, T, V].")
    B, T, V = logits.shape
    keep = _mask("tw_grpo", completion_mask, (B, T))
    groups = _groups("tw_grpo", B, logits.device, group_size, group_ids, num_groups)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = groups.sum(torch.ones(B, dtype=dtype, device=logits.device)).clamp(min=1)
    positions = max(1, chunk_elements // max(B * V, 1))
    divergence = torch.cat(
        [
            _divergence(
                logits[:, t : t + positions],
                keep[:, t : t + positions],
                groups,
                size,
                temperature,
                chunk_elements,
            )
            for t in range(0, T, positions)
        ],
        1,
    )
    low, high = divergence.amin(1, keepdim=True), divergence.amax(1, keepdim=True)
    weights = 1 + (max_weight - 1) * (divergence - low) / (high - low + 1e-8)
    return torch.where(keep, groups.spread(weights), 0)


def _divergence(
    logits: Tensor,
    keep: Tensor,
    groups: _Groups,
    size: Tensor,
    temperature: float,
    chunk_elements: int,
) -> Tensor:
    """``[count, t]``: ``D`` at a few positions, columns in chunks."""
    B, t, V = logits.shape
    columns = max(1, chunk_elements // max(B * t, 1))

    def chunk(v: int) -> Tensor:
        # The distribution is uniform after the end. Logits there may have any value,
        # even NaN.
        return torch.where(
            keep[..., None], logits[..., v : v + columns].to(size.dtype) / temperature, 0
        )

    lse = logits.new_full((B, t), -torch.inf, dtype=size.dtype)
    for v in range(0, V, columns):
        lse = torch.logaddexp(lse, chunk(v).logsumexp(-1))
    total = size.new_zeros(groups.count, t)
    for v in range(0, V, columns):
        logp = chunk(v) - lse[..., None]
        mean = groups.spread(groups.sum(logp) / size[:, None, None])
        # a p of 0 is its own geometric mean
        d = torch.where(logp == -torch.inf, 0, mean - logp).clamp(-11, 11)
        total += groups.sum((torch.expm1(d) - d).sum(-1))
    return total / size[:, None]


@published(
    "Group Token Policy Optimization: dynamic entropy weighting",
    paper="GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy",
    arxiv="2508.04349",
    certainty="secondary",
    level="group",
    plan="composite",
)
@torch.no_grad()
def gtpo(
    entropies: Tensor,
    correct: Tensor,
    completion_mask: Tensor,
    *,
    alpha_1: NonNegative[float] = 1.0,
    alpha_2: NonNegative[float] = 0.1,
    normalize: bool = True,
    group_size: Count[int] | None = None,
    group_ids: Tensor | None = None,
    num_groups: Count[int] | None = None,
    eps: NonNegative[float] = 1e-8,
) -> Tensor:
    """Token advantages ``[B, T]`` from the rollout's entropies: at each position, a
    prompt's correct responses share credit by H, the wrong ones by 1/H.

    ``r_it = α₁ + α₂·d_t·H_it / Σ_k H_kt`` over the ``d_t`` correct responses that reach
    position t (eq. 3), and ``r_jt = -α₁ - α₂·h_t·(1/H_jt) / Σ_k 1/H_kt`` over the
    ``h_t`` wrong ones (eq. 5); then, apart for the correct and the wrong tokens of a
    prompt, minus their mean over their standard deviation, ``sqrt(var + eps)`` (eq. 6;
    ``normalize=False`` returns ``r``). A set whose ``r`` are all equal has advantage 0.
    ``correct``: ``[B]`` bool. Pass the result as ``advantages``.

    Differs from the paper: equations as transcribed by a port, with its eps; mean and
    deviation are taken per prompt.
    """
    if entropies.dim() != 2 or tuple(correct.shape) != (entropies.shape[0],):
        raise InvalidCall(
            f"gtpo: entropies are {tuple(entropies.shape)}, correct {tuple(correct.shape)}; "
            "expected [B, T] and [B]."
        )
    keep = _mask("gtpo", completion_mask, tuple(entropies.shape))
    groups = _groups(
        "gtpo", entropies.shape[0], entropies.device, group_size, group_ids, num_groups
    )
    result = torch.zeros_like(entropies)
    for sign, chosen in ((1.0, correct.bool()), (-1.0, ~correct.bool())):
        inside = keep & chosen[:, None]
        size = entropies if sign > 0 else 1 / (entropies + eps)
        size = torch.where(inside, size, 0)
        count = groups.spread(groups.sum(inside.to(size)))
        reward = sign * (
            alpha_1 + alpha_2 * count * size / groups.spread(groups.sum(size)).clamp(min=eps)
        )
        result = torch.where(
            inside, _standardised(reward, inside, groups, eps) if normalize else reward, result
        )
    return result


def _standardised(x: Tensor, inside: Tensor, groups: _Groups, eps: float) -> Tensor:
    """Return ``x`` minus its mean, divided by its deviation, over the tokens of each
    group.
    """
    count = groups.sum(inside.to(x).sum(1)).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return groups.spread(groups.sum(torch.where(inside, values, 0).sum(1)) / count)[:, None]

    centred = x - mean(x)
    return centred / (mean(centred.square()) + eps).sqrt()


@ranged
def confidence_mask(max_logps: Tensor, threshold: Annotated[float, Interval("[0, 1)")]) -> Tensor:
    """``1[max_v p_v > threshold]``, bool, from
    ``token_stats(..., stats=("max_logp",)).max_logp``: UDA's confidence mask
    (arXiv:1904.12848).

    It is for ``completion_mask``, or for a consistency loss against the distribution
    whose confidence it measures.

    >>> import torch, reweight_ops as rw
    >>> rw.weights.confidence_mask(torch.tensor([0.9, 0.5]).log(), 0.8)
    tensor([ True, False])
    """
    return max_logps.exp() > threshold
