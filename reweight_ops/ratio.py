"""Importance ratios: how per-token log-probs become the ``log_ratio`` that rules read, with an exact adjoint by autograd.

The log-ratio is clamped with zero gradient outside, in every backend and in the reference: bare ``exp`` overflows in fp32 and turns a
clipped token's zero gradient into NaN. ``clamp=inf`` is TRL's bare form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import InvalidCall
from .rows import Groups, Rows


@dataclass(frozen=True)
class Ratio:
    """``clamp`` is a bound on ``|log_ratio|``, or a pair of bounds."""

    level: ClassVar[str]

    clamp: Any = 20.0

    def bounds(self) -> tuple[Any, Any]:
        return self.clamp if isinstance(self.clamp, tuple) else (-self.clamp, self.clamp)

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor) -> Tensor:
        """``[N]`` from ``[N]``; rows that are out contribute nothing."""
        return self._clamped(logp - old_logp)

    def _clamped(self, log_ratio: Tensor) -> Tensor:
        low, high = self.bounds()
        if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low == -math.inf and high == math.inf:
            return log_ratio
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = torch.as_tensor(low).to(log_ratio), torch.as_tensor(high).to(log_ratio)
        return log_ratio.clamp(low, high)


@dataclass(frozen=True)
class TokenRatio(Ratio):
    """``log_ratio_t = logp_t - old_logp_t``."""

    level = "token"


@dataclass(frozen=True)
class SequenceRatio(Ratio):
    """``log_ratio_t = mean over the sequence of (logp - old_logp)`` (the sum with ``normalize=False``). GSPO, arXiv:2507.18071, eq. 7.

    ``gradient="sequence"``: through the mean, to every token (GSPO). ``"token"``: ``sg(mean) + logp_t - sg(logp_t)``, each token's own
    gradient (GSPO-token, eq. 14; verl's ``gspo``).
    """

    level = "sequence"

    normalize: bool = True
    gradient: str = "sequence"

    def __post_init__(self) -> None:
        if self.gradient not in ("sequence", "token"):
            raise InvalidCall(f"{type(self).__name__}: gradient is {self.gradient!r}, expected 'sequence' or 'token'.")

    def _groups(self, rows: Rows) -> Groups:
        return rows.need_sequences("SequenceRatio")

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor) -> Tensor:
        groups = self._groups(rows)
        total = groups.sum(torch.where(rows.keep, logp - old_logp, 0))
        if self.normalize:
            total = total / groups.sum(rows.keep.to(rows.dtype)).clamp(min=1)
        result = groups.spread(total)
        if self.gradient == "token":
            result = result.detach() + (logp - logp.detach())
        return self._clamped(result)


@dataclass(frozen=True)
class SegmentRatio(SequenceRatio):
    """:class:`SequenceRatio` over segments: runs of equal ``segment_ids`` inside a sequence."""

    level = "segment"

    def _groups(self, rows: Rows) -> Groups:
        if rows.segments is None:
            raise rows.error("SegmentRatio needs segment_ids.")
        return rows.segments
