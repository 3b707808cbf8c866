"""Token weights: multipliers of loss terms. A weight that reads no ``batch`` is evaluated inside the one-pass kernel.

They multiply the *term*, not the advantage: the two differ for negative factors, and clip metrics must use the unweighted advantage.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rows import Groups, Rows
from .rules.base import TokenWeight, weight


class BatchStatistics:
    """``batch`` of a weight: reductions of ``[N]`` values over this call's valid rows, or over each row's sequence."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def _only(self, x: Tensor, other: float) -> Tensor:
        return torch.where(self._rows.keep, x, other)

    def _sequences(self) -> Groups:
        return self._rows.need_sequences("a weight that uses batch.seq_mean or batch.seq_sum")

    def sum(self, x: Tensor) -> Tensor:
        return self._only(x, 0).sum()

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self._rows.keep.sum().clamp(min=1)

    def min(self, x: Tensor) -> Tensor:
        return self._only(x, math.inf).min()

    def max(self, x: Tensor) -> Tensor:
        return self._only(x, -math.inf).max()

    def quantile(self, x: Tensor, q: Any) -> Tensor:
        """Linear interpolation between order statistics, as ``torch.quantile``, of any number of rows and without reading one on the host."""
        ordered = self._only(x, math.inf).sort().values
        at = q * (self._rows.keep.sum() - 1).clamp(min=0).to(x.dtype)
        below, above = (ordered.gather(0, k.long().view(1)).view(()) for k in (at.floor(), at.ceil()))
        result: Tensor = below + (at - at.floor()) * (above - below)
        return result

    def seq_sum(self, x: Tensor) -> Tensor:
        """``[N]``: every row gets its sequence's sum."""
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)))

    def seq_mean(self, x: Tensor) -> Tensor:
        counts = self._sequences().sum(self._rows.keep.to(x.dtype)).clamp(min=1)
        return self._sequences().spread(self._sequences().sum(self._only(x, 0)) / counts)


@weight
class AdvantageReweighting(TokenWeight):
    """``α·p_old + 1 - α`` with the probability under the old policy: damps the gradient of unlikely tokens.

    AR, arXiv:2505.12929, section 4.1, as the authors' code has it; the paper writes the current policy: :class:`CurrentAdvantageReweighting`.
    """

    alpha: float = 0.3

    def weight(self, xp, t, batch):
        return self.alpha * xp.exp(t.old_logp) + 1 - self.alpha


@weight
class CurrentAdvantageReweighting(TokenWeight):
    """``α·p + 1 - α`` with the current probability, detached. AR as the paper writes it, arXiv:2505.12929, section 4.1."""

    alpha: float = 0.3

    def weight(self, xp, t, batch):
        return self.alpha * xp.exp(t.logp) + 1 - self.alpha


@weight
class ProbabilityBand(TokenWeight):
    """1 where ``lower <= p_old < upper``, else 0; of every term, over the full denominator.

    The two halves of Lopti, arXiv:2505.12929, section 4.2: first ``p_old < η``, then ``p_old >= η``, each a full update.
    """

    scope: str = "all"
    lower: float = 0.0
    upper: float = math.inf

    def weight(self, xp, t, batch):
        p = xp.exp(t.old_logp)
        return xp.where((p >= self.lower) & (p < self.upper), 1.0, 0.0)


@weight
class TruncatedImportance(TokenWeight):
    """``clip(exp(old_logp - sampling_logp), ratio_min, ratio_max)``: truncated importance sampling against the sampler's own log-probs.

    TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's ``token_truncate``.
    """

    ratio_min: float = 0.0
    ratio_max: float = 2.0

    def weight(self, xp, t, batch):
        return xp.clip(xp.exp(t.old_logp - t.sampling_logp), self.ratio_min, self.ratio_max)


@weight
class MaskedImportance(TokenWeight):
    """The same ratio where it lies in ``[ratio_min, ratio_max]``, else 0 (IcePop; TRL's ``token_mask``)."""

    ratio_min: float = 0.0
    ratio_max: float = 2.0

    def weight(self, xp, t, batch):
        ratio = xp.exp(t.old_logp - t.sampling_logp)
        return xp.where((ratio >= self.ratio_min) & (ratio <= self.ratio_max), ratio, 0.0)


@weight
class SequenceTruncatedImportance(TokenWeight):
    """:class:`TruncatedImportance` of the whole sequence's ratio (TRL's ``sequence_truncate``)."""

    ratio_min: float = 0.0
    ratio_max: float = 3.0

    def weight(self, xp, t, batch):
        return xp.clip(xp.exp(batch.seq_sum(t.old_logp - t.sampling_logp)), self.ratio_min, self.ratio_max)


@weight
class SequenceMaskedImportance(TokenWeight):
    """:class:`MaskedImportance` of the whole sequence's ratio (TRL's ``sequence_mask``, its default)."""

    ratio_min: float = 0.0
    ratio_max: float = 3.0

    def weight(self, xp, t, batch):
        ratio = xp.exp(batch.seq_sum(t.old_logp - t.sampling_logp))
        return xp.where((ratio >= self.ratio_min) & (ratio <= self.ratio_max), ratio, 0.0)


@weight
class TopEntropy(TokenWeight):
    """1 for the ``fraction`` of this call's tokens with the highest entropy, else 0 ("80/20", arXiv:2506.01939; TRL's ``top_entropy_quantile``)."""

    fraction: float = 0.2

    def weight(self, xp, t, batch):
        return xp.where(t.entropy >= batch.quantile(t.entropy, 1 - self.fraction), 1.0, 0.0)
