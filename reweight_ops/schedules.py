"""Values that change from step to step: passes over a batch, masks that open, budgets
that grow, a switch between losses.

Steps and progress may be numbers or 0-d tensors, so a schedule recompiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.catalogue.registry import published
from ._core.catalogue.search import published_names
from ._core.ranges import (
    Count,
    CountOrZero,
    Interval,
    NonNegative,
    Positive,
    PositiveOrInf,
    Real,
    Unit,
    ranged,
)
from ._core.rows.grouped import GroupKeywords, floats, grouped, like, where_valid
from ._core.spec.policy import PolicyLossSpec
from .errors import InvalidCall
from .methods.reweighting import lopti as lopti_spec

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveEntropyState",
    "BetaDpo",
    "BetaDpoState",
    "D3sBudget",
    "Relift",
    "ReliftState",
    "all_failed",
    "canon",
    "capo",
    "d3s",
    "drw",
    "dynamic_loss_reweighting",
    "hapo_temperature",
    "lopti",
    "lopti_updates",
    "tsa",
]

_Batch = TypeVar("_Batch")


@published(
    "Low-Probability Token Isolation: the two updates",
    arxiv="2505.12929",
    level="step",
)
def lopti(order: str = "low_first", **options: Any) -> tuple[PolicyLossSpec, PolicyLossSpec]:
    """The losses of the two updates over one batch of rollouts: unlikely tokens first,
    then the others.

    The options are those of ``methods.lopti`` except ``half``. With ``alpha`` it is AR
    and Lopti together. ``order="high_first"`` is the authors' ablation.

    Each is a full update, with its optimizer steps, over **all** mini-batches. The old
    log-probs stay those of the rollout. The order matters. In your own loop use
    :func:`lopti_updates`. In TRL pass both as ``spec`` and set ``num_iterations=2``,
    which gives the same order of updates::

        config = GRPOConfig(num_iterations=2, ...)
        ReweightGRPOTrainer(..., args=config, spec=rw.schedules.lopti(eta=0.5))
    """
    if "half" in options:
        raise InvalidCall(
            "schedules.lopti: half is set by the schedule; use methods.lopti(half=...) for one "
            "of the two losses."
        )
    if order not in ("low_first", "high_first"):
        raise InvalidCall(
            f"schedules.lopti: order is {order!r}, expected 'low_first' or 'high_first'."
        )
    low, high = lopti_spec("low", **options), lopti_spec("high", **options)
    return (low, high) if order == "low_first" else (high, low)


def lopti_updates(
    mini_batches: Iterable[_Batch], **options: Any
) -> Iterator[tuple[PolicyLossSpec, _Batch]]:
    """Yield ``(spec, mini_batch)`` for each optimizer step on one batch of rollouts.
    All mini-batches come with the first loss of :func:`lopti`, then all again with the
    second.

    for spec, batch in rw.schedules.lopti_updates(mini_batches, eta=0.5):
        old = batch["old"]
        out = rw.policy_loss(model(batch), ..., spec=spec, old_per_token_logps=old)
        out.loss.backward()
        optimizer.step()
    """
    batches = list(mini_batches)  # a generator would be empty in the second pass
    for spec in lopti(**options):
        for batch in batches:
            yield spec, batch


@published(
    "Curriculum Advantage Policy Optimization",
    paper="From Imitation to Discrimination: Toward A Generalized Curriculum Advantage "
    "Mechanism Enhancing Cross-Domain Reasoning Tasks",
    arxiv="2512.02580",
    certainty="secondary",
    level="step",
)
def capo(
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    step: NonNegative[int | Tensor],
    switch_step: NonNegative[int | Tensor],
) -> Tensor:
    """The mask of the rows to train on: first imitation, then discrimination. ``[B]``
    or ``[B, T]``, ``[B, T] -> [B, T]`` bool.

    Before ``switch_step`` only rows with ``A >= 0`` are trained (with their KL too),
    and from then on all. The paper switches after 10 to 30 % of the training, so it
    must be given. The expectation is over all samples: pass the result as
    ``completion_mask`` and the original as ``denominator_mask``. Any advantage
    estimator may be used.
    """
    a = floats("capo", "advantages", advantages)
    mask = where_valid("capo", completion_mask)
    if a.shape not in (mask.shape, mask.shape[:-1]):
        raise InvalidCall(
            f"capo: advantages has shape {tuple(a.shape)}, expected {tuple(mask.shape)} or "
            f"{tuple(mask.shape[:-1])}."
        )
    a = a if a.shape == mask.shape else a[..., None]
    return mask & ((a >= 0) | (step >= switch_step))


class D3sBudget(NamedTuple):
    """``num_samples`` (rounded) and ``token_fraction`` of D3S at a point of the
    training.
    """

    num_samples: Annotated[int, Interval(entries="[1, inf)")]
    token_fraction: Annotated[float, Interval(entries="[0, 1]")]


@published(
    "D3S: the dynamic schedule",
    arxiv="2509.22115",
    certainty="secondary",
    level="step",
)
def d3s(
    progress: Unit[float],
    *,
    num_samples: Annotated[tuple[int, int], Interval(entries="[1, inf)", whole=True)],
    token_fraction: Annotated[tuple[float, float], Interval(entries="[0, 1]")],
) -> D3sBudget:
    """Both budgets go linearly from their first to their second value over ``progress``
    in [0, 1]: few samples and tokens first.

    ``num_samples`` is for :func:`reweight_ops.sample_weights.d3s`, ``token_fraction``
    for the token weight. The paper's values were not found, so both ranges must be
    given.
    """
    samples, tokens = ((1 - progress) * a + progress * b for a, b in (num_samples, token_fraction))
    return D3sBudget(round(samples), tokens)


@published(
    "Training Signal Annealing: the threshold",
    arxiv="1904.12848",
    level="step",
)
def tsa(
    progress: Unit[float | Tensor], *, num_classes: Count[int], curve: str = "linear"
) -> float | Tensor:
    """``η = a·(1 - 1/K) + 1/K``: the probability above which a labelled example is left
    out, from 1/K to 1 over training.

    ``a``, by ``curve``, is ``progress`` p in [0, 1] (``"linear"``), ``e^(5(p - 1))``
    (``"exp"``, for little data) or ``1 - e^(-5p)`` (``"log"``). A number gives a
    number, a 0-d tensor a tensor. For tokens ``num_classes`` is the vocabulary.
    """
    exp: Any = torch.exp if isinstance(progress, Tensor) else math.exp
    curves = {"linear": progress, "exp": exp(5 * (progress - 1)), "log": 1 - exp(-5 * progress)}
    if curve not in curves:
        raise InvalidCall(
            f"schedules.tsa: curve is {curve!r}, expected one of {', '.join(curves)}."
        )
    threshold: float | Tensor = curves[curve] * (1 - 1 / num_classes) + 1 / num_classes
    return threshold


@ranged
def all_failed(
    rewards: Tensor, *, fail_value: Real[float] = 0.0, **groups: Unpack[GroupKeywords]
) -> Tensor:
    """Select the prompts for ReLIFT's buffer. ``[B] -> [num_groups]`` bool.

    All completions of such a prompt have exactly ``fail_value``. Other failures do not
    count.
    """
    g = grouped("all_failed", rewards, groups)
    failed = g.groups.sum(((g.values == fail_value) & g.scored).to(g.values.dtype))
    size = g.groups.sum(torch.ones_like(g.values))
    return (failed == size) & (size > 0)


class ReliftState(NamedTuple):
    """``buffered`` is the number of prompts that wait for the SFT step on their
    demonstrations.
    """

    buffered: int


@published(
    "ReLIFT: interleaved online fine-tuning",
    paper="Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for "
    "Hardest Questions",
    arxiv="2506.07527",
    level="step",
)
@dataclass(frozen=True, kw_only=True)
class Relift:
    """A schedule of SFT steps on demonstrations of prompts that the policy cannot
    solve. RL trains the others.

    After each RL step, :meth:`update` counts the prompts that :func:`all_failed` found
    (with their demonstrations they go into the caller's buffer); once ``buffer_size``
    of them wait, it says to do one SFT step on that many. There the RL loss is
    unclipped with
    ``advantages.dr_grpo``, and the SFT step has an optimizer of its own."""

    buffer_size: Count[int] = 128

    def init(self) -> ReliftState:
        """An empty buffer."""
        return ReliftState(0)

    def update(self, state: ReliftState, num_failed: int) -> tuple[ReliftState, bool]:
        """Count ``num_failed`` new prompts in the buffer, and return the state and
        whether to do an SFT step now.

        ``num_failed`` is an int, because the caller has already moved their texts.
        """
        if num_failed < 0:
            raise InvalidCall(f"Relift: num_failed is {num_failed}, expected 0 or more.")
        waiting = state.buffered + num_failed
        due = waiting >= self.buffer_size
        return ReliftState(waiting - self.buffer_size if due else waiting), due


@published(
    "Deferred re-weighting (LDAM-DRW)",
    arxiv="1906.07413",
    level="step",
)
def drw(
    epoch: CountOrZero[int],
    *,
    switch_epoch: CountOrZero[int] = 160,
    beta: Annotated[float, Interval("[0, 1)")] = 0.9999,
) -> float:
    """β of ``sample_weights.class_balanced``: 0 (no re-weighting) before
    ``switch_epoch``, and ``beta`` from then on.

    The default switches at 160 of the authors' 200 epochs.
    """
    return beta if epoch >= switch_epoch else 0.0


@published(
    "Dynamic loss-based sample reweighting: burn-in",
    arxiv="2502.06733",
    level="step",
)
def dynamic_loss_reweighting(
    step: CountOrZero[int],
    *,
    temperature: PositiveOrInf[float],
    burn_in_steps: CountOrZero[int] = 1000,
) -> float:
    """``temperature`` of ``sample_weights.dynamic_loss_reweighting``: ``inf``, all
    weights 1, before ``burn_in_steps``, and from it on as given.

    Losses say little of samples before the model has learned something. 1000 of the
    authors' steps (``burnout_steps`` in their configurations).
    """
    return math.inf if step < burn_in_steps else temperature


@published(
    "Heterogeneous Adaptive Policy Optimization: the sampler's temperature",
    arxiv="2509.16591",
    level="token",
)
def hapo_temperature(
    entropies: Tensor,
    rollout_entropies: Tensor,
    completion_mask: Tensor | None = None,
    *,
    temperature: Positive[float] = 1.0,
    tau: Unit[float] = 0.1,
    pivot: Unit[float] = 0.8,
) -> Tensor:
    """``temperature·(1 + τ·h)``, what each next token is sampled at: higher where the
    policy is unsure. ``[...], [B, T], [B, T] -> [...]``.

    ``h`` goes from -1 at the lowest entropy of the last rollout over 0 at its ``pivot``
    quantile to 1 at the highest, by ``log H``, and no further. ``entropies``: of the
    next token, before any temperature; ``rollout_entropies`` and ``completion_mask``:
    of the last rollout, in nats. The authors' scripts have ``tau=0.05``; their old
    log-probs are at ``temperature``, not at what was sampled with. In the first rollout
    it is ``temperature``.

    Differs from the authors' code, not from the paper: as in ``methods.hapo``, the
    code's h is never negative.
    """
    given = {"entropies": entropies, "rollout_entropies": rollout_entropies}
    log_h, log_rollout = (
        floats("hapo_temperature", name, x).clamp(min=1e-8).log() for name, x in given.items()
    )
    mask = torch.ones_like(log_rollout) if completion_mask is None else completion_mask
    counted = like("hapo_temperature", "completion_mask", mask, log_rollout) != 0
    ordered = torch.where(counted, log_rollout, math.inf).flatten().sort().values
    last = counted.sum() - 1
    low, middle, high = (
        ordered.gather(0, at.long().view(1))
        for at in (0 * last, (pivot * last.double()).round(), last)
    )
    distance = log_h - middle
    h = torch.where(
        distance > 0,
        distance / (high - middle).clamp(min=1e-8),
        distance / (middle - low).clamp(min=1e-8),
    )
    return temperature * (1 + tau * h.clamp(-1, 1))


@published(
    "CANON: the weight of the inter-group comparison",
    arxiv="2509.23962",
    level="step",
)
def canon(
    step: CountOrZero[int],
    *,
    order: str = "intra_first",
    total_steps: Count[int] = 150,
    warmup_steps: CountOrZero[int] = 30,
    cycles: Count[int] = 3,
    lowest: Unit[float] = 0.4,
) -> float:
    """μ of ``advantages.canon(inter_weight=)``: cosine annealing with restarts, as the
    authors' code and its numbers.

    A curve ``f`` rises linearly to its top over ``warmup_steps``,
    ``top·(step + 1)/warmup_steps``, and then falls along a cosine from the top to its
    floor in each of ``cycles`` cycles. ``order="inter_first"``
    (First-Inter-Later-Intra): ``μ = f`` from 1 to ``lowest``. ``"intra_first"``
    (First-Intra-Later-Inter): ``μ = 1 - f``, ``f`` from ``1 - lowest`` to 0, so that μ
    rises to 1.
    """
    if order not in ("intra_first", "inter_first"):
        raise InvalidCall(
            f"schedules.canon: order is {order!r}, expected 'intra_first' or 'inter_first'."
        )
    length = (total_steps - warmup_steps) // cycles
    if length < 1:
        raise InvalidCall(
            f"schedules.canon: {total_steps} steps, {warmup_steps} of them warm-up, are too few "
            f"for {cycles} cycles."
        )
    top, floor = (1.0, lowest) if order == "inter_first" else (1 - lowest, 0.0)
    if step < warmup_steps:
        f = top * (step + 1) / warmup_steps
    else:
        f = (
            floor
            + (top - floor)
            * (1 + math.cos(math.pi * ((step - warmup_steps) % length) / length))
            / 2
        )
    return f if order == "inter_first" else 1 - f


class BetaDpoState(NamedTuple):
    """``gap_mean`` is the running mean of the pairs' log-ratio gaps, a 0-d tensor."""

    gap_mean: Tensor


@published(
    "β-DPO: a β for each batch",
    paper="β-DPO: Direct Preference Optimization with Dynamic β",
    arxiv="2407.08639",
    level="step",
)
@dataclass(frozen=True, kw_only=True)
class BetaDpo:
    """``β = max(beta·(1 + a·(mean gap - M)), 1e-3)``, ``gap`` =
    ``log(π/π_ref)(y_w) - log(π/π_ref)(y_l)``,
    ``M ← momentum·M + (1 - momentum)·mean gap`` first.

    :meth:`update` returns the state and β, a 0-d tensor, for
    ``preference.dpo(beta=...)`` of the same batch. a is 0.6 in the authors' command.
    Differs from the paper: its filter of pairs is not applied. It draws pairs by how
    near their gap is to M.
    """

    beta: Positive[float] = 0.1
    a: NonNegative[float] = 0.6
    momentum: Unit[float] = 0.9

    def init(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> BetaDpoState:
        """Return the state with a mean of 0."""
        return BetaDpoState(torch.zeros((), device=device, dtype=dtype))

    def update(self, state: BetaDpoState, gaps: Tensor) -> tuple[BetaDpoState, Tensor]:
        """Update with ``gaps`` ``[P]`` of all ranks."""
        gap = gaps.detach().to(state.gap_mean).mean()
        mean = self.momentum * state.gap_mean + (1 - self.momentum) * gap
        return BetaDpoState(mean), (self.beta * (1 + self.a * (gap - mean))).clamp(min=1e-3)


class AdaptiveEntropyState(NamedTuple):
    """``coef`` is the coefficient before the target's gate, a 0-d tensor."""

    coef: Tensor


@published(
    "Adaptive entropy control (Skywork-OR1)",
    paper="Skywork Open Reasoner 1 Technical Report",
    arxiv="2505.22312",
    level="step",
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """The coefficient of the entropy bonus.

    It goes one ``step`` up while the entropy is below the target, and one down
    otherwise, in [0, ``coef_max``]. Above the target the coefficient in force is 0.

    :meth:`update` returns the state and the coefficient for the next step, a 0-d
    tensor: nothing waits for the device and nothing is recompiled. The defaults are
    those of the authors' 32B runs::

        state, coef = control.update(state, out.metrics["entropy"])
        spec = rw.methods.grpo(entropy_coef=coef)
    """

    target_entropy: NonNegative[float] = 0.2
    step: NonNegative[float] = 1e-4
    coef_min: NonNegative[float] = 0.0
    coef_max: NonNegative[float] = 0.005

    def init(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> AdaptiveEntropyState:
        """Return the state with a coefficient of ``coef_min``."""
        return AdaptiveEntropyState(torch.full((), self.coef_min, device=device, dtype=dtype))

    def update(
        self, state: AdaptiveEntropyState, entropy: float | Tensor
    ) -> tuple[AdaptiveEntropyState, Tensor]:
        """Update with ``entropy``, the batch's mean.

        A mean that is not finite leaves the coefficient unchanged, and the coefficient
        in force is 0.
        """
        now = torch.as_tensor(entropy, dtype=state.coef.dtype, device=state.coef.device).detach()
        below = now < self.target_entropy
        moved = (state.coef + self.step * (2 * below.to(state.coef.dtype) - 1)).clamp(
            self.coef_min, self.coef_max
        )
        coef = torch.where(torch.isfinite(now), moved, state.coef)
        return AdaptiveEntropyState(coef), torch.where(below, coef, 0)


__getattr__ = published_names("schedule")
