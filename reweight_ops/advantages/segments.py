"""Estimators for parts of a completion, or for the steps of an agent: segments between
values, nodes of a tree, visits of a state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from torch import Tensor

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
from .._core.ranges import Count, Interval, NonNegative, ranged
from .._core.rows.grouped import (
    Grouped,
    GroupKeywords,
    floats,
    grouped,
    indices,
    require,
    where_valid,
)
from .._core.rows.groups import describe
from .._core.rows.structure import is_readable
from ..errors import InvalidCall

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SpoSegments(NamedTuple):
    """The segments of completions.

    ``segment_ids [B, T]`` int64 is 0 before the first cut, then 1, 2, ... ``cuts [B]``
    int64 is the number of cuts of a row, which is the number of values that it needs.
    """

    segment_ids: Tensor
    cuts: Tensor


@ranged
def spo_segments(
    old_per_token_logps: Tensor,
    completion_mask: Tensor,
    *,
    threshold: Annotated[float, Interval("(0, 1]")] = 0.9,
    interval: Count[int] = 5,
) -> SpoSegments:
    """The cuts of SPO-chain: before the first token with ``p_old < threshold``, and
    before every ``interval``-th of them. ``[B, T], [B, T]``.

    Between cuts the policy had almost no choice, so a value estimate there would be
    wasted. arXiv:2505.23564, section 4.1.
    """
    logps = floats("spo_segments", "old_per_token_logps", old_per_token_logps)
    valid = where_valid("spo_segments", completion_mask, logps)
    unlikely = valid & (logps < math.log(threshold))
    seen = unlikely.cumsum(-1)
    segments = (seen + interval - 1) // interval
    return SpoSegments(segments, segments.amax(-1) if segments.shape[-1] else seen.sum(-1))


@published("Segment Policy Optimization, chain", arxiv="2505.23564", level="segment")
def spo_chain(
    values: Tensor, rewards: Tensor, segments: SpoSegments, completion_mask: Tensor
) -> Tensor:
    """All tokens of a segment get the gain of the value over it:
    ``A = V_end - V_start``. ``[B, S], [B], segments, [B, T] -> [B, T]``.

    ``values[:, k]`` is the Monte Carlo value (9 rollouts in the paper) of the
    completion up to its k-th cut, from :func:`spo_segments`; columns from ``cuts`` on
    are not read. The last segment ends in the ``reward``. Tokens before the first cut
    had no choice: 0. Use it with the probability mask of the same threshold, which
    leaves the other likely tokens out of the loss too.
    """
    v = floats("spo_chain", "values", values)
    if v.dim() != 2:
        raise InvalidCall(
            f"spo_chain: values has shape {tuple(v.shape)}, expected (B, S): a value for each "
            f"cut. {describe({'values': v})}"
        )
    r = floats("spo_chain", "rewards", rewards, (len(v),)).to(v.dtype)
    ids, cuts = segments
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != len(v):
        raise InvalidCall(
            f"spo_chain: segments must be those of spo_segments, for {len(v)} rows. "
            f"{describe({'segment_ids': ids})}"
        )
    cuts = indices("spo_chain", "segments.cuts", cuts, (len(v),), v.shape[1] + 1, "S + 1")
    ids = indices(
        "spo_chain", "segments.segment_ids", ids, tuple(ids.shape), v.shape[1] + 1, "S + 1"
    )
    valid = where_valid("spo_chain", completion_mask, ids)
    past = torch.arange(v.shape[1] + 1, device=v.device) >= cuts[:, None]
    # [B, S + 1], the reward from the end on
    bounds = torch.where(past, r[:, None], torch.cat([v, v.new_zeros(len(v), 1)], 1))
    # by segment; 0 before the first cut
    gains = torch.cat([v.new_zeros(len(v), 1), bounds.diff(dim=1)], 1)
    cut = (ids <= cuts[:, None]) & (cuts <= v.shape[1])[:, None]
    advantages = require(
        "spo_chain",
        cut | ~valid,
        "a token is in a segment after its row's last cut.",
        gains.gather(1, ids.clamp(max=v.shape[1])),
    )
    return torch.where(valid, advantages, 0)


def _has_root(parents: Tensor) -> Tensor:
    """Return which nodes have a root above them. On and below a cycle, none has.

    Raises:
        InvalidCall: a node has none, where that may be read.
    """
    n = len(parents)
    # above a root, and above a node with a wrong parent, is n, whose parent is n
    inside = (parents >= 0) & (parents < n)
    above = torch.cat([torch.where(inside, parents, n), parents.new_full((1,), n)])
    steps = 1
    while steps < n:  # no path is longer
        above, steps = above[above], 2 * steps
    found = above[:n] == n
    if is_readable(found) and not bool(found.all()):
        at = int(above[:n][~found][0])  # after that many steps, on the cycle
        raise InvalidCall(
            f"spo_tree: parents[{at}] is {int(parents[at])}, and node {at} is among the ancestors "
            "of its parent. A root's parent is -1."
        )
    return found


@published(
    "Segment Policy Optimization, tree",
    arxiv="2505.23564",
    level="segment",
)
def spo_tree(
    values: Tensor, parents: Tensor, *, scale: str = "none", epsilon: NonNegative[float] = 1e-8
) -> Tensor:
    """An edge's advantage is the gain of the child's value over the parent's:
    ``A = V_child - V_parent``. ``[N], [N] -> [N]``.

    The nodes of any number of trees are in one list. ``parents[i]`` is the row of i's
    parent, -1 for a root (advantage 0). A cycle of parents is an error on the CPU; on a
    GPU its nodes, and all below them, are NaN. ``values`` are given; in the paper a
    leaf's is its reward and an inner node's is the mean of its children's.
    ``scale="std"`` divides by the (population) standard deviation of the siblings plus
    ``epsilon``. Segments of zero advantage may be dropped from the batch.
    """
    if scale not in ("none", "std"):
        raise InvalidCall(f"spo_tree: scale is {scale!r}, expected 'none' or 'std'.")
    forbid_unused(
        "spo_tree", spo_tree, {"epsilon": epsilon}, "scale='none'", {"epsilon": scale == "std"}
    )
    v = floats("spo_tree", "values", values)
    if v.dim() != 1:
        raise InvalidCall(
            "spo_tree: values and parents must be (N,). "
            f"{describe({'values': v, 'parents': parents})}"
        )
    parents = indices("spo_tree", "parents", parents, v, len(v), "the number of rows", least=-1)
    v = torch.where(parents < len(v), v, torch.nan)
    root = parents < 0
    # Roots are siblings of each other, in a separate group that is dropped at the end.
    siblings = grouped(
        "spo_tree",
        v,
        {
            "group_ids": torch.where(root, len(v), parents.clamp(max=len(v) - 1)).long(),
            "num_groups": len(v) + 1,
        },
        name="values",
    )
    gain = torch.where(_has_root(parents), v - v[parents.clamp(0, len(v) - 1)], torch.nan)
    return torch.where(
        root, 0, gain / (siblings.std(v, correction=0) + epsilon) if scale == "std" else gain
    )


def _normalized(g: Grouped, norm: str, epsilon: float) -> Tensor:
    return g.result(g.centered / (g.std(g.values) + epsilon) if norm == "std" else g.centered)


@published(
    "Group-in-Group Policy Optimization",
    paper="Group-in-Group Policy Optimization for LLM Agent Training",
    arxiv="2505.10978",
    certainty="secondary",
    level="step",
)
def gigpo(
    episode_rewards: Tensor,
    step_returns: Tensor,
    episode_ids: Tensor,
    anchor_ids: Tensor,
    *,
    num_anchors: Count[int],
    step_weight: NonNegative[float] = 1.0,
    norm: str = "mean",
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """An agent's step is compared with its episode's group, and with the other steps
    taken from the same state. ``[E], [B], [B], [B] -> [B]``.

    ``A = A_episode + step_weight·A_step``. Rows are steps (one LLM call each):
    ``episode_ids`` says which of the E episodes a step belongs to, and the group
    arguments group *episodes* by prompt. ``A_episode = R - mean_g(R)``; ``A_step`` the
    same of ``step_returns`` (discounted, γ = 0.95:
    :func:`discounted_returns`) over the steps of a group with the same ``anchor_ids``,
    ints in ``[0, num_anchors)``; a state that was seen once gives 0. ``norm="std"``
    divides both by the unbiased standard deviation plus ``epsilon``. Equal anchor ids
    of two prompts are different states.
    """
    if norm not in ("mean", "std"):
        raise InvalidCall(f"gigpo: norm is {norm!r}, expected 'mean' or 'std'.")
    forbid_unused("gigpo", gigpo, {"epsilon": epsilon}, "norm='mean'", {"epsilon": norm == "std"})
    g = grouped("gigpo", episode_rewards, groups, name="episode_rewards")
    rows = {"step_returns": step_returns, "episode_ids": episode_ids, "anchor_ids": anchor_ids}
    if any(
        not isinstance(x, Tensor) or x.dim() != 1 or x.shape != step_returns.shape
        for x in rows.values()
    ):
        raise InvalidCall(
            "gigpo: step_returns, episode_ids and anchor_ids must be (B,), one row per step. "
            f"{describe(rows)}"
        )
    episode_ids = indices(
        "gigpo",
        "episode_ids",
        episode_ids,
        step_returns,
        len(g.values),
        "the number of episodes",
    )
    anchor_ids = indices(
        "gigpo", "anchor_ids", anchor_ids, step_returns, num_anchors, "num_anchors"
    )
    episode = grouped(
        "gigpo",
        step_returns,
        {"group_ids": episode_ids, "num_groups": len(g.values)},
        name="step_returns",
    )
    whose = torch.where(episode.index < len(g.values), episode.index, 0)
    known = (anchor_ids < num_anchors) & (episode_ids < len(g.values))
    states = torch.where(
        known, g.index[whose] * num_anchors + anchor_ids, g.groups.count * num_anchors
    )
    step = grouped(
        "gigpo",
        step_returns,
        {"group_ids": states, "num_groups": g.groups.count * num_anchors},
        name="step_returns",
    )
    by_episode = episode.groups.spread(_normalized(g, norm, epsilon))
    return step.result(by_episode + step_weight * _normalized(step, norm, epsilon))
