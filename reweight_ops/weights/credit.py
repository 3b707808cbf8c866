"""Weights that assign the advantage to tokens of a sequence: by the tokens that follow,
by a teacher, or by their probability.
"""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import (
    NonNegative,
    NonNegativeOrInf,
    Number,
    Positive,
    PositiveOrInf,
    Real,
    Unit,
)


@published(
    "Future-KL Influenced Policy Optimization: the influence weight",
    name="fipo",
    arxiv="2603.19835",
    certainty="secondary",
    level="token",
)
@weight
class FutureInfluence(TokenWeight):
    """``clip(exp(F_t), weight_min, weight_max)``, ``F_t = Σ_{s>=t} γ^(s-t)·log r_s``
    over the sequence, ``γ = 2^(-1/half_life)``.

    A token's weight tells how the policy has since moved on the tokens that follow.
    Tokens with ``r > participation_max`` (the bound of a dual clip) are left out of the
    sums. Where ``A < 0`` and ``r > safety_ratio`` the weight is clipped to [0.8, 1].
    The loss is a clip with a token mean.

    Differs from the paper: transcribed from ms-swift's ``loss_type="fipo"`` and its
    defaults; distances count completion tokens, there also masked ones.
    """

    half_life: Positive[Number] = 32.0
    weight_min: NonNegative[Number] = 1.0
    weight_max: PositiveOrInf[Number] = 1.2
    participation_max: PositiveOrInf[Number] = float("inf")
    safety_ratio: PositiveOrInf[Number] = 4.0

    def weight(self, xp, t, batch):
        ratio = xp.exp(t.log_ratio)
        decay = xp.exp(-0.6931471805599453 / self.half_life)  # log 2
        future = batch.seq_suffix_sum(
            xp.where(ratio > self.participation_max, 0.0, t.log_ratio), decay
        )
        influence = xp.clip(xp.exp(future), self.weight_min, self.weight_max)
        return xp.where(
            (t.adv < 0) & (ratio > self.safety_ratio), xp.clip(influence, 0.8, 1.0), influence
        )


@weight
class PrefixDiscrepancy(TokenWeight):
    """``1 + gamma·(1 - Σ_{s<t}|a_s| / Σ_s|a_s|)``, ``a = ref_logp - old_logp``:
    IW-OPD's weight, smaller where the teacher has disagreed before.
    """

    gamma: NonNegative[Number] = 1.0

    def weight(self, xp, t, batch):
        size = xp.abs(t.ref_logp - t.old_logp)
        before = batch.seq_cumsum(size) - size
        return 1 + self.gamma * (1 - before / xp.maximum(batch.seq_sum(size), 1e-8))


def _evidence(self, xp, t):
    d = t.ref_logp - t.old_logp
    evidence = xp.exp(xp.clip(xp.where(t.adv > 0, d, xp.where(t.adv < 0, -d, 0.0)), -20.0, 20.0))
    return 1 - self.mixing + self.mixing * xp.clip(evidence, 1 - self.epsilon, 1 + self.epsilon)


@published(
    "RLSD: self-distilled RLVR",
    name="rlsd",
    paper="Self-Distilled RLVR",
    arxiv="2604.03128",
    certainty="secondary",
    level="token",
)
@weight
class SelfDistilledEvidence(TokenWeight):
    """``1 - λ + λ·clip(exp(sign(A)·(log p_T - log p_old)), 1-ε, 1+ε)``: more weight
    where an informed self agrees with the reward. λ is ``mixing``.

    ``ref_per_token_logps`` are those of the teacher, which is the same policy after it
    has seen the answer. The weight is positive, so no advantage changes its sign.
    Differs from the paper: transcribed from ms-swift's ``advantage_reweight="rlsd"``
    and its defaults. Only wrong responses are reweighted by
    :class:`NegativeSelfDistilledEvidence` (its ``rlsd_negative_only``).
    """

    mixing: Unit[Number] = 0.5
    epsilon: NonNegative[Number] = 0.2

    def weight(self, xp, t, batch):
        return _evidence(self, xp, t)


@weight
class NegativeSelfDistilledEvidence(TokenWeight):
    """:class:`SelfDistilledEvidence` where ``A < 0``, else 1."""

    mixing: Unit[Number] = 0.5
    epsilon: NonNegative[Number] = 0.2

    def weight(self, xp, t, batch):
        return xp.where(t.adv < 0, _evidence(self, xp, t), 1.0)


@published(
    "Token-Regulated GRPO (TR-GRPO): the token weight",
    name="tr_grpo",
    paper="Token-Regulated Group Relative Policy Optimization for Stable Reinforcement Learning "
    "in Large Language Models",
    arxiv="2511.00066",
    certainty="secondary",
    level="token",
    example={"alpha": 2.0, "tau": 1.0, "mu": 0.25, "lower": 0.5, "upper": 1.0},
)
@weight
class TokenRegulation(TokenWeight):
    """``clip(alpha·(σ(p/tau) - mu), lower, upper)``, where p is the token's current
    probability. Unlikely tokens, whose gradients are large, get less weight.

    Later versions of the paper have another title and call it GRPO-SG
    (sharpness-guided, by probability shaping). Differs from the paper: the formula is
    that of ports; its constants were not found in print, so they must be given.
    """

    alpha: Positive[Number]
    tau: Positive[Number]
    mu: Real[Number]
    lower: NonNegative[Number]
    upper: NonNegativeOrInf[Number]

    def weight(self, xp, t, batch):
        return xp.clip(
            self.alpha * (xp.sigmoid(xp.exp(t.logp) / self.tau) - self.mu), self.lower, self.upper
        )


@published(
    "STAPO: silencing spurious tokens (S2T)",
    name="stapo",
    paper="STAPO: Stabilizing Reinforcement Learning for LLMs by Silencing Rare Spurious Tokens",
    arxiv="2602.15620",
    level="token",
)
@weight
class SpuriousTokens(TokenWeight):
    """0 where ``A > 0``, ``p < probability`` and ``H`` is below its
    ``entropy_quantile``, else 1. The quantile is over the call's tokens with ``A > 0``
    and ``p < probability``.

    These are unlikely tokens of certain distributions in correct responses. They are
    few, and have the largest gradients. The method renormalizes over the remaining
    tokens: ``reduction=TokenMean(weight=SpuriousTokens())`` in a clipped loss. The
    defaults are those of the paper's later versions. A single such token is kept: its
    entropy is the quantile.
    """

    probability: Unit[Number] = 0.002
    entropy_quantile: Unit[Number] = 0.75

    def weight(self, xp, t, batch):
        unlikely = (t.adv > 0) & (xp.exp(t.logp) < self.probability)
        certain = t.entropy < batch.quantile(t.entropy, self.entropy_quantile, unlikely)
        return xp.where(unlikely & certain, 0.0, 1.0)
