"""Weights from a token's entropy, current (the default) or stored.

For stored ones pass the rollout's entropies as ``entropies=``, one per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Positive, Unit
from ..errors import InvalidCall


@weight
class Entropy(TokenWeight):
    """The token's current entropy. It is the default of ``entropies`` in other
    formulas.
    """

    def weight(self, xp, t, batch):
        return t.entropy


_CURRENT = Entropy()


@weight
class TopEntropy(TokenWeight):
    """1 for the ``fraction`` of this call's tokens with the highest entropy, else 0
    ("80/20", arXiv:2506.01939; TRL's ``top_entropy_quantile``).
    """

    fraction: Unit[Number] = 0.2

    def weight(self, xp, t, batch):
        chosen = xp.where(t.entropy >= batch.quantile(t.entropy, 1 - self.fraction), 1.0, 0.0)
        # a NaN is not dropped, so that it shows
        return xp.where(t.entropy == t.entropy, chosen, t.entropy)


@published(
    "Dynamic Dual-level Down-Sampling, token level",
    name="d3s",
    arxiv="2509.22115",
    certainty="secondary",
    level="token",
    example={"fraction": 0.2},
)
@weight
class DualLevelDownSampling(TokenWeight):
    """1 for the ``fraction`` of this call's tokens with the largest ``|A|·H``, else 0:
    ``max(1, ceil(fraction·n))`` of n, of equal ones the first.

    ``completion_mask`` leaves out the samples that the method drops beforehand. Differs
    from the paper: the paper states neither the budgets (so ``fraction`` has no
    default) nor the denominator. ``reduction=TokenMean(weight=...)`` divides by the
    kept tokens, which is our reading. Only these points are secondary: the abstract
    states the rule.
    """

    fraction: Unit[Number]
    entropies: Tensor | TokenWeight = _CURRENT

    def weight(self, xp, t, batch):
        size = xp.abs(t.adv) * self.entropies
        return xp.where(size == size, batch.top(size, self.fraction, size == size), size)


# --- STEER ----------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Steer(TokenWeight):
    w_min: Positive[Number] = 0.8
    p_power: NonNegative[Number] = 0.0
    epsilon_low: NonNegativeOrInf[Number] = math.inf
    epsilon_high: NonNegativeOrInf[Number] = math.inf
    entropies: Tensor | TokenWeight = _CURRENT

    def change(self, xp, t):
        """Return ``|Ω|``, the first-order change of the token's entropy by its update,
        up to the learning rate. It is 0 where the update is clipped.
        """
        p = xp.clip(xp.exp(t.logp), 1e-8, 1 - 1e-8)
        p_old = xp.maximum(xp.exp(t.old_logp), 1e-8)
        size = (
            xp.abs(t.adv)
            / p_old
            * p
            * (1 - p)
            * xp.abs(xp.log(p) + self.entropies)
            * xp.exp(self.p_power * xp.log(p))
        )
        ratio = xp.exp(t.log_ratio)
        clipped = ((t.adv > 0) & (ratio > 1 + self.epsilon_high)) | (
            (t.adv < 0) & (ratio < 1 - self.epsilon_low)
        )
        return xp.where(clipped, 0.0, size)


@weight
class SteerLinear(_Steer):
    """``w_max - (|Ω| - min|Ω|)·(w_max - w_min)/(max|Ω| - min|Ω|)``. It is half way
    where all ``|Ω|`` are equal. See :func:`steer`.
    """

    w_max: Positive[Number] = 1.2

    def weight(self, xp, t, batch):
        size = self.change(xp, t)
        low, high = batch.min(size), batch.max(size)
        share = xp.where(high > low, (size - low) / xp.where(high > low, high - low, 1.0), 0.5)
        return xp.clip(self.w_max - share * (self.w_max - self.w_min), self.w_min, self.w_max)


@weight
class SteerExponential(_Steer):
    """``clip(exp(log(w_min)·|Ω|/max(max|Ω|, floor)), w_min, 1)``. See :func:`steer`."""

    floor: NonNegative[Number] = 0.02

    def weight(self, xp, t, batch):
        size = self.change(xp, t)
        largest = xp.maximum(batch.max(size), self.floor)
        share = xp.where(largest > 0, size / xp.where(largest > 0, largest, 1.0), 0.0)
        return xp.clip(xp.exp(xp.log(self.w_min) * share), self.w_min, 1.0)


@published(
    "Stabilizing Token-level Entropy-changE via Reweighting (STEER)",
    paper="Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
    arxiv="2510.10150",
    level="token",
)
def steer(
    mapping: str = "exponential",
    omega: str = "code",
    w_min: Positive[Number] = 0.8,
    w_max: Positive[Number] = 1.2,
    floor: NonNegative[Number] = 0.02,
    epsilon_low: NonNegativeOrInf[Number] = math.inf,
    epsilon_high: NonNegativeOrInf[Number] = math.inf,
    entropies: Tensor | TokenWeight | None = None,
) -> TokenWeight:
    """Less weight for tokens whose update would change the entropy most, by ``|Ω|``
    relative to the call's valid tokens.

    ``omega="code"``: ``A/p_old·p·(1-p)·(log p + H)``, as released; ``"exact"``: times
    one more ``p``, which is the entropy's exact change by a step of the token's own
    logit. Clip bounds, if given, set ``Ω = 0`` where the update is clipped (a port of
    the paper does). ``mapping="exponential"``:
    ``exp(log(w_min)·|Ω|/max(max|Ω|, floor))``, at least ``w_min``; ``floor=0`` is the
    paper's later form. ``"linear"``: from ``w_max`` at the smallest ``|Ω|`` to
    ``w_min`` at the largest. The authors run both over dual-clip PPO (0.2, 0.28, c =
    10).

    ``entropies`` are the rollout's, one per token, as in the authors' code; the default
    is the current ones. Differs from the paper: the two published Ω differ by the
    factor ``p``, and it was not found which one its experiments used.
    """
    powers = {"code": 0.0, "exact": 1.0}
    if omega not in powers:
        raise InvalidCall(f"steer: omega is {omega!r}, expected 'code' or 'exact'.")
    common: dict[str, Any] = {
        "w_min": w_min,
        "p_power": powers[omega],
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
    }
    common["entropies"] = _CURRENT if entropies is None else entropies
    forbid_unused(
        "steer",
        steer,
        {"w_max": w_max, "floor": floor},
        f"mapping={mapping!r}",
        {"w_max": mapping != "exponential", "floor": mapping != "linear"},
    )
    if mapping == "exponential":
        return SteerExponential(floor=floor, **common)
    if mapping == "linear":
        return SteerLinear(w_max=w_max, **common)
    raise InvalidCall(f"steer: mapping is {mapping!r}, expected 'exponential' or 'linear'.")


# --- HAPO -----------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Hapo(TokenWeight):
    alpha: NonNegative[Number] = 1.0
    pivot: Unit[Number] = 0.8
    entropies: Tensor | TokenWeight = _CURRENT

    def standing(self, xp, batch):
        """Return ``h``: -1 at the lowest entropy, 0 at the ``pivot`` quantile, 1 at the
        highest, by the logarithm of the entropy.
        """
        log_h = xp.log(xp.maximum(self.entropies, 1e-8))
        distance = log_h - batch.quantile_nearest(log_h, self.pivot)
        # The paper first divides by the standard deviation, which cancels here.
        above, below = xp.maximum(batch.max(distance), 1e-8), xp.maximum(-batch.min(distance), 1e-8)
        return xp.where(distance > 0, distance / above, distance / below)

    def lower(self, xp, h, epsilon):
        return xp.where(h <= 0, epsilon * (1 - self.alpha * h), epsilon)

    def upper(self, xp, h, epsilon):
        return xp.where(h > 0, epsilon * (1 + self.alpha * h), epsilon)


@weight
class HapoLower(_Hapo):
    """``ε·(1 - α·h)`` where ``h <= 0``, else ``ε``: HAPO's lower clip bound, wider for
    tokens of low entropy.
    """

    epsilon: NonNegativeOrInf[Number] = 0.2

    def weight(self, xp, t, batch):
        return self.lower(xp, self.standing(xp, batch), self.epsilon)


@weight
class HapoUpper(_Hapo):
    """``ε·(1 + α·h)`` where ``h > 0``, else ``ε``: HAPO's upper clip bound, wider for
    tokens of high entropy.
    """

    epsilon: NonNegativeOrInf[Number] = 0.28

    def weight(self, xp, t, batch):
        return self.upper(xp, self.standing(xp, batch), self.epsilon)


@published(
    "HAPO's differential advantage redistribution",
    arxiv="2509.16591",
    level="token",
)
@weight
class HapoRedistribution(_Hapo):
    """``1 + β·h`` for a token of high entropy (``h > 0``) whose ratio has left the
    neutral zone, or of low entropy that is still in it; else 1.

    ``h`` in [-1, 1]: distance of ``log H`` to its ``pivot`` quantile over the call's
    valid tokens, divided by the largest such distance on its side. Neutral zone:
    ``(1 - ε_low/2, 1 + ε_high/2)`` with the adapted bounds :class:`HapoLower`,
    :class:`HapoUpper`.

    Differs from the authors' code, not from the paper: the code divides negative ``h``
    by their (negative) minimum, which makes every ``h`` non-negative, so that tokens of
    low entropy are treated as those of high entropy and ``ε_low`` never adapts.
    """

    beta: NonNegative[Number] = 1.0
    epsilon_low: NonNegativeOrInf[Number] = 0.2
    epsilon_high: NonNegativeOrInf[Number] = 0.28

    def weight(self, xp, t, batch):
        h = self.standing(xp, batch)
        low, high = self.lower(xp, h, self.epsilon_low), self.upper(xp, h, self.epsilon_high)
        ratio = xp.exp(t.log_ratio)
        neutral = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
        moved = xp.where(h > 0, ~neutral, neutral)
        return xp.where(moved, 1 + self.beta * h, 1.0)
