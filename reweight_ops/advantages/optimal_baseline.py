"""Optimal token baselines, one per position.

A response is weighted by its uncertainty up to the position, from the Σπ² of the
rollout's read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import NonNegative
from .._core.rows.grouped import Grouped, GroupKeywords, floats, grouped
from .tokens import masked, token_rewards

if TYPE_CHECKING:
    from typing_extensions import Unpack


@published("Optimal Token Baseline (OTB)", arxiv="2602.07078", certainty="secondary", level="token")
def otb(
    rewards: Tensor,
    completion_mask: Tensor,
    old_per_token_logps: Tensor,
    log_sum_p_sq: Tensor,
    *,
    importance_sampling_ratio: Tensor | None = None,
    zero_tail: bool = True,
    epsilon: NonNegative[float] = 1e-8,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A_t = G_t - B_t``, ``B_t = Σ_g G_t·W_t / (Σ_g W_t + epsilon)``,
    ``W_t = Σ_{s<=t} (1 - 2π_s + Σ_v π²)·ρ²``. ``[B, T] or [B], [B, T]... -> [B, T]``.

    ``G_t`` is the sum of rewards from t on (``rewards`` ``[B]`` are on each response's
    last token). ``W`` sums the squared norms of the tokens' gradients by their logits,
    a proxy of the path's variance. ``log_sum_p_sq`` comes from ``token_stats``, under
    the policy of ``old_per_token_logps``. ``ρ`` is 1 or ``importance_sampling_ratio``.
    Positions are columns. With ``zero_tail`` the baseline is 0 where only the longest
    response of a group remains, and for a group of one. A response with a reward of NaN
    is in no baseline and has advantage 0. Transcribed from verl
    (``optimal_token_baseline``). The paper is in PMLR v306.
    """
    return _baselined(
        "otb",
        rewards,
        completion_mask,
        old_per_token_logps,
        log_sum_p_sq,
        importance_sampling_ratio,
        zero_tail,
        epsilon,
        groups,
    )


@published(
    "Optimal Token Baseline of tool-integrated reasoning (TIR-OTB)",
    arxiv="2602.07078",
    certainty="secondary",
    level="token",
)
def tir_otb(
    rewards: Tensor,
    completion_mask: Tensor,
    old_per_token_logps: Tensor,
    log_sum_p_sq: Tensor,
    *,
    importance_sampling_ratio: Tensor | None = None,
    zero_tail: bool = True,
    epsilon: NonNegative[float] = 1e-8,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """:func:`otb` with positions that count only a response's own tokens. Masked tokens
    of tools do not count (verl's ``tir_optimal_token_baseline``).
    """
    mask = masked("tir_otb", completion_mask)
    # Valid tokens first, in their order; each response then has its n-th token in
    # column n.
    order = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices
    r = token_rewards("tir_otb", rewards, mask)
    packed = [
        None if x is None else floats("tir_otb", name, x, mask).gather(-1, order)
        for name, x in (
            ("rewards", r),
            ("old_per_token_logps", old_per_token_logps),
            ("log_sum_p_sq", log_sum_p_sq),
            ("importance_sampling_ratio", importance_sampling_ratio),
        )
    ]
    result = _baselined(
        "tir_otb",
        packed[0],
        mask.gather(-1, order),
        packed[1],
        packed[2],
        packed[3],
        zero_tail,
        epsilon,
        groups,
    )
    return torch.zeros_like(result).scatter(-1, order, result)


def _baselined(
    op: str,
    rewards: Tensor | None,
    completion_mask: Tensor,
    logps: Tensor | None,
    log_sum_p_sq: Tensor | None,
    ratio: Tensor | None,
    zero_tail: bool,
    epsilon: float,
    groups: GroupKeywords,
) -> Tensor:
    mask = masked(op, completion_mask)
    r = token_rewards(op, rewards, mask)
    scored = ~r.isnan().any(-1)
    mask = mask & scored[:, None]
    r = torch.where(mask, r, 0)
    returns = r.flip(-1).cumsum(-1).flip(-1)
    uncertainty = (
        1
        - 2 * floats(op, "old_per_token_logps", logps, mask).exp()
        + floats(op, "log_sum_p_sq", log_sum_p_sq, mask).exp()
    )
    if ratio is not None:
        uncertainty = uncertainty * floats(op, "importance_sampling_ratio", ratio, mask) ** 2
    weight = torch.where(mask, torch.where(mask, uncertainty, 0).cumsum(-1), 0)
    lengths = mask.sum(-1).to(returns.dtype)
    g = grouped(
        op,
        torch.where(scored if op == "otb" else lengths > 0, lengths, torch.nan),
        groups,
        name="completion_mask",
    )
    baseline = _by_column(g, returns * weight) / (_by_column(g, weight) + epsilon)
    alone = _alone(g, mask) if zero_tail else torch.zeros_like(mask)
    baseline = torch.where(alone | (g.size < 2)[:, None], 0, baseline)
    return torch.where(mask, returns - baseline, 0)


def _by_column(g: Grouped, x: Tensor) -> Tensor:
    """Return ``[B, T]``: each row gets its group's sum."""
    total = x.new_zeros(g.groups.count + 1, x.shape[1]).index_put((g.index,), x, accumulate=True)
    return total[g.index]


def _alone(g: Grouped, mask: Tensor) -> Tensor:
    """Return ``[B, T]``: the columns of a group's longest response beyond the second
    longest, if only one is longest.
    """
    lengths = g.values
    longest = g.max(lengths)
    at_top = lengths == longest
    second = g.max(torch.where(at_top, -torch.inf, lengths))
    only = at_top & (g.sum(at_top.to(lengths.dtype)) == 1)
    return only[:, None] & (torch.arange(mask.shape[1], device=mask.device) >= second[:, None])
