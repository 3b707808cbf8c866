"""Penalties that several methods share, from the coefficients that users know them by."""

from __future__ import annotations

from torch import Tensor

from .._core.formula.base import Rule
from .._core.ranges import Number
from .._core.spec.policy import Penalty
from .._core.spec.reduction import Reduction
from ..rules.penalties import K3, EntropyBonus


def is_zero(coef: Number) -> bool:
    """Whether a coefficient is the constant 0: its term is then left out. A tensor is a schedule and stays."""
    return not isinstance(coef, Tensor) and coef == 0


def kl(beta: Number, rule: Rule | None = None, reduction: Reduction | None = None) -> tuple[Penalty, ...]:
    """``beta`` times a KL estimator, k3 by default; nothing for 0."""
    return () if is_zero(beta) else (Penalty(K3() if rule is None else rule, beta, reduction),)


def entropy(coef: Number, reduction: Reduction | None = None) -> tuple[Penalty, ...]:
    """``coef`` times the entropy bonus; nothing for 0."""
    return () if is_zero(coef) else (Penalty(EntropyBonus(), coef, reduction),)
