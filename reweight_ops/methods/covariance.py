"""Clip-Cov and KL-Cov: the few tokens with the largest covariance of log-prob and
advantage lose their gradient, or pay a penalty for moving.
"""

from __future__ import annotations

from typing import Any

from .._core.catalogue.registry import published
from .._core.formula.base import Rule, rule
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Real, Unit
from .._core.spec.policy import PolicyLossSpec
from ..rules.surrogates import Clip
from ..weights.covariance import ClipCov, TopCovariance


@rule("kl_cov")
class KlCov(Rule):
    """``-r·A + kl_coef·|log r|``."""

    kl_coef: NonNegative[Number] = 1.0

    def loss(self, xp, t):
        return -xp.exp(t.log_ratio) * t.adv + self.kl_coef * xp.abs(t.log_ratio)


@published("Clip-Cov", arxiv="2505.22617", certainty="secondary", level="batch")
def clip_cov(
    fraction: Unit[Number] = 2e-4,
    lower: Real[Number] = 1.0,
    upper: Real[Number] = 5.0,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
    seed: Real[Number] = 0.0,
) -> PolicyLossSpec:
    """Clip, and no loss for a ``fraction`` of the tokens, drawn among those with
    ``lower < (A - mean A)·(logp - mean logp) < upper``; token mean.

    Differs from the paper: transcribed from verl (``clip_cov``), which is the authors'
    code: the surrogate is PPO's, and tokens that it clips are not drawn. The draw is by
    ``seed`` and position, not from a random generator.
    """
    bounds: dict[str, Any] = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    chosen = ClipCov(fraction=fraction, lower=lower, upper=upper, seed=seed, **bounds)
    return PolicyLossSpec(surrogate=Clip(**bounds), weights=(chosen,))


@published("KL-Cov", arxiv="2505.22617", certainty="secondary", level="batch")
def kl_cov(fraction: Unit[Number] = 2e-4, kl_coef: NonNegative[Number] = 1.0) -> PolicyLossSpec:
    """``-r·A``, plus ``kl_coef·|log r|`` for the ``fraction`` of the tokens with the
    largest ``(A - mean A)·(logp - mean logp)``; token mean.

    Differs from the paper: transcribed from verl (``kl_cov``), which is the authors'
    code; the paper writes KL(old, current) for ``|log r|``. Of tokens with equal
    covariances the first are taken. If only rounding distinguishes two, as is always so
    with two tokens, rounding decides, and another backend may decide differently.
    """
    return PolicyLossSpec(surrogate=KlCov(kl_coef=TopCovariance(fraction=fraction, value=kl_coef)))
