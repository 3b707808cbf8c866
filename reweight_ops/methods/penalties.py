"""Penalties that several methods share, from the coefficients under their usual names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._core.spec.policy import Penalty
from .._core.spec.reduction import Reduction
from ..rules.penalties import K3, EntropyBonus


def is_zero(coef: Any) -> bool:
    """Return whether a coefficient is the constant 0, so that its term is left out. A
    tensor is a schedule and stays.
    """
    return not isinstance(coef, Tensor) and coef == 0


def kl(beta: Any, rule: Any = None, reduction: Reduction | None = None) -> tuple[Penalty, ...]:
    """Return ``beta`` times a KL estimator, k3 by default, or nothing for 0."""
    return () if is_zero(beta) else (Penalty(K3() if rule is None else rule, beta, reduction),)


def entropy(coef: Any, reduction: Reduction | None = None) -> tuple[Penalty, ...]:
    """Return ``coef`` times the entropy bonus, or nothing for 0."""
    return () if is_zero(coef) else (Penalty(EntropyBonus(), coef, reduction),)
