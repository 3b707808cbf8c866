"""Estimators from a group's rewards alone. They differ in the baseline
and the divisor."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
from .._core.ranges import Interval, NonNegative, NonNegativeOrInf, OpenUnit, Positive
from .._core.rows.grouped import Grouped, GroupKeywords, floats, grouped
from ..errors import InvalidCall

if TYPE_CHECKING:
    from typing_extensions import Unpack


def batch_std(x: Tensor, scored: Tensor) -> Tensor:
    """Return the unbiased standard deviation of the scored rows, 0-d. It is 0 for fewer
    than two.
    """
    count = scored.sum()
    mean = torch.where(scored, x, 0).sum() / count.clamp(min=1)
    squares = torch.where(scored, (x - mean) ** 2, 0).sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()


def singletons(g: Grouped, advantages: Tensor, singleton: str) -> Tensor:
    """Return advantages with those of groups of one: ``"zero"``, or ``"reward"`` for
    the reward itself (verl: mean 0, standard deviation 1).
    """
    if singleton not in ("zero", "reward"):
        raise InvalidCall(
            f"{g.op}: singleton is {singleton!r}, expected 'zero' (as TRL) or 'reward' (as verl)."
        )
    return g.result(torch.where(g.size == 1, g.values if singleton == "reward" else 0, advantages))


@published(
    "Group Relative Policy Optimization",
    arxiv="2402.03300",
    level="group",
)
def grpo(
    rewards: Tensor,
    *,
    scale_rewards: str = "group",
    epsilon: NonNegative[float] = 1e-4,
    singleton: str = "zero",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r - mean_g) / (std_g + epsilon)`` (section 4.1.2), ``std_g`` unbiased.
    ``[B] -> [B]``.

    ``scale_rewards`` is ``"group"``, ``"batch"`` (the standard deviation of all
    rewards) or ``"none"``, as in TRL. ``epsilon`` is TRL's 1e-4; verl has 1e-6.
    ``singleton`` is the advantage of a group of one, ``"zero"`` (TRL) or ``"reward"``
    (verl).

    Differs from the paper: the paper has no ``epsilon``.
    """
    g = grouped("grpo", rewards, groups)
    if scale_rewards == "group":
        scale = torch.where(g.size == 1, 1, g.std(g.values)) + epsilon
    elif scale_rewards == "batch":
        scale = batch_std(g.values, g.scored) + epsilon
    elif scale_rewards == "none":
        scale = torch.ones_like(g.values)
    else:
        raise InvalidCall(
            f"grpo: scale_rewards is {scale_rewards!r}, expected 'group', 'batch' or 'none'."
        )
    forbid_unused(
        "grpo",
        grpo,
        {"epsilon": epsilon},
        "scale_rewards='none'",
        {"epsilon": scale_rewards != "none"},
    )
    return singletons(g, g.centered, singleton) / scale


@published(
    "GRPO Done Right",
    arxiv="2503.20783",
    level="group",
)
def dr_grpo(rewards: Tensor, *, singleton: str = "zero", **groups: Unpack[GroupKeywords]) -> Tensor:
    """``A = r - mean_g``: GRPO without its division, which favours questions that are
    too easy or too hard (section 3.1). ``[B] -> [B]``.
    """
    g = grouped("dr_grpo", rewards, groups)
    return singletons(g, g.centered, singleton)


@published(
    "Group reward-Decoupled Normalization Policy Optimization",
    paper="GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL "
    "Optimization",
    arxiv="2601.05242",
    certainty="secondary",
    level="group",
)
def gdpo(
    rewards: Tensor,
    weights: Tensor | None = None,
    *,
    epsilon: NonNegative[float] = 1e-4,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """Each of K rewards is normalized in its group; then they are summed, and the sum
    is normalized over the batch. ``[B, K] -> [B]``.

    ``a = sum_k w_k (r_k - mean_gk) / (std_gk + epsilon)``,
    ``A = (a - mean) / (std + epsilon)``: TRL's ``normalize_then_sum``. ``weights [K]``:
    1 each by default. A NaN is a reward that does not apply to its completion; a
    completion without any has advantage 0.
    """
    x = floats("gdpo", "rewards", rewards)
    if x.dim() != 2:
        raise InvalidCall(
            f"gdpo: rewards has shape {tuple(x.shape)}, expected (B, K): K rewards per completion."
        )
    w = (
        x.new_ones(x.shape[1])
        if weights is None
        else floats("gdpo", "weights", weights, (x.shape[1],)).to(x.dtype)
    )
    parts = [grouped("gdpo", column, groups) for column in x.unbind(1)]
    total = torch.stack(
        [
            v * g.result(g.centered / (g.std(g.values) + epsilon))
            for v, g in zip(w, parts, strict=True)
        ]
    ).sum(0)
    scored = torch.stack([g.scored for g in parts]).any(0)
    mean = torch.where(scored, total, 0).sum() / scored.sum().clamp(min=1)
    return torch.where(scored, (total - mean) / (batch_std(total, scored) + epsilon), 0)


@published(
    "REINFORCE Leave-One-Out",
    paper="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human "
    "Feedback in LLMs",
    arxiv="2402.14740",
    level="group",
)
def rloo(
    rewards: Tensor,
    *,
    normalize_advantages: bool = False,
    epsilon: NonNegative[float] = 1e-4,
    singleton: str = "zero",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A_i = r_i - mean_{j != i} r_j``, that is ``n/(n-1)·(r_i - mean_g)``.
    ``[B] -> [B]``.

    ``normalize_advantages`` is TRL's option, ``(A - mean)/(std + epsilon)`` over the
    batch. ``singleton`` is the advantage of a group of one, ``"zero"`` (TRL) or
    ``"reward"`` (verl).
    """
    g = grouped("rloo", rewards, groups)
    advantages = singletons(g, g.centered * g.size / (g.size - 1).clamp(min=1), singleton)
    forbid_unused(
        "rloo",
        rloo,
        {"epsilon": epsilon},
        "normalize_advantages=False",
        {"epsilon": normalize_advantages},
    )
    if not normalize_advantages:
        return advantages
    # TRL drops a group with one scored completion from the normalization, because its
    # advantage is 0/0 there.
    kept = g.scored & (g.size > 1) if singleton == "zero" else g.scored
    mean = torch.where(kept, advantages, 0).sum() / kept.sum().clamp(min=1)
    return torch.where(kept, (advantages - mean) / (batch_std(advantages, kept) + epsilon), 0)


@published(
    "On-Policy RL with Optimal reward baseline",
    paper="On-Policy RL with Optimal Reward Baseline",
    arxiv="2505.23585",
    certainty="secondary",
    level="group",
)
def opo(
    rewards: Tensor, lengths: Tensor, *, singleton: str = "zero", **groups: Unpack[GroupKeywords]
) -> Tensor:
    """``A = r - sum_j L_j r_j / sum_j L_j``: the baseline of least variance if a
    completion's gradient norm grows with its length. ``[B], [B] -> [B]``.

    ``lengths`` are numbers of valid tokens. There is no division by a standard
    deviation. The method is strictly on-policy. ``singleton`` is the advantage of a
    group of one, ``"zero"`` or ``"reward"`` (verl).
    """
    g = grouped("opo", rewards, groups)
    return singletons(g, g.values - g.mean(g.values, g.like("lengths", lengths)), singleton)


@published(
    "Advantage-Augmented Policy Optimization",
    paper="AAPO: Enhance the Reasoning Capabilities of LLMs with Advantage Momentum",
    arxiv="2505.14264",
    level="sequence",
)
def aapo(
    rewards: Tensor,
    reference_rewards: Tensor,
    *,
    scale_rewards: bool = False,
    epsilon: NonNegative[float] = 1e-4,
    clip_low: NonNegativeOrInf[float] = 0.2,
    clip_high: NonNegativeOrInf[float] = 0.28,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r - mean_g) [/ (std_g + epsilon)] + clip(r - r_ref, -clip_low,
    clip_high)``. ``[B], [B] -> [B]``.

    ``reference_rewards``: the reward of a reference-model completion paired with each
    row. ``scale_rewards`` is off in the authors' script. The loss is
    ``methods.reinforce``: no ratio, no clip, no KL.
    """
    g = grouped("aapo", rewards, groups)
    reference = g.like("reference_rewards", reference_rewards)
    forbid_unused(
        "aapo", aapo, {"epsilon": epsilon}, "scale_rewards=False", {"epsilon": scale_rewards}
    )
    base = g.centered / (g.std(g.values) + epsilon) if scale_rewards else g.centered
    return g.result(base + (g.values - reference).clamp(-clip_low, clip_high))


@published(
    "Pre-estimated Value-based Policy Optimization",
    paper="PVPO: Pre-Estimated Value-Based Policy Optimization for Agentic Reasoning",
    arxiv="2508.21104",
    certainty="secondary",
    level="group",
)
def pvpo(rewards: Tensor, reference_rewards: Tensor, **groups: Unpack[GroupKeywords]) -> Tensor:
    """``A_i = r_i - mean_m r_ref``, without division. ``[B], [num_groups, M] -> [B]``.

    The baseline comes from rollouts of the reference policy, beforehand.

    ``reference_rewards`` has M rewards of the reference policy for each group's prompt;
    NaN fills up fewer. Dropping prompts of accuracy 1 and injecting a ground truth into
    those of accuracy 0 are steps of the sampler, before this.
    """
    g = grouped("pvpo", rewards, groups)
    reference = floats("pvpo", "reference_rewards", reference_rewards).to(g.values.dtype)
    if reference.dim() != 2 or reference.shape[0] != g.groups.count:
        raise InvalidCall(
            f"pvpo: reference_rewards has shape {tuple(reference.shape)}, expected "
            f"({g.groups.count}, M): M rewards per group."
        )
    return g.result(g.values - g.groups.spread(reference.nanmean(1)))


@published(
    "Quantile Advantage Estimation",
    paper="Quantile Advantage Estimation for Entropy-Safe Reasoning",
    arxiv="2509.22611",
    level="group",
)
def qae(
    rewards: Tensor,
    *,
    quantile: OpenUnit[float] = 0.4,
    correction: Annotated[int, Interval("[0, 1]", whole=True)] = 0,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = (r - b) / (std_g + epsilon)`` with the ``quantile`` K of the group as
    baseline, ``b = inf{x: F(x) >= K}``. ``[B] -> [B]``.

    For 0/1 rewards with a share p of ones, ``b = 0`` (only correct answers count) if
    ``p <= 1 - K``, else 1 (only wrong ones). Integer counts decide which of the group's
    values is ``b``: K is read as the nearest fraction with a denominator up to a
    million, so ties are exact. ``correction=0`` is the population standard deviation,
    which the paper's totals ``sqrt(p/(1-p))`` assume; the authors' snippet has 1. The
    rest of the method is DAPO. K is 0.4, and 0.6 where entropy collapses.

    Differs from the paper: ``epsilon``. The authors' snippet interpolates the quantile,
    which is not the paper's ``b``.
    """
    g = grouped("qae", rewards, groups)
    share = Fraction(quantile).limit_denominator(10**6)
    size = torch.zeros_like(g.start).index_put((g.index,), g.scored.long(), accumulate=True)[
        g.index
    ]
    # ceil(K n)-th of n, from 0
    place = (share.numerator * size + share.denominator - 1) // share.denominator - 1
    baseline = g.sum(torch.where(g.rank(g.values) == place, g.values, 0))
    return g.result((g.values - baseline) / (g.std(g.values, correction) + epsilon))


@published(
    "Lite PPO",
    paper="Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning",
    arxiv="2508.08221",
    certainty="secondary",
    level="batch",
)
def lite_ppo(
    rewards: Tensor, *, epsilon: NonNegative[float] = 1e-4, **groups: Unpack[GroupKeywords]
) -> Tensor:
    """``A = (r - mean_g) / (std + epsilon)`` with the unbiased standard deviation of
    the whole batch. ``[B] -> [B]``.

    This is ``grpo(scale_rewards="batch")``.

    The loss is ``methods.ppo``. The other of the paper's two tricks is the token mean.
    """
    return grpo(rewards, scale_rewards="batch", epsilon=epsilon, **groups)


@published(
    "Group Policy Gradient: the advantage",
    arxiv="2504.02546",
    certainty="secondary",
    level="batch",
)
def gpg(
    rewards: Tensor,
    *,
    f_norm: Positive[float] = 1.0,
    singleton: str = "zero",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = α·(r - mean_g) / f_norm``. ``[B] -> [B]``.

    ``α`` is the number of responses over that of responses with a nonzero reward.

    ``singleton`` is the advantage of a group of one, ``"zero"`` or ``"reward"`` (verl:
    α times its reward). The loss is ``methods.gpg``. Transcribed from verl.
    """
    g = grouped("gpg", rewards, groups)
    alpha = g.scored.sum().to(g.values.dtype) / ((g.values != 0) & g.scored).sum().clamp(min=1)
    return alpha * singletons(g, g.centered, singleton) / f_norm


@published(
    "A*-PO: the optimal advantage",
    arxiv="2505.20686",
    certainty="secondary",
    level="group",
)
def a_star_po(
    rewards: Tensor,
    reference_rewards: Tensor,
    *,
    beta: Positive[float] = 0.5,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``A = r - V*``, ``V* = β·log(mean_m exp(r_ref/β))`` from M rewards of the
    reference policy for the prompt. ``[B], [num_groups, M] -> [B]``.

    NaN fills up fewer than M. It is for ``methods.a_star_po``. Prompts that the
    reference never solves are left out beforehand. β is ``beta1`` of TRL's
    ``A2POTrainer``.
    """
    g = grouped("a_star_po", rewards, groups)
    reference = floats("a_star_po", "reference_rewards", reference_rewards).to(g.values.dtype)
    if reference.dim() != 2 or reference.shape[0] != g.groups.count:
        raise InvalidCall(
            f"a_star_po: reference_rewards has shape {tuple(reference.shape)}, expected "
            f"({g.groups.count}, M): M rewards a group."
        )
    known = ~reference.isnan()
    scaled = torch.where(known, reference / beta, -torch.inf)
    value = beta * (scaled.logsumexp(1) - known.sum(1).to(scaled.dtype).log())
    return g.result(g.values - g.groups.spread(value))
