"""Token-level estimators: returns along a completion, with a critic (GAE)
or without."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import NonNegative, PositiveOrInf, Unit, ranged
from .._core.rows.grouped import GroupKeywords, floats, grouped, like, on_device, where_valid
from .._core.rows.groups import describe
from ..errors import InvalidCall
from .outcome import singletons

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Gae(NamedTuple):
    """``advantages`` for the policy and ``returns`` to train the critic on. Both are
    ``[B, T]`` and 0 where masked.
    """

    advantages: Tensor
    returns: Tensor


def _scan(b: Tensor, a: Tensor) -> Tensor:
    """Compute ``y_t = b_t + a_t·y_{t+1}`` backwards along the last dimension, in
    ``log2(T)`` steps without a loop over tokens.
    """
    step = 1
    while step < b.shape[-1]:
        rest = (0, step)
        later_b, later_a = (torch.nn.functional.pad(x[..., step:], rest) for x in (b, a))
        b, a = b + a * later_b, a * later_a
        step *= 2
    return b


def masked(op: str, completion_mask: Tensor) -> Tensor:
    mask = where_valid(op, completion_mask)
    if mask.dim() != 2:
        raise InvalidCall(
            f"{op}: completion_mask has shape {tuple(mask.shape)}, expected (B, T). "
            f"{describe({'completion_mask': mask})}"
        )
    return mask


def token_rewards(op: str, rewards: Tensor | None, mask: Tensor) -> Tensor:
    """Return ``[B, T]`` rewards with 0 where masked. ``[B]`` rewards go to each row's
    last valid token.
    """
    r = floats(op, "rewards", rewards)
    on_device(op, "rewards", r, mask)
    if r.shape == mask.shape:
        return torch.where(mask, r, 0)
    if r.shape != mask.shape[:1]:
        raise InvalidCall(
            f"{op}: rewards has shape {tuple(r.shape)}, expected {tuple(mask.shape)} per token, "
            f"or ({len(mask)},) per completion."
        )
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, r[:, None], 0)


def whiten(x: Tensor, completion_mask: Tensor) -> Tensor:
    """``(x - mean)/sqrt(var + 1e-8)`` over the valid tokens of the call, with unbiased
    ``var``. It is 0 where masked. ``[B, T]``.
    """
    mask = masked("whiten", completion_mask)
    values = torch.where(mask, floats("whiten", "x", x, mask), 0)
    count = mask.sum()
    mean = values.sum() / count.clamp(min=1)
    variance = torch.where(mask, (values - mean) ** 2, 0).sum() / (count - 1).clamp(min=1)
    return torch.where(mask, (values - mean) * (variance + 1e-8).rsqrt(), 0)


@ranged
def discounted_returns(rewards: Tensor, completion_mask: Tensor, *, gamma: Unit[float]) -> Tensor:
    """``R_t = r_t + gamma·R_{t+1}`` over the valid tokens. ``[B, T]`` or ``[B]``,
    ``[B, T] -> [B, T]``.

    A masked token neither discounts nor stops.
    """
    mask = masked("discounted_returns", completion_mask)
    r = token_rewards("discounted_returns", rewards, mask)
    return torch.where(mask, _scan(r, torch.where(mask, gamma * torch.ones_like(r), 1)), 0)


def _gae(
    op: str, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    v = floats(op, "values", values, mask)
    r = token_rewards(op, rewards, mask).to(v.dtype)
    v = torch.where(mask, v, 0)
    one = torch.ones_like(v)
    # the value at t, or at the next valid token
    following = _scan(v, torch.where(mask, 0, one))
    following = torch.nn.functional.pad(following[:, 1:], (0, 1))
    delta = torch.where(mask, r + gamma * following - v, 0)
    decay = lam[:, None] if isinstance(lam, Tensor) and lam.dim() == 1 else lam
    return torch.where(mask, _scan(delta, torch.where(mask, gamma * decay * one, one)), 0)


@published(
    "Generalized Advantage Estimation",
    paper="High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arxiv="1506.02438",
    level="token",
)
def gae(
    rewards: Tensor,
    values: Tensor,
    completion_mask: Tensor,
    *,
    gamma: Unit[float] = 1.0,
    lam: Unit[float | Tensor] = 0.95,
    whitened: bool = True,
) -> Gae:
    """``A_t = sum_k (gamma·lam)^k δ_{t+k}``, ``δ_t = r_t + gamma·V_{t+1} - V_t`` (eq.
    16); returns ``A + V``. ``[B, T]`` or ``[B]``, ``[B, T], [B, T]``.

    Rewards per completion are on the last valid token. A masked token inside a
    completion (a tool's answer) is skipped, and the next valid token follows. With
    ``whitened`` the advantages have mean 0 and variance 1 over the call's valid tokens,
    as in TRL and verl. ``lam`` is a number, or ``[B]`` with one per row.
    """
    mask = masked("gae", completion_mask)
    advantages = _gae("gae", rewards, values, mask, gamma, lam)
    returns = torch.where(mask, advantages + values.detach(), 0)
    return Gae(whiten(advantages, mask) if whitened else advantages, returns)


@published(
    "Value-Calibrated PPO (VC-PPO): decoupled GAE",
    paper="What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret",
    arxiv="2503.01491",
    certainty="secondary",
    level="token",
)
def decoupled_gae(
    rewards: Tensor,
    values: Tensor,
    completion_mask: Tensor,
    *,
    gamma: Unit[float] = 1.0,
    lam_actor: Unit[float | Tensor] = 0.95,
    lam_critic: Unit[float | Tensor] = 1.0,
    whitened: bool = True,
) -> Gae:
    """:func:`gae` with one λ for the policy's advantages and another for the critic's
    returns: two passes of the recursion.

    ``lam_critic=1`` keeps the reward at the end from decaying on its way to the first
    tokens of a long completion; a ``lam_actor`` from 0.95 to below 1 keeps the policy's
    variance down. The value model is trained beforehand on a fixed policy, with λ = 1.
    ``whitened``: the advantages have mean 0 and deviation 1 over the batch.
    """
    mask = masked("decoupled_gae", completion_mask)
    advantages = _gae("decoupled_gae", rewards, values, mask, gamma, lam_actor)
    returns = torch.where(
        mask, _gae("decoupled_gae", rewards, values, mask, gamma, lam_critic) + values.detach(), 0
    )
    return Gae(whiten(advantages, mask) if whitened else advantages, returns)


@published("REINFORCE++", arxiv="2501.03262", level="token")
def reinforce_plus_plus(
    rewards: Tensor, completion_mask: Tensor, *, gamma: Unit[float] = 1.0
) -> Tensor:
    """Discounted returns, normalized over all valid tokens of the batch, without groups
    or a critic. ``[B, T]`` or ``[B]``, ``[B, T] -> [B, T]``.

    The paper's KL penalty is part of the token rewards:
    ``r_t = 1[t = end]·r - β·(logp - ref_logp)``.
    """
    mask = masked("reinforce_plus_plus", completion_mask)
    return whiten(discounted_returns(rewards, mask, gamma=gamma), mask)


@published("REINFORCE++-baseline", arxiv="2501.03262", level="token")
def reinforce_plus_plus_baseline(
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    singleton: str = "zero",
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """``r - mean_g``, normalized over all valid tokens of the batch instead of by the
    group. ``[B], [B, T] -> [B, T]``.

    ``singleton`` is the advantage of a group of one before the normalization,
    ``"zero"`` or ``"reward"`` (verl). A completion without a score is left out of the
    normalization.
    """
    g = grouped("reinforce_plus_plus_baseline", rewards, groups)
    mask = masked("reinforce_plus_plus_baseline", completion_mask)
    if len(mask) != len(g.values):
        raise InvalidCall(
            f"reinforce_plus_plus_baseline: completion_mask has {len(mask)} rows, rewards "
            f"{len(g.values)}."
        )
    return whiten(
        singletons(g, g.centered, singleton)[:, None].expand(mask.shape), mask & g.scored[:, None]
    )


@published(
    "ReMax",
    paper="ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning "
    "Large Language Models",
    arxiv="2310.10505",
    level="token",
)
def remax(
    rewards: Tensor,
    greedy_rewards: Tensor,
    completion_mask: Tensor,
    *,
    reward_clip: PositiveOrInf[float] = math.inf,
    gamma: Unit[float] = 1.0,
    kl_coef: NonNegative[float] = 0.0,
    per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
) -> Tensor:
    """The reward of the prompt's greedy completion is the baseline:
    ``A_t = r - r_greedy``. ``[B], [B], [B, T] -> [B, T]``.

    The defaults are the paper's algorithm 1. The authors' code has ``A_t =
    gamma^n·clip(r - r_greedy, ±reward_clip) - kl_coef·(logp_t - ref_logp_t)``, where
    ``n`` is the number of valid tokens from t to the end, t included, with
    ``reward_clip=5, gamma=0.99, kl_coef=0.05`` in its scripts. The log-probs are those
    at sampling time. The loss is ``methods.reinforce``.
    """
    mask = masked("remax", completion_mask)
    r = floats("remax", "rewards", rewards, (len(mask),))
    gain = (r - like("remax", "greedy_rewards", greedy_rewards, r)).clamp(-reward_clip, reward_clip)
    remaining = mask.flip(-1).cumsum(-1).flip(-1).to(r.dtype)
    advantages = gain[:, None] * gamma**remaining
    if (per_token_logps is None) != (ref_per_token_logps is None) or (kl_coef != 0) != (
        per_token_logps is not None
    ):
        raise InvalidCall(
            "remax: kl_coef needs per_token_logps and ref_per_token_logps; without kl_coef they "
            "would have no effect."
        )
    if per_token_logps is not None:
        logps, ref = (
            floats("remax", name, x, mask).to(r.dtype)
            for name, x in (
                ("per_token_logps", per_token_logps),
                ("ref_per_token_logps", ref_per_token_logps),
            )
        )
        advantages = advantages - kl_coef * (logps - ref)
    return torch.where(mask, advantages, 0)


@published(
    "Heterogeneous Adaptive Policy Optimization: token-level group average",
    arxiv="2509.16591",
    level="group",
)
def hapo(
    rewards: Tensor,
    lengths: Tensor,
    *,
    limit: PositiveOrInf[float] = 5.0,
    epsilon: NonNegative[float] = 1e-6,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """GRPO with mean and standard deviation over the group's *tokens*: a completion
    counts by its length. ``[B], [B] -> [B]``.

    ``mean = sum L_i r_i / sum L_i``, ``std^2 = sum L_i (r_i - mean)^2 / sum L_i``,
    ``A = (r - mean)/(std + epsilon)``, so that the tokens' advantages sum to zero under
    a token mean. A group in which some ``|A| >= limit`` takes GRPO's advantage
    (unbiased) instead. ``lengths``: valid tokens.
    """
    g = grouped("hapo", rewards, groups)
    tokens = g.like("lengths", lengths)
    by_token = (g.values - g.mean(g.values, tokens)) / (g.std(g.values, 0, tokens) + epsilon)
    by_completion = g.centered / (g.std(g.values) + epsilon)
    return g.result(torch.where(g.max(by_token.abs()) >= limit, by_completion, by_token))
