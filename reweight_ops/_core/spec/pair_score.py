"""The default score of a pair: the log-ratio of a sequence to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InvalidCall
from ..ranges import NonNegative, Number, Real, Unit, ranged
from ..rows.pairs import Sequences
from .pair_parts import Score

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@ranged
@dataclass(frozen=True, kw_only=True)
class LogRatio(Score):
    """``f'(π/π_ref)`` of the sequence. With reverse KL (plain DPO) it is
    ``log π(y) - γ·log π_ref(y)``.

    ``gamma`` is the reference's exponent (DPO^γ). ``ld_alpha`` is the weight of the
    tokens beyond the length of the shorter sequence (LD-DPO, arXiv:2409.06411); None
    means 1. ``divergence`` selects f-DPO (arXiv:2309.16240) by TRL's names:
    ``forward_kl`` is ``1 - 1/t``, ``js_divergence`` is ``log(2t/(t+1))``, and
    ``alpha_divergence`` is ``(t^(α-1) - 1)/(α-1)`` with the exponent's argument cut at
    80 as in TRL.
    """

    reads: ClassVar[tuple[str, ...]] = ("ref",)

    gamma: NonNegative[Number] = 1.0
    ld_alpha: Unit[Number] | None = None
    divergence: str = "reverse_kl"
    alpha: Real[float] = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise InvalidCall(
                f"LogRatio: divergence is {self.divergence!r}, expected one of "
                f"{', '.join(DIVERGENCES)}."
            )
        if self.alpha != 1.0 and self.divergence != "alpha_divergence":
            raise InvalidCall(
                "LogRatio: alpha belongs to divergence='alpha_divergence'; with "
                f"{self.divergence!r} it would have no effect."
            )

    def needs(self) -> tuple[str, ...]:
        return ("ref",) if self.ld_alpha is None else ("ref", "order")

    def sums(self, s: Sequences, name: str) -> Tensor:
        if self.ld_alpha is None or name in s.given:
            return super().sums(s, name)
        shared = s.split(s.lengths).amin(0)
        limit = s.spread(s.join(shared.expand(s.size, -1)))
        x = s.tokens[name]
        return s.sum(torch.where(s.position() <= limit, x, self.ld_alpha * x))

    def scores(self, s: Sequences, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        assert ref_logps is not None
        log_t = logps - (
            ref_logps
            if isinstance(self.gamma, (int, float)) and self.gamma == 1
            else self.gamma * ref_logps
        )
        if self.divergence == "forward_kl":
            return -torch.expm1(-log_t)
        if self.divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(log_t)
        power = self.alpha - 1.0
        if self.divergence == "reverse_kl" or abs(power) < 1e-6:
            return log_t
        return torch.expm1((power * log_t).clamp(max=80.0)) / power
