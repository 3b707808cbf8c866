"""Importance ratios: how per-token log-probs become the ``log_ratio`` that rules read, with an exact adjoint by autograd.

The log-ratio is clamped with zero gradient outside, in every backend and in the reference: bare ``exp`` overflows in fp32 and turns a
clipped token's zero gradient into NaN. ``clamp=inf`` is TRL's bare form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..ranges import Bounds, Interval, NonNegativeOrInf, Number, ranged
from ..rows.batch import BatchStatistics
from ..rows.constants import number_like
from ..rows.groups import Groups
from ..rows.rows import Rows


@ranged
@dataclass(frozen=True)
class Ratio:
    """``clamp`` is a bound on ``|log_ratio|``, or a pair of bounds. ``against``: the denominator, ``"old"`` or ``"ref"`` (the reference model)."""

    level: ClassVar[str]
    clamp: Annotated[Bounds, Interval("(0, inf]", entries="[-inf, inf]")] = 20.0
    against: str = "old"

    def __post_init__(self) -> None:
        if self.against not in ("old", "ref"):
            raise InvalidCall(f"{type(self).__name__}: against is {self.against!r}, expected 'old' or 'ref'.")

    def bounds(self) -> tuple[Any, Any]:
        return self.clamp if isinstance(self.clamp, tuple) else (-self.clamp, self.clamp)

    @property
    def one_pass_unsupported_reason(self) -> str | None:
        """Why a row's kernel cannot form this ratio; None if it can."""
        if self.level != "token":
            return f"the ratio is at {self.level} level"
        return "the ratio is against the reference" if self.against != "old" else None

    @property
    def one_advantage(self) -> bool:
        """Whether the advantage is the sequence's, so that one a token is an error."""
        return False

    def check(self, rows: Rows, advantages: Any) -> None:
        """Raise if the advantages are none that this ratio is defined for: by their shape, so that no value is read."""
        if self.one_advantage and isinstance(advantages, Tensor) and rows.is_per_token(advantages):
            raise rows.error(
                f"{type(self).__name__} has one advantage a sequence, these are one a token: pass [B] or [B, 1] (of packed rows [S, 1]); "
                "of advantages that are repeated over the tokens, the first of each sequence."
            )

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None) -> Tensor:
        """``[N]`` from ``[N]``; ignored rows contribute nothing. ``adv`` is None for a loss that reads no advantages."""
        return self._clamped(logp - old_logp)

    def _clamped(self, log_ratio: Tensor) -> Tensor:
        low, high = self.bounds()
        if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low == -math.inf and high == math.inf:
            return log_ratio
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = number_like(low, log_ratio), number_like(high, log_ratio)
        return log_ratio.clamp(low, high)


@ranged
@dataclass(frozen=True)
class TokenRatio(Ratio):
    """``log_ratio_t = logp_t - old_logp_t``."""

    level = "token"


@ranged
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
        super().__post_init__()
        if self.gradient not in ("sequence", "token"):
            raise InvalidCall(f"{type(self).__name__}: gradient is {self.gradient!r}, expected 'sequence' or 'token'.")

    def _groups(self, rows: Rows) -> Groups:
        return rows.need_sequences("SequenceRatio")

    def _drift(self, logp: Tensor, old_logp: Tensor, adv: Tensor | None) -> Tensor:
        return logp - old_logp

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None) -> Tensor:
        groups = self._groups(rows)
        total = groups.sum(torch.where(rows.keep, self._drift(logp, old_logp, adv), 0))
        if self.normalize:
            total = total / groups.sum(rows.keep.to(rows.dtype)).clamp(min=1)
        result = groups.spread(total)
        if self.gradient == "token":
            # A log-prob of -inf has no own gradient, and must not make NaN of the sequence's value.
            own = torch.where(logp.isfinite(), logp, 0)
            result = result.detach() + (own - own.detach())
        return self._clamped(result)


@ranged
@dataclass(frozen=True)
class SegmentRatio(SequenceRatio):
    """:class:`SequenceRatio` over segments: runs of equal ``segment_ids`` inside a sequence."""

    level = "segment"

    def _groups(self, rows: Rows) -> Groups:
        if rows.segments is None:
            raise rows.error("SegmentRatio needs segment_ids.")
        rows.refuse_across("SegmentRatio", "has segments that are runs of one rank's tokens.")
        return rows.segments


@ranged
@dataclass(frozen=True)
class CumulativeRatio(Ratio):
    """``log_ratio_t = sg(Σ_{s<=t}(logp_s - old_logp_s)) + logp_t - sg(logp_t)``: of the sequence up to each token, with the token's own gradient.

    CTPO, arXiv:2605.07331.
    """

    level = "prefix"

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None) -> Tensor:
        rows.need_sequences("CumulativeRatio")
        rows.refuse_across("CumulativeRatio", "sums the tokens before each, and sees those of one rank.")
        total = BatchStatistics(rows).seq_cumsum((logp - old_logp).detach())
        own = torch.where(logp.isfinite(), logp, 0)
        return self._clamped(total + (own - own.detach()))


@ranged
@dataclass(frozen=True)
class GeometricMeanRatio(SequenceRatio):
    """The geometric mean of the sequence's token ratios, each clipped in log space where that makes the objective smaller: for ``A > 0`` at most
    ``epsilon_high``, else at least ``-epsilon_low``. GMPO, arXiv:2507.20673; a clipped token has no gradient.

    The advantage is the sequence's: a tensor with one for each token is an error, by its shape. With ``token_advantages`` each token has its own
    (verl's ``geo_mean``, whose trainer repeats the sequence's).
    """

    epsilon_low: NonNegativeOrInf[Number] = 0.4
    epsilon_high: NonNegativeOrInf[Number] = 0.4
    token_advantages: bool = False

    @property
    def one_advantage(self) -> bool:
        return not self.token_advantages

    def _drift(self, logp: Tensor, old_logp: Tensor, adv: Tensor | None) -> Tensor:
        assert adv is not None, "the surrogate reads advantages"
        drift = logp - old_logp
        low, high = number_like(self.epsilon_low, drift), number_like(self.epsilon_high, drift)
        return torch.where(adv > 0, torch.minimum(drift, high), torch.maximum(drift, -low))


@ranged
@dataclass(frozen=True)
class BatchMeanRatio(Ratio):
    """``log_ratio_t = mean over this call's tokens of (logp - old_logp)``, with its gradient to every one of them.

    ``negative_only``: over the tokens whose advantage is not positive.
    """

    level = "batch"

    negative_only: bool = False

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None) -> Tensor:
        chosen = rows.keep
        if self.negative_only:
            assert adv is not None, "negative_only reads advantages"
            chosen = chosen & ~(adv > 0)
        drift = torch.where(chosen, logp - old_logp, 0)
        return self._clamped((rows.total(drift) / rows.total(chosen).clamp(min=1)).expand_as(drift))


@ranged
@dataclass(frozen=True)
class CenteredRatio(Ratio):
    """``log_ratio_t = scale·(logp_t - old_logp_t - sg(mean))``, the mean over this call's tokens: centred where a stale policy's is not.

    ``scale="std"`` divides by their standard deviation (detached) instead.
    """

    level = "batch"

    scale: Annotated[Number, Interval("(0, inf)", words=("std",))] = 1.0

    def log_ratio(self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None) -> Tensor:
        drift = torch.where(rows.keep, logp - old_logp, 0)
        count = rows.total(rows.keep).clamp(min=1)
        centred = drift - rows.total(drift.detach()) / count
        if not isinstance(self.scale, str):
            return self._clamped(self.scale * centred)
        variance = rows.total(torch.where(rows.keep, centred.detach(), 0).square()) / count
        return self._clamped(centred / variance.sqrt().clamp(min=1e-6))
