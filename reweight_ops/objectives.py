"""Weights of several objectives that adapt during training.

Each class has frozen settings and a pure ``update(state, ...) -> (state, weights)``.
``K`` rewards or losses have ``[K]`` weights, which multiply rewards
(:func:`reweight_ops.rewards.weighted_mean`), advantages or losses. The state is a
value: keep it, save it with a checkpoint, and pass it to the next update. Nothing here
waits for a GPU, except :class:`HypervolumeRewardWeighting`, whose points are Python
numbers from a validation run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ._core.catalogue.registry import published
from ._core.catalogue.search import published_names
from ._core.ranges import Count, Interval, NonNegative, Positive, Unit
from ._core.rows.grouped import floats
from .errors import InvalidCall

__all__ = [
    "ConstrainedRLHF",
    "GradientRewardWeighting",
    "HypervolumeRewardWeighting",
    "LagrangeState",
    "Recap",
    "RecapState",
    "gradient_influences",
]


def _vector(op: str, name: str, value: Tensor, like: Tensor | None = None) -> Tensor:
    x = floats(op, name, value, like)
    if x.dim() != 1:
        raise InvalidCall(
            f"{op}: {name} has shape {tuple(x.shape)}, expected (K,): one value per objective."
        )
    return x


class LagrangeState(NamedTuple):
    """``multipliers [K]`` before squashing, and the momentum of their
    ascent, ``[K]``."""

    multipliers: Tensor
    momentum: Unit[Tensor]


@published(
    "Constrained RLHF (μ-PPO, ξ-PPO)",
    paper="Confronting Reward Model Overoptimization with Constrained RLHF",
    arxiv="2310.04373",
    level="objective",
)
@dataclass(frozen=True, kw_only=True)
class ConstrainedRLHF:
    """Each reward model has a threshold θ to reach instead of a maximum.

    ``λ = squash(u)``, with ``u`` by gradient descent on ``sum_k λ_k (mean reward_k -
    θ_k)``.

    ``squash="sigmoid"`` is the inequality form (μ-PPO), ``"tanh"`` the equality form
    (ξ-PPO, whose weight may turn negative above θ), ``"none"`` a bare multiplier that
    is kept >= 0. :meth:`update` raises λ while its reward is below θ; :meth:`mix`
    combines the advantages: ``(K - sum λ)·A_KL + sum_k λ_k A_k`` (eq. 6), or
    ``A_KL + sum_k λ_k A_k`` without squashing, each A normalized over the batch. θ has
    no default: it is where a reward model stops to agree with people, found by the
    paper's search.

    Differs from the paper: the authors' code starts ``u`` from a normal of scale 0.01
    (here 0; 0.5 without squashing), clips the gradient of
    ``u`` by its norm, and leaves out the first multiplier in the mix
    without squashing."""

    thresholds: Annotated[tuple[float, ...], Interval(entries="(-inf, inf)")]
    squash: str = "sigmoid"
    learning_rate: Positive[float] = 0.1
    momentum: Unit[float] = 0.1

    def __post_init__(self) -> None:
        if self.squash not in ("sigmoid", "tanh", "none"):
            raise InvalidCall(
                f"ConstrainedRLHF: squash is {self.squash!r}, expected 'sigmoid', 'tanh' or 'none'."
            )
        if not self.thresholds:
            raise InvalidCall(
                "ConstrainedRLHF: thresholds is empty, expected one number for each reward."
            )

    def init(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> LagrangeState:
        """Return the state before the first update."""
        zero = torch.zeros(len(self.thresholds), device=device, dtype=dtype)
        return LagrangeState(zero + 0.5 if self.squash == "none" else zero, zero)

    def multipliers(self, state: LagrangeState) -> Tensor:
        """λ, ``[K]``."""
        u = state.multipliers
        return {"sigmoid": torch.sigmoid(u), "tanh": torch.tanh(u), "none": u}[self.squash]

    def update(self, state: LagrangeState, mean_rewards: Tensor) -> tuple[LagrangeState, Tensor]:
        """Take one step of SGD with momentum on ``u``, and return the state and λ.

        ``mean_rewards [K]`` has each reward's mean over the batch's episodes.
        """
        means = _vector("ConstrainedRLHF", "mean_rewards", mean_rewards, state.multipliers).to(
            state.multipliers.dtype
        )
        # The thresholds are subtracted one by one. A tensor of them would be uploaded
        # at every update, which waits.
        violation = torch.stack(
            [
                mean - threshold
                for mean, threshold in zip(means.unbind(), self.thresholds, strict=True)
            ]
        )
        value = self.multipliers(state)
        slope = {
            "sigmoid": value * (1 - value),
            "tanh": 1 - value**2,
            "none": torch.ones_like(value),
        }[self.squash]
        momentum = self.momentum * state.momentum + slope * violation
        u = state.multipliers - self.learning_rate * momentum
        state = LagrangeState(u.clamp(min=0) if self.squash == "none" else u, momentum)
        return state, self.multipliers(state)

    def mix(self, kl_advantages: Tensor, advantages: Tensor, multipliers: Tensor) -> Tensor:
        """Mix ``[...]`` of the KL reward and ``[..., K]`` of the K rewards into one
        ``[...]``. Each is first normalized over all its elements.
        """
        base = floats("ConstrainedRLHF", "kl_advantages", kl_advantages)
        a = floats(
            "ConstrainedRLHF", "advantages", advantages, (*base.shape, len(self.thresholds))
        ).to(base.dtype)
        weights = _vector("ConstrainedRLHF", "multipliers", multipliers).to(base.dtype)
        base = (base - base.mean()) / (base.std() + 1e-8)
        over = tuple(range(a.dim() - 1))
        a = (a - a.mean(over)) / (a.std(over) + 1e-8)
        rest = 1 if self.squash == "none" else len(self.thresholds) - weights.sum()
        return rest * base + (weights * a).sum(-1)


Front = tuple[tuple[float, ...], ...]


def hypervolume(
    points: Front, reference: Annotated[tuple[float, ...], Interval(entries="(-inf, inf)")]
) -> float:
    """The volume that the points dominate, measured from ``reference``, with all
    objectives maximized.

    It is computed slice by slice along the first objective.
    """
    points = tuple(p for p in points if all(x > r for x, r in zip(p, reference, strict=True)))
    if not points:
        return 0.0
    if len(reference) == 1:
        return max(p[0] for p in points) - reference[0]
    total, low = 0.0, reference[0]
    for high in sorted({p[0] for p in points}):
        total += (high - low) * hypervolume(
            tuple(p[1:] for p in points if p[0] >= high), reference[1:]
        )
        low = high
    return total


@published(
    "Dynamic reward weighting, hypervolume-guided",
    arxiv="2509.11452",
    level="batch",
)
@dataclass(frozen=True, kw_only=True)
class HypervolumeRewardWeighting:
    """Rewards are scaled up after a step that moved the Pareto front:
    ``w = base + scale·tanh(ΔHV)``, 0.5 to 2.

    :meth:`update` takes the K validation metrics after a step, all to be maximized, and
    returns the factor for *all* rewards of the next step. ΔHV is what the point adds to
    the hypervolume of the front over ``reference``, the metrics before training; a
    point that adds something joins the front.

    One factor for the whole batch **cancels** in advantages that are divided by a
    standard deviation: ``advantages.grpo`` does not change, but
    for its epsilon. It acts with ``dr_grpo``, ``rloo`` or
    ``grpo(scale_rewards="none")``.
    """

    reference: Annotated[tuple[float, ...], Interval(entries="(-inf, inf)")]
    base: NonNegative[float] = 0.5
    scale: NonNegative[float] = 1.5

    def init(self) -> Front:
        """Return the empty front. The factor of the first step is 1."""
        return ()

    def update(self, state: Front, metrics: tuple[float, ...]) -> tuple[Front, float]:
        """Update the front with ``metrics``, K Python numbers. This is host work, once
        per validation.
        """
        point = tuple(float(x) for x in metrics)
        if len(point) != len(self.reference):
            raise InvalidCall(
                f"HypervolumeRewardWeighting: {len(point)} metrics, but the reference has "
                f"{len(self.reference)}."
            )
        if not all(math.isfinite(x) for x in point):
            raise InvalidCall(f"HypervolumeRewardWeighting: metrics {point} are not finite.")
        gain = hypervolume((*state, point), self.reference) - hypervolume(state, self.reference)
        gain = gain if gain > 1e-12 else 0.0
        return ((*state, point) if gain else state), self.base + self.scale * math.tanh(gain)


def gradient_influences(gradients: Tensor) -> Tensor:
    """``I_k = sum_j <g_k, g_j>``: how much a step on objective k helps all of them.
    ``[K, P] -> [K]``.

    P is the number of flattened gradient entries of some layers.
    """
    g = floats("gradient_influences", "gradients", gradients)
    if g.dim() != 2:
        raise InvalidCall(
            f"gradient_influences: gradients has shape {tuple(g.shape)}, expected (K, P): one "
            "flat gradient per objective."
        )
    return g @ g.sum(0)


@published(
    "Dynamic reward weighting, gradient-based",
    arxiv="2509.11452",
    level="objective",
)
@dataclass(frozen=True, kw_only=True)
class GradientRewardWeighting:
    """Mirror ascent on the simplex:
    ``w <- softmax(log w + learning_rate/regularization·I)``, from ``w = 1/K``.

    ``I [K]``: influences of the objectives' gradients, :func:`gradient_influences`;
    they cost a backward pass each (the authors take layers 10 to
    25 of Qwen3-8B). The reward of the next step is ``sum_k w_k r_k``. ``learning_rate``
    is the policy's.
    """

    learning_rate: Positive[float] = 1e-6
    regularization: Positive[float] = 1e-5

    def init(
        self,
        count: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the state, ``log w`` of K equal weights."""
        return torch.full((count,), -math.log(count), device=device, dtype=dtype)

    def update(self, state: Tensor, influences: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new ``log w``, which cannot underflow, and ``w``."""
        step = self.learning_rate / self.regularization
        state = torch.log_softmax(
            state
            + step
            * _vector("GradientRewardWeighting", "influences", influences, state).to(state.dtype),
            0,
        )
        return state, state.exp()


class RecapState(NamedTuple):
    """``history [2·window, K]`` has the latest losses last. ``seen`` is the number of
    updates, 0-d int64.
    """

    history: Tensor
    seen: Tensor


@published(
    "RECAP: replay-enhanced capability preservation",
    paper="Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large "
    "Reasoning Models",
    arxiv="2510.21978",
    certainty="secondary",
    level="objective",
)
@dataclass(frozen=True, kw_only=True)
class Recap:
    """Objectives that converge slowly, or unsteadily, count more:
    ``w = K·softmax(s/temperature)``, ``L = 1/K·sum_k w_k L_k``.

    ``s = c + i``: ``c = μ/μ~`` with the mean loss μ of the last ``window`` updates and
    μ~ of the ``window`` before; ``i = σ/(μ + μ~)`` with the standard deviation σ of the
    last window. ``window`` was not found stated, so it must be given.

    The abstract says "away from saturated objectives", which this formula, from notes
    on the paper, only does for losses that stay low and steady relative to themselves:
    one that no longer falls has ``c = 1``, one that falls ``c < 1``, whatever their
    size.

    Differs from the paper: until two windows are full the weights are 1; σ is the
    population's.
    """

    window: Count[int]
    temperature: Positive[float] = 5.0

    def init(
        self,
        count: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RecapState:
        """Return the state of K objectives before the first loss."""
        history = torch.zeros(2 * self.window, count, device=device, dtype=dtype)
        return RecapState(history, torch.zeros((), device=device, dtype=torch.int64))

    def update(self, state: RecapState, losses: Tensor) -> tuple[RecapState, Tensor]:
        """Update with ``losses [K]``, this step's positive loss of each objective."""
        latest = _vector("Recap", "losses", losses, state.history[0]).to(state.history.dtype)
        state = RecapState(torch.cat([state.history[1:], latest[None]]), state.seen + 1)
        before, last = state.history[: self.window], state.history[self.window :]
        mean, mean_before = last.mean(0), before.mean(0)
        score = mean / mean_before + last.std(0, correction=0) / (mean + mean_before)
        weights = len(latest) * torch.softmax(score / self.temperature, 0)
        return state, torch.where(state.seen >= 2 * self.window, weights, 1)


__getattr__ = published_names("objective")
