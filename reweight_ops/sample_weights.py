"""One weight, or one choice, per sample.

The weights are for the ``token_weights`` of :func:`reweight_ops.policy_loss`, or they
select rows. All are pure functions, ``[B]`` in and out unless stated, in fp32 or fp64.
Inputs are detached (except the logits of :func:`source_weights`). If a paper normalizes
weights to a sum of 1, they have **mean 1** here, so that the mean of ``weight·loss``
over the batch is the paper's ``sum_i w_i loss_i``. For weights over a global batch,
first gather the inputs of all ranks, then take your rows of the result. Groups are as
in :mod:`reweight_ops._core.rows.grouped`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from ._core.calls.unused_options import forbid_unused
from ._core.catalogue.registry import published
from ._core.catalogue.search import published_names
from ._core.ranges import Count, Interval, NonNegative, Positive, PositiveOrInf, Real
from ._core.rows.grouped import Grouped, GroupKeywords, floats, grouped, indices, like, require
from ._core.rows.groups import describe
from .errors import InvalidCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "class_balanced",
    "d3s",
    "dynamic_loss_reweighting",
    "dynamic_sampling",
    "exponential_advantage",
    "focal",
    "glow",
    "kl_dro",
    "kl_tilt",
    "raft",
    "selective_rehearsal",
    "source_weights",
    "trajectory_aw",
    "trajectory_rw",
    "upweight",
]


def _softmax(g: Grouped, scores: Tensor) -> Tensor:
    """Return the softmax over a group, times its size, so that its mean is 1. It is 0
    for a row without a score.
    """
    top = g.max(scores)
    e = torch.where(g.scored, (scores - torch.where(top.isneginf(), 0, top)).exp(), 0)
    return g.result(g.size * e / torch.where(g.size > 0, g.sum(e), 1))


@published(
    "Exponential advantage weight (AWR, FamO2O)",
    paper="Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
    arxiv="1910.00177",
    level="sequence",
)
def exponential_advantage(
    advantages: Tensor, *, temperature: Positive[float | Tensor], max_weight: PositiveOrInf[float]
) -> Tensor:
    """``w = min(exp(A/temperature), max_weight)``: regression to good samples. Any
    shape. The loss is ``-sum w·logp``.

    ``temperature`` is a number, or a tensor that broadcasts. FamO2O (arXiv:2310.17966)
    has one per prompt: ``w = min(exp(β(s)·A), 100)`` with a learned β, so
    ``temperature=1/β, max_weight=100``; the reading of a state as a prompt is ours.
    Neither parameter has one value for all tasks, so both must be given. The exponent
    is capped before ``exp``, so nothing overflows.
    """
    x = floats("exponential_advantage", "advantages", advantages)
    return (x / temperature).clamp(max=math.log(max_weight)).exp()


@published(
    "KL-tilted optimum",
    paper="Asymptotics of Language Model Alignment",
    arxiv="2404.01730",
    certainty="derived",
    level="group",
)
def kl_tilt(rewards: Tensor, *, beta: Positive[float], **groups: Unpack[GroupKeywords]) -> Tensor:
    """``w_i = n·exp(r_i/beta)/sum_j exp(r_j/beta)`` over a group's samples.

    These weights turn samples of the reference into samples of the optimum.

    Derived: ``p·exp(r/beta)`` is the textbook solution of reward maximization under a
    KL penalty of coefficient beta, which the paper starts from; the self-normalized
    estimate over a group is ours. Without group arguments the batch is one group.
    """
    g = grouped("kl_tilt", rewards, groups, whole=True)
    return _softmax(g, g.values / beta)


@published(
    "KL-constrained distributionally robust weights",
    paper="Doubly Robust Instance-Reweighted Adversarial Training",
    arxiv="unknown",
    certainty="secondary",
    level="sequence",
)
def kl_dro(
    losses: Tensor, *, temperature: Positive[float], **groups: Unpack[GroupKeywords]
) -> Tensor:
    """``w_i = n·exp(loss_i/temperature)/sum_j exp(loss_j/temperature)``: the worst
    distribution within a KL penalty, hard samples first.

    The maximum over w of ``mean(w·loss) - temperature·KL(w/n || uniform)``. Without
    group arguments the batch is one group.

    The paper appeared at ICLR 2024, openreview.net/forum?id=OF5x1dzWSS. It is on arXiv
    too (August 2023), but no source that we could read prints its id.
    """
    g = grouped("kl_dro", losses, groups, name="losses", whole=True)
    return _softmax(g, g.values / temperature)


@published(
    "Dynamic loss-based sample reweighting",
    arxiv="2502.06733",
    level="sequence",
)
def dynamic_loss_reweighting(
    losses: Tensor,
    *,
    temperature: PositiveOrInf[float],
    strategy: str = "linupper",
    delta: Positive[float] = 1.0,
) -> Tensor:
    """``w = n·softmax(f(h)/temperature)``, where ``h`` maps the losses of the batch to
    a line: ``h = delta·(2·loss - max - min)/(max - min)``.

    ``f``, the ``strategy``, is ``min(h + delta, delta)`` (``"linupper"``: easy samples
    are held back), ``1 - h²/delta²`` (``"quadratic"``: the middle), ``(h + delta)/2``
    (``"upper"``) or ``|h|`` (``"extremes"``). ``losses``: each sample's mean token
    loss, over the global batch. ``temperature`` (``r``): 0.4 and 1 in the authors'
    configurations, best annealed from high; ``inf`` is weight 1, which
    ``schedules.dynamic_loss_reweighting`` gives for the first 1000 steps, as they do.
    Equal losses: equal weights.
    """
    g = grouped("dynamic_loss_reweighting", losses, {}, name="losses", whole=True)
    x, high, low = g.values, g.max(g.values), g.min(g.values)
    h = delta * (2 * x - high - low) / (high - low).clamp(min=1e-6)
    curves = {
        "linupper": (h + delta).clamp(max=delta),
        "quadratic": 1 - h**2 / delta**2,
        "upper": (h + delta) / 2,
        "extremes": h.abs(),
    }
    if strategy not in curves:
        raise InvalidCall(
            f"dynamic_loss_reweighting: strategy is {strategy!r}, expected one of "
            f"{', '.join(curves)}."
        )
    reads = {"delta": strategy != "quadratic"}  # where it cancels
    forbid_unused(
        "dynamic_loss_reweighting",
        dynamic_loss_reweighting,
        {"delta": delta},
        "strategy='quadratic'",
        reads,
    )
    return _softmax(g, curves[strategy] / temperature)


@published(
    "Gain-based Loss Weighting",
    paper="Learning from Mistakes: Negative Reasoning Samples Enhance Out-of-Domain Generalization",
    arxiv="2601.04992",
    level="sequence",
)
def glow(
    losses: Tensor,
    previous_losses: Tensor | None,
    *,
    alpha: NonNegative[float] = 1.0,
    beta: Positive[float] = 20.0,
    min_weight: NonNegative[float] = 0.5,
    max_weight: PositiveOrInf[float] = 5.0,
) -> Tensor:
    """``w = clip(alpha·(1 - sigmoid(beta·(previous - loss))), min_weight,
    max_weight)``: a sample that has improved since the last epoch counts less.

    Losses are each sample's token mean, now and in the last epoch.
    ``previous_losses=None`` is the first epoch, whose weights are 1. NaN is a sample
    without history; the mean of the batch's losses replaces it, as in the authors'
    code. ``alpha`` and ``beta`` are the argument defaults of that code, which sweeps 1
    to 2 and 5 to 30.
    """
    x = floats("glow", "losses", losses)
    if previous_losses is None:
        return torch.ones_like(x)
    previous = like("glow", "previous_losses", previous_losses, x)
    gain = torch.where(previous.isnan(), x.nanmean(), previous) - x
    return (alpha * torch.sigmoid(-beta * gain)).clamp(min_weight, max_weight)


@published(
    "Reward-ranked fine-tuning: best of K",
    paper="RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
    arxiv="2304.06767",
    level="group",
)
def raft(rewards: Tensor, *, keep: Count[int] = 1, **groups: Unpack[GroupKeywords]) -> Tensor:
    """1 for the ``keep`` completions of the group with the highest rewards, else 0.

    Of equal rewards the first is kept. The loss is that of the likelihood.

    SuperHF (arXiv:2310.16763) keeps the same one of its 16; its loss is
    ``divergences.superhf``. A completion without a score is never kept.
    """
    g = grouped("raft", rewards, groups)
    return g.result((g.rank(-g.values) < keep).to(g.values.dtype))


@published(
    "D3S: samples of the greatest advantage variance",
    arxiv="2509.22115",
    certainty="secondary",
    level="batch",
)
def d3s(advantages: Tensor, *, num_samples: Count[int], **groups: Unpack[GroupKeywords]) -> Tensor:
    """1 for the ``num_samples`` rows whose advantages have the greatest variance, else
    0. Without group arguments, over the whole batch (the default there).

    Such a subset always has the k highest and the ``num_samples - k`` lowest
    advantages, so all k are tried. Of equal variances the subset with more high ones is
    taken. Advantages are not normalized again. The abstract states this choice; the
    rest is secondary. ``num_samples`` grows over training by a schedule,
    :func:`reweight_ops.schedules.d3s`. Its values were not found, so it must be given.
    With group arguments (the variant D3S-I) it counts per group.
    """
    g = grouped("d3s", advantages, groups, name="advantages", whole=True)
    x = torch.where(g.scored, g.values - g.mean(g.values), 0)
    ordered = x[g.order(x)].double()
    sums, squares = (torch.cat([y.new_zeros(1), y.cumsum(0)]) for y in (ordered, ordered**2))
    start = g.start[: g.groups.count, None]
    size = g.groups.sum(g.scored.to(x.dtype)).long()[:, None]
    chosen = size.clamp(max=num_samples)
    low = torch.arange(num_samples + 1, device=x.device)[None]  # how many of the lowest
    high = (chosen - low).clamp(min=0)

    def total(prefix: Tensor) -> Tensor:
        at = [start + low.minimum(size), start, start + size, start + size - high]
        below, zero, end, above = (prefix[k] for k in at)
        return below - zero + end - above

    variance = total(squares) - total(sums) ** 2 / chosen.clamp(min=1)
    best = torch.where(low <= chosen, variance, -math.inf).argmax(1, keepdim=True)
    fill = torch.zeros_like(g.start[-1:])  # for rows of no group
    lowest, total_size, taken = (
        torch.cat([y.squeeze(1), fill])[g.index] for y in (best, size, chosen)
    )
    rank = g.rank(x)
    return g.result(((rank < lowest) | (rank >= total_size - (taken - lowest))).to(x.dtype))


@published(
    "Weights of data sources (ScaleBiO, DreamPRM)",
    paper="ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting",
    arxiv="2406.19976",
    level="source",
)
def source_weights(
    source_logits: Tensor, source_ids: Tensor, *, normalize: str = "softmax"
) -> Tensor:
    """A learned weight for each source, spread over its samples. ``[S], [B] -> [B]``,
    differentiable in ``source_logits``.

    ``normalize="softmax"`` (ScaleBiO): sample i of source s has ``B·softmax(a)_s/n_s``
    with the count ``n_s`` of its source in the batch, so that the mean of ``w·loss`` is
    ``sum_s softmax(a)_s·mean loss_s``. ``"softplus"`` (DreamPRM, arXiv:2505.20241):
    ``softplus(a)_s/mean(softplus(a))``, whatever the counts. The logits are trained by
    an outer loss on validation data; as ``token_weights`` that require grad these take
    the two-pass plan, exactly.
    """
    if normalize not in ("softmax", "softplus"):
        raise InvalidCall(
            f"source_weights: normalize is {normalize!r}, expected 'softmax' or 'softplus'."
        )
    floats("source_weights", "source_logits", source_logits)
    if source_logits.dim() != 1 or not source_logits.is_floating_point():
        raise InvalidCall(
            "source_weights: source_logits must be (S,) and floating. "
            f"{describe({'source_logits': source_logits})}"
        )
    if not isinstance(source_ids, Tensor) or source_ids.dim() != 1:
        raise InvalidCall(
            "source_weights: source_ids must be (B,), the source of each sample. "
            f"{describe({'source_ids': source_ids})}"
        )
    source_ids = indices(
        "source_weights",
        "source_ids",
        source_ids,
        tuple(source_ids.shape),
        len(source_logits),
        "the number of sources",
    )
    ones = torch.ones(source_ids.shape, device=source_ids.device, dtype=source_logits.dtype)
    g = grouped(
        "source_weights",
        ones,
        {"group_ids": source_ids, "num_groups": len(source_logits)},
        name="source_ids",
    )
    if normalize == "softplus":
        positive = torch.nn.functional.softplus(source_logits)
        return g.groups.spread(positive / positive.mean())
    return len(ones) * g.groups.spread(torch.softmax(source_logits, 0)) / g.size


@published(
    "Generalized focal loss (dequity)",
    paper="DatasetEquity: Are All Samples Created Equal? In The Quest For Equity Within Datasets",
    arxiv="2308.09878",
    level="sequence",
)
def focal(
    likelihoods: Tensor, *, eta: NonNegative[float] = 1.0, gamma: NonNegative[float] = 5.0
) -> Tensor:
    """``w = (eta + (1 - p)^gamma)/(eta + 1)``: rare samples count more, common ones
    never less than ``eta/(eta + 1)``. Any shape.

    ``likelihoods`` is p in [0, 1]: how common a sample is in its data set (or, in our
    reading for tokens, a detached probability).
    """
    p = floats("focal", "likelihoods", likelihoods)
    return (eta + (1 - p) ** gamma) / (eta + 1)


def _trajectory(op: str, scores: Tensor, scored: Tensor, temperature: float) -> Tensor:
    g = grouped(op, torch.where(scored, scores, torch.nan), {}, name="returns", whole=True)
    low, high = g.min(g.values), g.max(g.values)
    spread = high - low
    return _softmax(g, (g.values - low) / torch.where(spread > 0, spread, 1) / temperature)


@published("Return weighting (RW)", arxiv="2306.13085", level="sequence")
def trajectory_rw(returns: Tensor, *, temperature: Positive[float] = 0.1) -> Tensor:
    """``w = n·softmax(u/temperature)``, ``u`` the returns of the data set on a line
    from 0 to 1 (min to max).

    The paper samples trajectories with probability ``w/n``; as a loss weight the
    expectation is the same. All tokens of a trajectory have its weight.

    Differs from the paper: one of the authors' two implementations forgets the
    normalization to [0, 1]; this is the other.
    """
    x = floats("trajectory_rw", "returns", returns)
    return _trajectory("trajectory_rw", x, ~x.isnan(), temperature)


@published("Advantage weighting (AW)", arxiv="2306.13085", level="sequence")
def trajectory_aw(
    returns: Tensor, start_values: Tensor, *, temperature: Positive[float] = 0.1
) -> Tensor:
    """:func:`trajectory_rw` of ``returns - start_values``, so that a good trajectory
    from a bad start does not lose weight.

    ``start_values``: V(s_0) of each trajectory; the authors fit a linear regression of
    the return on the first state. For completions the mean of the prompt's group is the
    obvious reading (ours): pass ``advantages.dr_grpo(...)`` as returns and zeros.
    """
    x = floats("trajectory_aw", "returns", returns)
    return _trajectory(
        "trajectory_aw",
        x - like("trajectory_aw", "start_values", start_values, x),
        ~x.isnan(),
        temperature,
    )


@published(
    "Selective rehearsal",
    paper="Stabilizing RLHF through Advantage Model and Selective Rehearsal",
    arxiv="2309.10202",
    certainty="derived",
    level="sequence",
)
def selective_rehearsal(
    scores: Tensor,
    *,
    keep: Count[int],
    coef: NonNegative[float] = 0.01,
    **clusters: Unpack[GroupKeywords],
) -> Tensor:
    """``coef`` for the ``keep`` best examples of each cluster, else 0:
    ``L = L_PPO + mean_i(w_i·NLL_i)`` over the rehearsal examples.

    Derived: the paper rehearses, by likelihood, good examples that represent clusters
    of the supervised data, with coefficient 0.01. The number per cluster was not found,
    so ``keep`` must be given. ``scores`` come from the reward or advantage model, and
    clusters are given as groups. The advantage model itself is trained by a loss of a
    reward model, not of a policy.
    """
    return coef * raft(scores, keep=keep, **clusters)


@published(
    "Dynamic sampling: which prompts teach something",
    arxiv="2503.14476",
    level="group",
)
def dynamic_sampling(
    rewards: Tensor,
    *,
    low: Real[float] | None = None,
    high: Real[float] | None = None,
    **groups: Unpack[GroupKeywords],
) -> Tensor:
    """1 for the responses of a prompt whose rewards differ and whose mean reward is in
    ``[low, high]``, else 0. ``[B] -> [B]``.

    For 0/1 rewards these are prompts with neither all right nor all wrong (eq. 11).
    ``low`` and ``high`` are a band of difficulty. A group of one is kept if it is in
    the band, as verl's ``filter_groups`` keeps it. DAPO samples again until the batch
    is full. This function only tells which prompts to leave out.
    """
    g = grouped("dynamic_sampling", rewards, groups)
    mean = g.mean(g.values)
    kept = (g.max(g.values) > g.min(g.values)) | (g.size == 1)
    for bound, inside in ((low, mean.ge), (high, mean.le)):
        if bound is not None:
            kept = kept & inside(bound)
    return g.result(kept.to(g.values.dtype))


@published(
    "Class-balanced weights (LDAM-DRW's)",
    arxiv="1906.07413",
    level="sequence",
)
def class_balanced(
    labels: Tensor, class_counts: Tensor, *, beta: Annotated[float, Interval("[0, 1)")] = 0.9999
) -> Tensor:
    """``(1-β)/(1-β^n_y)`` of each label's class, over the mean of that over the K
    classes. ``[...]`` int labels, ``[K] -> [...]``.

    These are effective numbers of samples (arXiv:1901.05555). β = 0 is weight 1. For
    deferred re-weighting, ``schedules.drw`` gives β. The result is for
    ``token_weights``, one per token.
    """
    counts = floats("class_balanced", "class_counts", class_counts)
    if counts.dim() != 1:
        raise InvalidCall(
            f"class_balanced: class_counts has shape {tuple(counts.shape)}, expected (K,)."
        )
    counts = require(
        "class_balanced",
        counts >= 1,
        "a class has no sample; pass only classes with samples.",
        counts,
    )
    weight = (
        (1 - beta) / -torch.expm1(counts * math.log(beta)) if beta > 0 else torch.ones_like(counts)
    )
    ids = indices("class_balanced", "labels", labels, None, len(counts), "len(class_counts)")
    return torch.cat([weight / weight.mean(), weight.new_full((1,), torch.nan)])[ids]


@published(
    "Upweighting to a temperature (scalarisation)",
    paper="Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets",
    arxiv="2410.04579",
    certainty="secondary",
    level="sequence",
)
def upweight(
    source_ids: Tensor,
    source_counts: Tensor,
    *,
    temperature: Annotated[float, Interval("[1, inf]")],
) -> Tensor:
    """``w = p_k·N/n_k``, ``p_k ∝ n_k^(1/τ)``. ``[B], [K] -> [B]``.

    With these weights the mean loss of uniformly drawn samples is that of temperature
    sampling.

    τ = 1 gives weight 1, and ``inf`` gives every source the same total. Cooldown is a τ
    that falls during training; the paper's curve was not found.
    """
    n = floats("upweight", "source_counts", source_counts)
    if n.dim() != 1:
        raise InvalidCall(f"upweight: source_counts has shape {tuple(n.shape)}, expected (K,).")
    share = torch.softmax(n.log() / temperature, 0)
    ids = indices("upweight", "source_ids", source_ids, None, len(n), "len(source_counts)")
    return torch.cat([share * n.sum() / n, n.new_full((1,), torch.nan)])[ids]


if not TYPE_CHECKING:  # which would take any name for one
    __getattr__ = published_names("sample_weight")
