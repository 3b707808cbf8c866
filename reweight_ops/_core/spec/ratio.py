"""Importance ratios: how per-token log-probs become the ``log_ratio`` that rules read.
Autograd gives the exact adjoint.

Every backend and the reference clamp the log-ratio, with zero gradient outside of the
bounds. A bare ``exp`` overflows in fp32 and turns the zero gradient of a clipped token
into NaN. ``clamp=inf`` is TRL's bare form.
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
from ..rows.constants import number_like, parameter_vector
from ..rows.groups import Groups
from ..rows.primitives import Averaged
from ..rows.rows import NO_ORDER, Rows


@ranged
@dataclass(frozen=True)
class Ratio:
    """The base of all ratios.

    ``clamp`` is a bound on ``|log_ratio|``, or a pair of bounds. ``against`` selects
    the denominator, ``"old"`` or ``"ref"`` (the reference model).
    """

    level: ClassVar[str]
    clamp: Annotated[Bounds, Interval("(0, inf]", entries="[-inf, inf]")] = 20.0
    against: str = "old"

    def __post_init__(self) -> None:
        if self.against not in ("old", "ref"):
            raise InvalidCall(
                f"{type(self).__name__}: against is {self.against!r}, expected 'old' or 'ref'."
            )

    def bounds(self) -> tuple[Any, Any]:
        return self.clamp if isinstance(self.clamp, tuple) else (-self.clamp, self.clamp)

    @property
    def one_pass_unsupported_reason(self) -> str | None:
        """Return why a row's kernel cannot form this ratio, or None if it can."""
        if self.level != "token":
            return f"the ratio is at {self.level} level"
        return "the ratio is against the reference" if self.against != "old" else None

    @property
    def requires(self) -> tuple[str, ...]:
        """Return the leaves that it reads beside the log-probs."""
        return ()

    @property
    def one_advantage(self) -> bool:
        """Return whether the ratio needs one advantage per sequence. One per token is
        then an error.
        """
        return False

    def check(self, rows: Rows, advantages: Any) -> None:
        """Raise if this ratio is not defined for the advantages. Only their shape is
        checked, and no value is read.
        """
        if self.one_advantage and isinstance(advantages, Tensor) and rows.is_per_token(advantages):
            raise rows.error(
                f"{type(self).__name__} takes one advantage per sequence, these are one per "
                "token: pass [B] or [B, 1] (of packed rows [S, 1]); "
                "if they repeat one value over the tokens, pass the first of each sequence."
            )

    def log_ratio(
        self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None
    ) -> Tensor:
        """Return ``[N]`` from ``[N]``. Ignored rows contribute nothing.

        ``adv`` may be None unless the ratio :attr:`requires` it.
        """
        return self._clamped(logp - old_logp)

    def averaged(
        self, logp: Tensor, old_logp: Tensor | None, adv: Tensor | None, params: Tensor
    ) -> Averaged | None:
        """Return what a backend's kernel averages, or None if only :meth:`log_ratio`
        forms this ratio.

        ``params`` begins with the bounds of ``clamp``. An ``old_logp`` of None is
        ``logp``.
        """
        return None

    def _clamped(self, log_ratio: Tensor) -> Tensor:
        low, high = self.bounds()
        if (
            not isinstance(low, Tensor)
            and not isinstance(high, Tensor)
            and low == -math.inf
            and high == math.inf
        ):
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
    """``log_ratio_t = mean over the sequence of (logp - old_logp)`` (the sum with
    ``normalize=False``). GSPO, arXiv:2507.18071, eq. 7.

    With ``gradient="sequence"`` the gradient flows through the mean to every token
    (GSPO). With ``"token"`` the ratio is ``sg(mean) + logp_t - sg(logp_t)``, and each
    token has its own gradient (GSPO-token, eq. 14; verl's ``gspo``).
    """

    level = "sequence"

    normalize: bool = True
    gradient: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient not in ("sequence", "token"):
            raise InvalidCall(
                f"{type(self).__name__}: gradient is {self.gradient!r}, expected 'sequence' or "
                "'token'."
            )

    def _groups(self, rows: Rows) -> Groups:
        return rows.need_sequences("SequenceRatio")

    def _drift(self, logp: Tensor, old_logp: Tensor, adv: Tensor | None) -> Tensor:
        return logp - old_logp

    def log_ratio(
        self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None
    ) -> Tensor:
        groups = self._groups(rows)
        total = groups.sum(torch.where(rows.keep, self._drift(logp, old_logp, adv), 0))
        if self.normalize:
            total = total / groups.sum(rows.keep.to(rows.dtype)).clamp(min=1)
        result = groups.spread(total)
        if self.gradient == "token":
            # A log-prob of -inf has no gradient of its own, and must not turn the
            # sequence's value into NaN.
            own = torch.where(logp.isfinite(), logp, 0)
            result = result.detach() + (own - own.detach())
        return self._clamped(result)

    def averaged(
        self, logp: Tensor, old_logp: Tensor | None, adv: Tensor | None, params: Tensor
    ) -> Averaged | None:
        if type(self) is not SequenceRatio:  # a subclass may average something else
            return None
        return Averaged(logp, old_logp, params, self.normalize, self.gradient == "sequence")


@ranged
@dataclass(frozen=True)
class SegmentRatio(SequenceRatio):
    """:class:`SequenceRatio` over segments: runs of equal ``segment_ids`` inside a
    sequence.
    """

    level = "segment"

    def _groups(self, rows: Rows) -> Groups:
        if rows.segments is None:
            raise rows.error("SegmentRatio needs segment_ids.")
        rows.refuse_across("SegmentRatio", NO_ORDER)
        return rows.segments


@ranged
@dataclass(frozen=True)
class CumulativeRatio(Ratio):
    """``log_ratio_t = sg(Σ_{s<=t}(logp_s - old_logp_s)) + logp_t - sg(logp_t)``.

    This is the ratio of the sequence up to each token, with the token's own gradient.

    CTPO, arXiv:2605.07331.
    """

    level = "prefix"

    def log_ratio(
        self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None
    ) -> Tensor:
        rows.need_sequences("CumulativeRatio")
        rows.refuse_across("CumulativeRatio", NO_ORDER)
        total = BatchStatistics(rows).seq_cumsum((logp - old_logp).detach())
        own = torch.where(logp.isfinite(), logp, 0)
        return self._clamped(total + (own - own.detach()))

    def averaged(
        self, logp: Tensor, old_logp: Tensor | None, adv: Tensor | None, params: Tensor
    ) -> Averaged | None:
        if type(self) is not CumulativeRatio:  # a subclass may sum something else
            return None
        return Averaged(logp, old_logp, params, over="prefix")


@ranged
@dataclass(frozen=True)
class GeometricMeanRatio(SequenceRatio):
    """The geometric mean of the sequence's token ratios. GMPO, arXiv:2507.20673.

    Each ratio is clipped in log space where that makes the objective smaller: for
    ``A > 0`` to at most ``epsilon_high``, else to at least ``-epsilon_low``. A clipped
    token has no gradient.

    The advantage belongs to the sequence. A tensor with one value for each token is an
    error, found by its shape. With ``token_advantages`` each token has its own, as in
    verl's ``geo_mean``, whose trainer repeats the sequence's advantage.
    """

    epsilon_low: NonNegativeOrInf[Number] = 0.4
    epsilon_high: NonNegativeOrInf[Number] = 0.4
    token_advantages: bool = False

    @property
    def requires(self) -> tuple[str, ...]:
        return ("adv",)

    @property
    def one_advantage(self) -> bool:
        return not self.token_advantages

    def _drift(self, logp: Tensor, old_logp: Tensor, adv: Tensor | None) -> Tensor:
        assert adv is not None, "it is required"
        drift = logp - old_logp
        low, high = number_like(self.epsilon_low, drift), number_like(self.epsilon_high, drift)
        return torch.where(adv > 0, torch.minimum(drift, high), torch.maximum(drift, -low))

    def averaged(
        self, logp: Tensor, old_logp: Tensor | None, adv: Tensor | None, params: Tensor
    ) -> Averaged | None:
        vector = _vector((*self.bounds(), self.epsilon_low, self.epsilon_high), params)
        if type(self) is not GeometricMeanRatio or adv is None or vector is None:
            return None
        return Averaged(logp, old_logp, vector, self.normalize, self.gradient == "sequence", adv)


@ranged
@dataclass(frozen=True)
class BatchMeanRatio(Ratio):
    """``log_ratio_t = mean over this call's tokens of (logp - old_logp)``. The gradient
    flows to every token.

    With ``negative_only`` the mean is over the tokens whose advantage is not positive.
    """

    level = "batch"

    negative_only: bool = False

    @property
    def requires(self) -> tuple[str, ...]:
        return ("adv",) if self.negative_only else ()

    def log_ratio(
        self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None
    ) -> Tensor:
        chosen = rows.keep
        if self.negative_only:
            assert adv is not None, "it is required"
            chosen = chosen & ~(adv > 0)
        drift = torch.where(chosen, logp - old_logp, 0)
        return self._clamped((rows.total(drift) / rows.total(chosen).clamp(min=1)).expand_as(drift))


@ranged
@dataclass(frozen=True)
class CenteredRatio(Ratio):
    """``log_ratio_t = scale·(logp_t - old_logp_t - sg(mean))``, with the mean over this
    call's tokens.

    It is centred even if a stale policy's log-ratio is not.

    ``scale="std"`` divides by the standard deviation of the tokens (detached) instead.
    """

    level = "batch"

    scale: Annotated[Number, Interval("(0, inf)", words=("std",))] = 1.0

    def log_ratio(
        self, rows: Rows, logp: Tensor, old_logp: Tensor, adv: Tensor | None = None
    ) -> Tensor:
        drift = torch.where(rows.keep, logp - old_logp, 0)
        count = rows.total(rows.keep).clamp(min=1)
        centred = drift - rows.total(drift.detach()) / count
        if not isinstance(self.scale, str):
            return self._clamped(self.scale * centred)
        variance = rows.total(torch.where(rows.keep, centred.detach(), 0).square()) / count
        return self._clamped(centred / variance.sqrt().clamp(min=_LEAST_DEVIATION))

    def averaged(
        self, logp: Tensor, old_logp: Tensor | None, adv: Tensor | None, params: Tensor
    ) -> Averaged | None:
        by_deviation = isinstance(self.scale, str)
        vector = _vector((*self.bounds(), _LEAST_DEVIATION if by_deviation else self.scale), params)
        if type(self) is not CenteredRatio or vector is None:
            return None
        return Averaged(logp, old_logp, vector, normalize=by_deviation, over="call")


#: The least standard deviation by which :class:`CenteredRatio` divides.
_LEAST_DEVIATION = 1e-6


def _vector(numbers: tuple[Any, ...], like: Tensor) -> Tensor | None:
    """Return parameters of a kernel, or None if one has a gradient or differs between
    rows.
    """
    if any(isinstance(x, Tensor) and (x.dim() or x.requires_grad) for x in numbers):
        return None
    return parameter_vector(numbers, like.dtype, like.device)
