"""Penalties that several methods share, from the coefficients under their
usual names."""

from __future__ import annotations

from torch import Tensor

from .._core.formula.base import Rule
from .._core.ranges import Number
from .._core.spec.policy import Penalty
from .._core.spec.reduction import Reduction
from ..rules.penalties import K3, EntropyBonus


def is_zero(coef: Number) -> bool:
    """Return whether a coefficient is the constant 0, so that its term is left out. A
    tensor is a schedule and stays.
    """
    return not isinstance(coef, Tensor) and coef == 0


def kl(
    beta: Number, rule: Rule | None = None, reduction: Reduction | None = None
) -> tuple[Penalty, ...]:
    """Return ``beta`` times a KL estimator, k3 by default, or nothing for 0."""
    return () if is_zero(beta) else (Penalty(K3() if rule is None else rule, beta, reduction),)


def entropy(coef: Number, reduction: Reduction | None = None) -> tuple[Penalty, ...]:
    """Return ``coef`` times the entropy bonus, or nothing for 0."""
    return () if is_zero(coef) else (Penalty(EntropyBonus(), coef, reduction),)
