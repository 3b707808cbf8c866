"""The terms of pair losses: functions of margins and log-ratios.

Names and defaults are TRL's if TRL has the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.ranges import CountOrZero, Interval, Number, Positive, Real, ranged
from .._core.rows.numerics import log1mexp
from .._core.rows.pairs import Pairs
from .._core.spec.pair_parts import PairLoss
from ..errors import InvalidCall

#: The distances of the answers that a list loss compares.
Skips: TypeAlias = Annotated[
    tuple[int, ...] | Literal["all"], Interval(entries="[1, inf)", whole=True, words=("all",))
]


def smoothed(x: Tensor, epsilon: Number) -> Tensor:
    """``-(1-ε)·log σ(x) - ε·log σ(-x)``."""
    if isinstance(epsilon, (int, float)) and epsilon == 0:
        return -F.logsigmoid(x)
    loss: Tensor = -(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)
    return loss


def squared(x: Tensor) -> Tensor:
    return x * x


@ranged
@dataclass(frozen=True, kw_only=True)
class Sigmoid(PairLoss):
    """``-(1-ε)·log σ(β·m - target) - ε·log σ(-(β·m - target))``, with the margin ``m``.
    ``average`` takes scores per token.
    """

    label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.0
    target: Real[Number] = 0.0
    average: bool = False

    def loss(self, p: Pairs) -> Tensor:
        return smoothed(
            p.beta * (averaged_margins(p) if self.average else p.margins) - self.target,
            self.label_smoothing,
        )


def averaged_margins(p: Pairs) -> Tensor:
    """Return the margin of scores divided by their sequences' lengths."""
    chosen, rejected = (side.scores / side.lengths.clamp(min=1) for side in (p.chosen, p.rejected))
    return chosen - rejected


@ranged
@dataclass(frozen=True, kw_only=True)
class Robust(PairLoss):
    """``(-(1-ε)·log σ(β·m) + ε·log σ(-β·m)) / (1 - 2ε)``: unbiased under flipped
    labels. arXiv:2403.00409.
    """

    label_smoothing: Annotated[Number, Interval("[0, 0.5)")] = 0.0

    def loss(self, p: Pairs) -> Tensor:
        e, x = self.label_smoothing, p.beta * p.margins
        loss: Tensor = (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)
        return loss


@dataclass(frozen=True, kw_only=True)
class Hinge(PairLoss):
    """``max(0, 1 - β·m)``. arXiv:2305.10425."""

    def loss(self, p: Pairs) -> Tensor:
        return torch.relu(1 - p.beta * p.margins)


@ranged
@dataclass(frozen=True, kw_only=True)
class Ipo(PairLoss):
    """``(m - 1/(2β))²``. arXiv:2310.12036, eq. 17.

    ``average`` takes scores per token, as TRL does with the authors' consent.
    """

    average: bool = True

    def loss(self, p: Pairs) -> Tensor:
        return squared((averaged_margins(p) if self.average else p.margins) - 1 / (2 * p.beta))


@ranged
@dataclass(frozen=True, kw_only=True)
class ExoPair(PairLoss):
    """``KL(σ(±β·m) ‖ (1-ε, ε))``. arXiv:2402.00856, eq. 16."""

    label_smoothing: Annotated[float, Interval("(0, 1)")] = 1e-3

    def loss(self, p: Pairs) -> Tensor:
        x = p.beta * p.margins
        chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-self.label_smoothing))
        return chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class NcaPair(PairLoss):
    """``-log σ(r_w) - ½·log σ(-r_w) - ½·log σ(-r_l)``, ``r = β·log-ratio``.
    arXiv:2402.05369.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    def loss(self, p: Pairs) -> Tensor:
        chosen, rejected = p.beta * p.chosen.logratios, p.beta * p.rejected.logratios
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True, kw_only=True)
class BcoPair(PairLoss):
    """``-log σ(r_w) - log σ(-r_l)``. arXiv:2404.04656, without its reward shift, as in
    TRL.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    def loss(self, p: Pairs) -> Tensor:
        return -F.logsigmoid(p.beta * p.chosen.logratios) - F.logsigmoid(
            -p.beta * p.rejected.logratios
        )


@dataclass(frozen=True, kw_only=True)
class SppoHard(PairLoss):
    """``(log-ratio_w - 1/(2β))² + (log-ratio_l + 1/(2β))²``. arXiv:2405.00675, eq. 4.7
    with hard labels.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    def loss(self, p: Pairs) -> Tensor:
        return squared(p.chosen.logratios - 0.5 / p.beta) + squared(
            p.rejected.logratios + 0.5 / p.beta
        )


@ranged
@dataclass(frozen=True, kw_only=True)
class Aot(PairLoss):
    """The sigmoid loss of the k-th smallest against the k-th smallest, sorted over the
    batch. arXiv:2406.05882.

    It compares the policy's and the reference's log-ratios of pairs, or with
    ``paired=False`` chosen and rejected log-ratios.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.0
    paired: bool = True

    def loss(self, p: Pairs) -> Tensor:
        chosen, rejected = p.chosen, p.rejected
        assert chosen.ref_logps is not None and rejected.ref_logps is not None
        if self.paired:
            left, right = chosen.logps - rejected.logps, chosen.ref_logps - rejected.ref_logps
        else:
            left, right = chosen.logratios, rejected.logratios
        # Ignored pairs sort last on both sides. A loss belongs to the pair of its left
        # value.
        left, order = torch.where(p.keep, left, torch.inf).sort()
        right = torch.where(p.keep, right, torch.inf).sort().values
        there = torch.arange(left.numel(), device=left.device) < p.keep.sum()
        losses = smoothed(
            p.beta * (torch.where(there, left, 0) - torch.where(there, right, 0)),
            self.label_smoothing,
        )
        return torch.zeros_like(losses).scatter(0, order, losses)


@dataclass(frozen=True, kw_only=True)
class ApoZero(PairLoss):
    """``1 - σ(r_w) + σ(r_l)``: for chosen answers better than the model's own.
    arXiv:2408.06266, eq. 7.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    def loss(self, p: Pairs) -> Tensor:
        return torch.sigmoid(-p.beta * p.chosen.logratios) + torch.sigmoid(
            p.beta * p.rejected.logratios
        )


@dataclass(frozen=True, kw_only=True)
class ApoDown(PairLoss):
    """``σ(r_w) + 1 - σ(r_w - r_l)``: for chosen answers worse than the model's own.
    arXiv:2408.06266, eq. 8.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    def loss(self, p: Pairs) -> Tensor:
        chosen, rejected = p.chosen.logratios, p.rejected.logratios
        return torch.sigmoid(p.beta * chosen) + torch.sigmoid(-p.beta * (chosen - rejected))


@ranged
@dataclass(frozen=True, kw_only=True)
class Discopop(PairLoss):
    """``-(1-g)·log σ(x) + g·exp(-x)``, ``x = β·m``, ``g = σ(x/τ)``. arXiv:2406.08414,
    eq. 5.
    """

    tau: Positive[Number] = 0.05

    def loss(self, p: Pairs) -> Tensor:
        x = p.beta * p.margins
        gate = torch.sigmoid(x / self.tau)
        # There is only one exponent, because exp(-x) alone is inf where the gate is 0.
        return -F.logsigmoid(x) * (1 - gate) + torch.exp(F.logsigmoid(x / self.tau) - x)


@ranged
@dataclass(frozen=True, kw_only=True)
class ChosenNll(PairLoss):
    """The negative log-likelihood of the chosen sequences.

    ``per="batch"`` is the mean over all their tokens (TRL's ``sft``), ``"sequence"`` is
    each one's token mean, and ``"sum"`` is each one's sum. ``side`` selects another
    sequence of the group (TPO's gold responses are the third).
    """

    per: str = "batch"
    side: CountOrZero[int] = 0

    def __post_init__(self) -> None:
        if self.per not in ("batch", "sequence", "sum"):
            raise InvalidCall(
                f"ChosenNll: per is {self.per!r}, expected 'batch', 'sequence' or 'sum'."
            )

    def loss(self, p: Pairs) -> Tensor:
        side = p.sides[self.side]
        if self.per == "batch":
            return -(side.sums.sum() / side.lengths.sum().clamp(min=1)).expand(p.keep.shape)
        return -side.mean_logps if self.per == "sequence" else -side.sums


@dataclass(frozen=True, kw_only=True)
class OddsRatio(PairLoss):
    """``-log σ(log odds(y_w) - log odds(y_l))``, ``odds = P/(1-P)`` and ``P`` the
    geometric mean of the tokens' probabilities.
    """

    def loss(self, p: Pairs) -> Tensor:
        chosen, rejected = (x - log1mexp(x) for x in (p.chosen.mean_logps, p.rejected.mean_logps))
        return -F.logsigmoid(chosen - rejected)


@dataclass(frozen=True, kw_only=True)
class SoftLabel(PairLoss):
    """``-c·log σ(β·m) - (1-c)·log σ(-β·m)`` with the caller's ``consistency`` c of each
    pair.
    """

    reads: ClassVar[tuple[str, ...]] = ("consistency",)

    def loss(self, p: Pairs) -> Tensor:
        return smoothed(p.beta * p.margins, 1 - p.inputs["consistency"])


@dataclass(frozen=True, kw_only=True)
class SearchConfidence(PairLoss):
    """The sigmoid loss smoothed by ``ε = min(1 - c, ½)``,
    ``c = 1/(1 + q_l / max(1, q_w))`` from the search's visit counts or values q.
    """

    reads: ClassVar[tuple[str, ...]] = ("chosen_values", "rejected_values")

    def loss(self, p: Pairs) -> Tensor:
        confidence = 1 / (1 + p.inputs["rejected_values"] / p.inputs["chosen_values"].clamp(min=1))
        return smoothed(p.beta * p.margins, (1 - confidence).clamp(max=0.5))


@ranged
@dataclass(frozen=True, kw_only=True)
class SquaredNash(PairLoss):
    """``(D - (τ/η)·D_ref - ((η-τ)/η)·D_old - 1/(2η))²``, where ``D`` is the chosen
    log-prob minus the rejected one.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref", "old")

    eta: Positive[float]
    tau: Positive[float]

    def __post_init__(self) -> None:
        if not 0 < self.tau < self.eta:
            raise InvalidCall(
                f"SquaredNash: tau is {self.tau}, eta {self.eta}; expected 0 < tau < eta."
            )

    def loss(self, p: Pairs) -> Tensor:
        c, r, share = p.chosen, p.rejected, self.tau / self.eta
        assert (
            c.ref_logps is not None
            and r.ref_logps is not None
            and c.old_logps is not None
            and r.old_logps is not None
        )
        stored = share * (c.ref_logps - r.ref_logps) + (1 - share) * (c.old_logps - r.old_logps)
        return squared(c.logps - r.logps - stored - 1 / (2 * self.eta))


@ranged
@dataclass(frozen=True, kw_only=True)
class MaskNorm(PairLoss):
    """The L1 norm of one of the token masks, over both sequences of a pair."""

    mask: str

    def needs(self) -> tuple[str, ...]:
        return (self.mask,)

    def loss(self, p: Pairs) -> Tensor:
        s = p.sequences
        return s.split(s.sum(s.tokens[self.mask].abs())).sum(0)


@ranged
@dataclass(frozen=True, kw_only=True)
class Ensemble(PairLoss):
    """``sg[g_i]·s_i`` with ``s = β·m``. ``g`` are the slopes of a random convex loss,
    from ``noise`` ``[P+1]`` of standard normal draws.

    ``max(-T(noise), -1)``, with ``T`` the inverse Box-Cox transform with ``box_cox``
    (0: exp), is sorted and assigned in the order of the margins (the last draw is for a
    margin of 0). Where ``s > 1`` it is divided by ``s``. 1e-6 is subtracted.
    """

    reads: ClassVar[tuple[str, ...]] = ("noise",)

    box_cox: Real[float] = 0.0

    def loss(self, p: Pairs) -> Tensor:
        s: Tensor = p.beta * p.margins
        return ensemble_slopes(s.detach(), p.inputs["noise"], self.box_cox, p.keep) * s


def ensemble_slopes(s: Tensor, noise: Tensor, box_cox: float, keep: Tensor) -> Tensor:
    """Return the slope of the drawn loss at every margin ``s`` ``[P]``.

    ``noise`` ``[P+1]`` has one more draw than there are margins, for the margin 0.
    """
    raw = noise.exp() if box_cox == 0 else (1 + box_cox * noise).clamp(min=0) ** (1 / box_cox)
    slopes = (-raw).sort().values.clamp(min=-1.0)
    margins = torch.cat([torch.where(keep, s, torch.inf), s.new_zeros(1)])
    dealt = torch.empty_like(slopes).scatter(0, margins.argsort(stable=True), slopes)[:-1]
    result: Tensor = dealt * torch.where(s > 1, 1 / s.clamp(min=1), 1.0) - 1e-6
    return result


@ranged
@dataclass(frozen=True, kw_only=True)
class ListLikelihood(PairLoss):
    """``Σ_{k in skips} Σ_i softplus(-β·(s_i - s_{i+k}))`` over a list of scores, best
    first; ``"all"``: ``Σ_i log(1 + Σ_{j>i} e^(β(s_j - s_i)))``.
    """

    skips: Skips = (1, 2)

    def loss(self, p: Pairs) -> Tensor:
        s: Tensor = p.beta * torch.stack([side.scores for side in p.sides])
        if self.skips == "all":
            # The logsumexp runs from the end. It is 1 + the sum of the following terms,
            # relative to s_i.
            return (torch.logcumsumexp(s.flip(0), 0).flip(0) - s)[:-1].sum(0)
        return torch.stack([F.softplus(-(s[:-k] - s[k:])).sum(0) for k in self.skips]).sum(0)


@dataclass(frozen=True, kw_only=True)
class Inconsistency(PairLoss):
    """``(σ(β·m) - σ(judge margin))²``: the disagreement of two internal rewards about a
    pair.
    """

    reads: ClassVar[tuple[str, ...]] = ("judge_margins",)

    def loss(self, p: Pairs) -> Tensor:
        return squared(torch.sigmoid(p.beta * p.margins) - torch.sigmoid(p.inputs["judge_margins"]))
