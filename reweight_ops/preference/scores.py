"""The scores of a sequence: its log-ratio to a reference, its likelihood alone, or a
masked sum over its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._core.ranges import Real, ranged
from .._core.rows.numerics import log1mexp
from .._core.rows.pairs import Sequences
from .._core.spec.pair_parts import Score
from .._core.spec.pair_score import LogRatio as LogRatio


@ranged
@dataclass(frozen=True, kw_only=True)
class Likelihood(Score):
    """``log π(y)``, without a reference. With ``average`` it is per token."""

    average: bool = False

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        return logps / s.lengths.clamp(min=1) if self.average else logps


@ranged
@dataclass(frozen=True, kw_only=True)
class AlphaLikelihood(Score):
    """``(1 - p^-α)/α``, where ``p`` is the geometric mean of the tokens' probabilities.
    At ``α = 0`` it is the limit ``log p``. AlphaPO, arXiv:2501.03884.
    """

    alpha: Real[float]

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        mean = logps / s.lengths.clamp(min=1)
        return mean if self.alpha == 0 else -torch.expm1(-self.alpha * mean) / self.alpha


@ranged
@dataclass(frozen=True, kw_only=True)
class LikelihoodAgainstUnlikelihood(Score):
    """``log π(y)`` of a chosen sequence, and ``-Σ_t log(1 - π(y_t))`` of a rejected
    one.

    With ``reference``, ``log π_ref(y)`` is subtracted from the first and added to the
    second.
    """

    reference: bool = False

    def needs(self) -> tuple[str, ...]:
        return ("ref",) if self.reference else ()

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        chosen, rejected = logps, -s.sum(log1mexp(s.tokens["logp"]))
        if self.reference:
            assert ref_logps is not None
            chosen, rejected = chosen - ref_logps, rejected + ref_logps
        return torch.where(s.rank() == 0, chosen, rejected)


@dataclass(frozen=True, kw_only=True)
class MaskedLogRatio(Score):
    """``Σ_t m_u(t)·(log π - log π_ref)(y_t) + m_d(t)·KL_t(π_ref‖π)``. The masks may
    have gradients, which are exact.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref_tokens", "kl", "reward_mask", "kl_mask")

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        t = s.tokens
        # A mask of 0 selects 0: a KL of inf under it must not become NaN.
        parts = ((t["reward_mask"], t["logp"] - t["ref_logp"]), (t["kl_mask"], t["kl"]))
        return s.sum(
            sum(
                (m * torch.where((m == 0) & ~x.isfinite(), 0, x) for m, x in parts),
                torch.zeros_like(t["logp"]),
            )
        )
