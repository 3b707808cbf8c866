"""Estimators that compare a group's completions by a statistic of the sampling policy:
entropy or length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import Interval, NonNegative, Real, Unit
from .._core.rows.grouped import GroupKeywords, grouped
from ..errors import InvalidCall

if TYPE_CHECKING:
    from typing_extensions import Unpack


@published(
    "Conditional Advantage Estimation",
    arxiv="2509.23962",
    level="group",
)
def canon(
    rewards: Tensor,
    metric: Tensor,
    *,
    metric_kind: str = "entropy",
    inter_weight: Unit[float | Tensor] = 1.0,
    alpha: NonNegative[float] = 1.0,
    beta: Real[float] = 0.0,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """The group is split by a metric, and a completion is compared with the other half
    and with its own. ``[B], [B] -> [B]``.

    The ``floor(n/2)`` completions with the least ``metric`` are S, the others L. Equal
    metrics are ordered by row, so the split is defined.
    ``inter = r - mean(other half)``, ``intra = r - mean(own half)``,
    ``A = μ·inter + (1 - μ)·intra`` with ``μ = inter_weight``. The default 1, as in the
    authors' code and scripts, compares only with the other half. At μ = 1/2 the metric
    has no effect in groups of even size: A is Dr. GRPO's ``r - mean_g``.

    ``alpha`` and ``beta`` (eq. 8) favour one half in ``inter``.
    ``metric_kind="entropy"`` (the mean token entropy under the old policy): L has
    ``r - α·mean(S) + β``, S has ``α·r - mean(L) - β``. ``"length"``: L has
    ``α·r - mean(S) + β``, S has ``r - α·mean(L) - β`` (α = 0.9 for shorter answers).
    ``inter_weight`` may be a 0-d tensor: First-Intra-Later-Inter is the batch's mean
    reward.

    Differs from the paper: a group of one has advantage 0; the authors' code keeps its
    reward.
    """
    if metric_kind not in ("entropy", "length"):
        raise InvalidCall(f"canon: metric_kind is {metric_kind!r}, expected 'entropy' or 'length'.")
    g = grouped("canon", rewards, groups)
    r = g.values
    small = g.rank(g.like("metric", metric)) < (g.size / 2).floor()
    mean_small, mean_large = (g.mean(r, half.to(r.dtype)) for half in (small, ~small))
    if metric_kind == "entropy":
        inter = torch.where(small, alpha * r - mean_large - beta, r - alpha * mean_small + beta)
    else:
        inter = torch.where(small, r - alpha * mean_large - beta, alpha * r - mean_small + beta)
    intra = r - torch.where(small, mean_small, mean_large)
    mixed = inter_weight * inter + (1 - inter_weight) * intra
    return g.result(torch.where(g.size == 1, 0, mixed))


@published(
    "Entropy-Driven GRPO",
    paper="EDGE-GRPO: Entropy-Driven GRPO with Guided Error Correction for Advantage Diversity",
    arxiv="2507.21848",
    level="group",
)
def edge_grpo(
    rewards: Tensor,
    entropy: Tensor,
    *,
    bounds: Annotated[tuple[float, float], Interval(entries="[0, inf]")] = (0.1, 10.0),
    epsilon: NonNegative[float] = 1e-4,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """GRPO's advantage divided by the completion's relative entropy: confident answers
    count more. ``[B], [B] -> [B]``.

    ``A = (r - mean_g)/(std_g + epsilon) / P``, ``P = entropy_i / mean_g(entropy)``.
    ``entropy`` is the mean over a completion's valid tokens. It is detached.

    Differs from the paper: ``P`` is kept in ``bounds``, because a completion without
    entropy would get an infinite advantage. The authors' code has this line but
    disables it. ``(0, math.inf)`` is the paper's form. The authors' code also averages
    over padding, over all processes instead of the group, and lets the gradient through
    the entropy.
    """
    g = grouped("edge_grpo", rewards, groups)
    p = g.like("entropy", entropy)
    mean = g.mean(p)
    relative = torch.where(mean == 0, 1, p / torch.where(mean == 0, 1, mean)).clamp(*bounds)
    return g.result(g.centered / (g.std(g.values) + epsilon) / relative)
