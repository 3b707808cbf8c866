"""Token masks of pair losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.ranges import ranged
from .._core.rows.pairs import from_first_difference as from_first_difference
from ..errors import InvalidCall


def mapo_masks(activations: Sequence[Tensor], completion_mask: Tensor) -> Tensor:
    """MAPO's mask from activations, for ``reward_mask`` and ``kl_mask`` of
    :func:`sparse_po`. It is ``[B, T]`` and detached.

    For each of ``activations`` ``[B, T, D]`` (layers, hooks), the mean over features is
    standardised over the sequence's tokens and then scaled to [0, 1] by the sequence's
    minimum and maximum. The mask is the mean over the list. A sequence with equal
    values gets 0.

    >>> import torch, reweight_ops as rw
    >>> activations = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> rw.preference.mapo_masks([activations], torch.tensor([[1, 1, 1]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    if not activations:
        raise InvalidCall(
            "mapo_masks: activations is empty; expected at least one tensor [B, T, D]."
        )
    keep = completion_mask != 0
    total = torch.zeros_like(completion_mask, dtype=torch.float32)
    for a in activations:
        if a.dim() != 3 or a.shape[:2] != keep.shape:
            raise InvalidCall(
                f"mapo_masks: an activation is {tuple(a.shape)}, expected {tuple(keep.shape)} + "
                "(D,)."
            )
        x = a.detach().float().mean(-1)
        low = torch.where(keep, x, torch.inf).amin(-1, keepdim=True)
        # Standardising first would change nothing, because the scaling to a range
        # undoes it.
        span = torch.where(keep, x, -torch.inf).amax(-1, keepdim=True) - low
        total = total + torch.where(
            keep & (span > 0), (x - low) / torch.where(span > 0, span, 1), 0
        )
    return total / len(activations)


@ranged
def rank_consistency(rewards: Tensor, previous_rewards: Tensor, *, kind: str = "kendall") -> Tensor:
    """CREAM's consistency of two rankings of the same G responses.
    ``[N, G], [N, G] -> [N]`` in [0, 1].

    ``kendall``: ``(τ + 1)/2``, τ over all pairs, a tie in either counting 0 (τ-a).
    ``spearman``: ``(ρ + 1)/2``, ρ the correlation of ranks (ties by position).
    ``toporder``: 1 where both agree on the best and on the worst response, else 0.

    >>> import torch, reweight_ops as rw
    >>> rewards = torch.tensor([[3.0, 2.0, 1.0]])
    >>> rw.preference.rank_consistency(rewards, torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([0.6667])
    """
    if rewards.dim() != 2 or rewards.shape != previous_rewards.shape or rewards.size(-1) < 2:
        raise InvalidCall(
            f"rank_consistency: rewards are {tuple(rewards.shape)} and "
            f"{tuple(previous_rewards.shape)}, expected [N, G] twice with G > 1."
        )
    g = rewards.size(-1)
    if kind == "kendall":
        signs = [torch.sign(x[:, :, None] - x[:, None, :]) for x in (rewards, previous_rewards)]
        tau = (signs[0] * signs[1]).sum((-1, -2)) / (g * (g - 1))
        return (tau + 1) / 2
    if kind == "spearman":
        a, b = (
            x.argsort(dim=-1, stable=True).argsort(-1).to(rewards.dtype)
            for x in (rewards, previous_rewards)
        )
        return 1 - 3 * (a - b).square().sum(-1) / (g * (g * g - 1))
    if kind == "toporder":
        same = (rewards.argmax(-1) == previous_rewards.argmax(-1)) & (
            rewards.argmin(-1) == previous_rewards.argmin(-1)
        )
        return same.to(rewards.dtype)
    raise InvalidCall(
        f"rank_consistency: kind is {kind!r}, expected 'kendall', 'spearman' or 'toporder'."
    )
