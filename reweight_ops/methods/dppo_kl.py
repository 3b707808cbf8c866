"""DPPO with the binary KL: a trust region on each token's probability, by a divergence
instead of the ratio.
"""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.formula.base import rule
from .._core.ranges import NonNegativeOrInf, Number, PositiveOrInf
from .._core.spec.policy import PolicyLossSpec
from ..rules.surrogates import DppoTV

#: verl adds this to the probabilities of all other tokens, so that a certain token has
#: a finite divergence.
_SMALLEST = 1e-8


@rule("dppo_kl")
class DppoKL(DppoTV):
    """``-sg(min(r, ratio_max)·keep)·A·logp``; a token is dropped where ``p`` has moved
    from ``q = p_old`` to A's side and ``q·log(q/p) + (1-q)·log((1-q)/(1-p))`` is above
    ``divergence_high`` (``A > 0``) or ``divergence_low``.

    Divergence PPO with the binary KL, arXiv:2602.04879. Differs from the paper as
    :class:`~reweight_ops.rules.surrogates.DppoTV` does.
    """

    def _outside(self, xp, t):
        others, old_others = -xp.expm1(t.logp), -xp.expm1(t.old_logp)
        same = xp.exp(t.old_logp) * (t.old_logp - t.logp)
        divergence = same + old_others * xp.log((old_others + _SMALLEST) / (others + _SMALLEST))
        low = (divergence > self.divergence_low) & (t.logp < t.old_logp) & (t.adv <= 0)
        return low, (divergence > self.divergence_high) & (t.logp > t.old_logp) & (t.adv > 0)


@published(
    "Divergence PPO, binary KL",
    arxiv="2602.04879",
    certainty="secondary",
)
def dppo_kl(
    divergence_low: NonNegativeOrInf[Number] = 0.2,
    divergence_high: NonNegativeOrInf[Number] = 0.2,
    ratio_max: PositiveOrInf[Number] = 20.0,
) -> PolicyLossSpec:
    """Drops the tokens whose binary KL from the old policy has grown too large in the
    update's direction, token mean.

    Differs from the paper: after verl's implementation (``dppo_kl``): the gradient of
    the log-prob times the truncated, detached ratio.
    """
    surrogate = DppoKL(
        divergence_low=divergence_low, divergence_high=divergence_high, ratio_max=ratio_max
    )
    return PolicyLossSpec(surrogate=surrogate)
