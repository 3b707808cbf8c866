"""Detached weights of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.ranges import Interval, NonNegative, Number, OpenUnit, Real, ranged
from .._core.rows.pairs import Pairs
from .._core.spec.pair_parts import PairWeight
from ..errors import InvalidCall


@ranged
@dataclass(frozen=True, kw_only=True)
class SampledAlignment(PairWeight):
    """``w(y_w)·w(y_l)``, ``w = exp(mean_t(log π(y_t) - log Σ_v π_v²))``. With ``clamp``
    it is at most 1.
    """

    reads: ClassVar[tuple[str, ...]] = ("log_sum_p_sq",)

    clamp: bool = True

    def weight(self, p: Pairs) -> Tensor:
        s = p.sequences
        aligned = s.sum(s.tokens["logp"] - s.tokens["log_sum_p_sq"]) / s.lengths.clamp(min=1)
        chosen, rejected = p.per_side(aligned)
        w = torch.exp(chosen + rejected)
        return w.clamp(max=1) if self.clamp else w


@ranged
@dataclass(frozen=True, kw_only=True)
class MarginAdaptive(PairWeight):
    """``σ(c·h)/σ(h)`` where ``h > -τ``, else 1.

    ``h`` is a reward model's margin. ``c`` falls from about ``c_max`` (small ``|h|``)
    to ``c_min``.
    """

    reads: ClassVar[tuple[str, ...]] = ("reward_margins",)

    c_min: OpenUnit[Number]
    c_max: Annotated[Number, Interval("(1, inf)")]
    lambda_: NonNegative[Number]
    tau: Real[Number]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.c_min, Tensor)
            and not isinstance(self.c_max, Tensor)
            and not 0 < self.c_min < 1 < self.c_max
        ):
            raise InvalidCall(
                f"MarginAdaptive: c_min is {self.c_min}, c_max {self.c_max}; expected 0 < c_min "
                "< 1 < c_max."
            )

    def weight(self, p: Pairs) -> Tensor:
        h = p.inputs["reward_margins"]
        odds = (self.c_max - 1) / (1 - self.c_min) * torch.exp(self.lambda_ * (h.abs() - self.tau))
        c = self.c_min + (self.c_max - self.c_min) / (1 + odds)
        return torch.where(h > -self.tau, torch.exp(F.logsigmoid(c * h) - F.logsigmoid(h)), 1.0)


@dataclass(frozen=True, kw_only=True)
class Agreement(PairWeight):
    """1 where the model's own margin and the judge's have the same sign, else 0."""

    reads: ClassVar[tuple[str, ...]] = ("judge_margins",)

    def weight(self, p: Pairs) -> Tensor:
        return (p.margins * p.inputs["judge_margins"] > 0).to(p.margins.dtype)
