"""Weights from importance ratios: truncated and masked importance sampling, off-policy
sequence masks, VESPO's kernel, f-divergence weights.
"""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegative, Number, PositiveOrInf, Real
from ..errors import InvalidCall


def _drift(xp, t):
    """Return ``old_logp - sampling_logp``. It is 0 (a ratio of 1) where the sampler's
    log-prob is NaN, as in TRL 1.16.
    """
    return xp.where(t.sampling_logp == t.sampling_logp, t.old_logp - t.sampling_logp, 0.0)


_TIS = "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
_MIS = "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch"


@published(
    "Truncated Importance Sampling (TIS)",
    name="tis",
    paper=_TIS,
    arxiv="unknown",
    certainty="secondary",
    level="token",
)
@weight
class TruncatedImportance(TokenWeight):
    """``clip(exp(old_logp - sampling_logp), ratio_min, ratio_max)``: truncated
    importance sampling against the sampler's own log-probs.

    TIS, Yao et al. 2025 (a blog post); TRL's ``token_truncate``. ``ratio_max`` is 2 in
    the post's runs. A token with a NaN log-prob of the sampler has ratio 1, here and in
    the three weights below.
    """

    ratio_min: NonNegative[Number] = 0.0
    ratio_max: PositiveOrInf[Number] = 2.0

    def weight(self, xp, t, batch):
        return xp.clip(xp.exp(_drift(xp, t)), self.ratio_min, self.ratio_max)


@published(
    "IcePop: masked importance sampling",
    name="icepop",
    paper="Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
    arxiv="unknown",
    certainty="secondary",
    level="token",
)
@weight
class MaskedImportance(TokenWeight):
    """The same ratio where it lies in ``[ratio_min, ratio_max]``, else 0 (IcePop; TRL's
    ``token_mask``). The default bounds are TIS's.
    """

    ratio_min: NonNegative[Number] = 0.0
    ratio_max: PositiveOrInf[Number] = 2.0

    def weight(self, xp, t, batch):
        ratio = xp.exp(_drift(xp, t))
        return xp.where((ratio >= self.ratio_min) & (ratio <= self.ratio_max), ratio, 0.0)


@published(
    "Sequence-level truncated importance sampling",
    name="sequence_tis",
    paper=_MIS,
    arxiv="unknown",
    certainty="secondary",
    level="sequence",
)
@weight
class SequenceTruncatedImportance(TokenWeight):
    """:class:`TruncatedImportance` of the whole sequence's ratio (TRL's
    ``sequence_truncate``, whose default 3 is). Liu, Li et al. 2025 (a blog post).
    """

    ratio_min: NonNegative[Number] = 0.0
    ratio_max: PositiveOrInf[Number] = 3.0

    def weight(self, xp, t, batch):
        return xp.clip(xp.exp(batch.seq_sum(_drift(xp, t))), self.ratio_min, self.ratio_max)


@published(
    "Masked importance sampling of sequences (MIS)",
    name="mis",
    paper=_MIS,
    arxiv="unknown",
    certainty="secondary",
    level="sequence",
)
@weight
class SequenceMaskedImportance(TokenWeight):
    """:class:`MaskedImportance` of the whole sequence's ratio (TRL's ``sequence_mask``,
    its default). MIS, Liu, Li et al. 2025 (a blog post).
    """

    ratio_min: NonNegative[Number] = 0.0
    ratio_max: PositiveOrInf[Number] = 3.0

    def weight(self, xp, t, batch):
        ratio = xp.exp(batch.seq_sum(_drift(xp, t)))
        return xp.where((ratio >= self.ratio_min) & (ratio <= self.ratio_max), ratio, 0.0)


@published(
    "Geometric sequence masking",
    name="geometric_mask",
    paper=_MIS,
    arxiv="unknown",
    certainty="secondary",
    level="sequence",
    example={"ratio_min": 0.9, "ratio_max": 1.1},
)
@weight
class GeometricSequenceMask(TokenWeight):
    """1 where the geometric mean of a sequence's ratios
    ``exp(old_logp - sampling_logp)`` lies in ``[ratio_min, ratio_max]``, else 0.

    Unlike a product it does not depend on the length. A mask beside a correction: with
    :class:`TruncatedImportance` it is verl's ``rollout_rs="seq_mean_k1"`` with
    ``rollout_is="token"``, where verl's bounds are those of the inverse ratio, and a
    rejected sequence is in no term and no denominator (``scope="all"`` and
    ``reduction=TokenMean(weight=...)``).
    """

    ratio_min: NonNegative[Number]
    ratio_max: PositiveOrInf[Number]

    def weight(self, xp, t, batch):
        mean = xp.exp(batch.seq_mean(_drift(xp, t)))
        return xp.where((mean >= self.ratio_min) & (mean <= self.ratio_max), 1.0, 0.0)


@weight
class OffPolicySequenceMask(TokenWeight):
    """0 for every token of a sequence with ``A < 0`` and a mean of ``old_logp - logp``
    above ``threshold``, else 1 (TRL's ``off_policy_mask_threshold``).

    DeepSeek-V3.2, arXiv:2512.02556, eq. 9. :class:`SamplerSequenceMask` measures
    against the sampler's own log-probs.
    """

    threshold: Real[Number]

    def weight(self, xp, t, batch):
        return xp.where(
            (t.adv < 0) & (batch.seq_mean(t.old_logp - t.logp) > self.threshold), 0.0, 1.0
        )


@weight
class SamplerSequenceMask(TokenWeight):
    """:class:`OffPolicySequenceMask` of ``sampling_logp - logp``, which measures
    staleness and the sampler's mismatch together. A token with a NaN counts as 0.
    """

    threshold: Real[Number]

    def weight(self, xp, t, batch):
        drift = t.sampling_logp - t.logp
        known = xp.where(drift == drift, drift, 0.0)
        return xp.where((t.adv < 0) & (batch.seq_mean(known) > self.threshold), 0.0, 1.0)


_SMALLEST_LOG_RATIO = -18.420680743952367  # log 1e-8


@weight
class SequenceGamma(TokenWeight):
    """``φ(W) = W^k·exp(λ·(1 - W))``, ``W`` the sequence's ratio (a product, not a
    mean); ``k, λ`` by the sign of A. VESPO, arXiv:2602.10693.

    ``log W`` is clamped to ``[log 1e-8, 20]``, and a token's share to ±20, as in TRL.
    ``correction`` is a factor of W for each token, the old policy's ratio to the
    sampler: :class:`TruncatedImportance` or :class:`MaskedImportance`, or a tensor. Its
    log is clamped to ``[log 1e-8, 20]``.
    """

    k_pos: NonNegative[Number] = 2.0
    lambda_pos: NonNegative[Number] = 3.0
    k_neg: NonNegative[Number] = 3.0
    lambda_neg: NonNegative[Number] = 2.0
    correction: NonNegative[Number] = 1.0

    def weight(self, xp, t, batch):
        drift = xp.clip(t.logp - t.old_logp, -20.0, 20.0) + xp.clip(
            xp.log(self.correction), _SMALLEST_LOG_RATIO, 20.0
        )
        log_w = xp.clip(batch.seq_sum(drift), _SMALLEST_LOG_RATIO, 20.0)
        k = xp.where(t.adv >= 0, self.k_pos, self.k_neg)
        rate = xp.maximum(xp.where(t.adv >= 0, self.lambda_pos, self.lambda_neg), 1e-4)
        return xp.exp(rate + k * log_w - rate * xp.exp(log_w))


@weight("forward_kl_weight")
class ForwardKLWeight(TokenWeight):
    """``r = p_ref / p``, the ratio clamped at e²⁰ (``f_distill("forward_kl")``)."""

    def weight(self, xp, t, batch):
        return xp.exp(xp.minimum(t.ref_logp - t.logp, 20.0))


@weight
class JensenShannonWeight(TokenWeight):
    """``r/(r + 1)`` with ``r = p_ref / p`` (``f_distill("jensen_shannon")``)."""

    def weight(self, xp, t, batch):
        return xp.sigmoid(t.ref_logp - t.logp)


@published(
    "f-divergence distillation weights",
    paper="One-step Diffusion Models with f-Divergence Distribution Matching",
    arxiv="2502.15681",
    certainty="derived",
    level="token",
)
def f_distill(divergence: str = "jensen_shannon") -> TokenWeight:
    """``h(r) = f''(r)·r²``, ``r = p_teacher / p`` with the teacher's log-probs as the
    reference's: r (forward KL), r/(r+1) (Jensen-Shannon).

    ``divergence``: ``"forward_kl"`` or ``"jensen_shannon"``.

    Derived: from the paper's weight for diffusion models, read per token of an
    on-policy distillation whose unweighted form is the reverse KL (h = 1).
    """
    kinds = {"forward_kl": ForwardKLWeight, "jensen_shannon": JensenShannonWeight}
    if divergence not in kinds:
        raise InvalidCall(
            f"f_distill: divergence is {divergence!r}, expected one of {', '.join(kinds)} (the "
            "reverse KL has weight 1)."
        )
    return kinds[divergence]()
