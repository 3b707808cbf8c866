"""Gates against a sampler that has drifted from the policy. They drop tokens above a
divergence.

A NaN log-prob of the sampler counts as no drift.
"""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import NonNegative, Number
from ..errors import InvalidCall


def _probabilities(xp, t):
    """Return the sampled token's probability under the sampler and the old policy.

    They are kept off 0 and 1, as in OpenRLHF, so that the logarithms are finite.
    """
    sampling = xp.where(t.sampling_logp == t.sampling_logp, t.sampling_logp, t.old_logp)
    return tuple(xp.clip(xp.exp(x), 1e-6, 1 - 1e-6) for x in (sampling, t.old_logp))


def _binary_kl(xp, t):
    p, q = _probabilities(xp, t)
    return p * xp.log(p / q) + (1 - p) * xp.log((1 - p) / (1 - q))


def _total_variation(xp, t):
    p, q = _probabilities(xp, t)
    return xp.abs(p - q)


@weight("binary_kl_gate")
class BinaryKLGate(TokenWeight):
    """1 where ``p·log(p/q) + (1-p)·log((1-p)/(1-q)) <= threshold``, else 0.

    p is the token's probability under the sampler, and q under the old policy.
    """

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(_binary_kl(xp, t) <= self.threshold, 1.0, 0.0)


@weight
class TotalVariationGate(TokenWeight):
    """1 where ``|p - q| <= threshold``, else 0; p and q as in :class:`BinaryKLGate`."""

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(_total_variation(xp, t) <= self.threshold, 1.0, 0.0)


@weight("sequence_binary_kl_gate")
class SequenceBinaryKLGate(TokenWeight):
    """:class:`BinaryKLGate` of the mean over a sequence's tokens."""

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(batch.seq_mean(_binary_kl(xp, t)) <= self.threshold, 1.0, 0.0)


@weight
class SequenceTotalVariationGate(TokenWeight):
    """:class:`TotalVariationGate` of the mean over a sequence's tokens."""

    threshold: NonNegative[Number]

    def weight(self, xp, t, batch):
        return xp.where(batch.seq_mean(_total_variation(xp, t)) <= self.threshold, 1.0, 0.0)


@published(
    "Divergence-gated rollout correction (OpenRLHF)",
    paper="FlashREINFORCE, as named in OpenRLHF 0.11.2",
    arxiv="unknown",
    certainty="secondary",
    level="sequence",
    example={"threshold": 0.01},
)
def divergence_gate(
    threshold: NonNegative[float], divergence: str = "binary_kl", level: str = "sequence"
) -> TokenWeight:
    """1 where the divergence of the sampler to the old policy, of the sampled token
    alone, is at most ``threshold``, else 0.

    ``divergence`` is ``"binary_kl"`` or ``"tv"`` (total variation). ``level`` is
    ``"sequence"`` (the mean over its tokens) or ``"token"``. In OpenRLHF
    (``is_correction_gating``) the kept tokens have the ratio of old policy to sampler
    as their weight: use ``TruncatedImportance(ratio_max=inf)`` beside this.
    """
    kinds: dict[tuple[str, str], type] = {
        ("binary_kl", "token"): BinaryKLGate,
        ("tv", "token"): TotalVariationGate,
        ("binary_kl", "sequence"): SequenceBinaryKLGate,
        ("tv", "sequence"): SequenceTotalVariationGate,
    }
    if (divergence, level) not in kinds:
        raise InvalidCall(
            f"divergence_gate: divergence is {divergence!r}, level {level!r}; expected "
            "'binary_kl' or 'tv', and 'sequence' or 'token'."
        )
    gate: TokenWeight = kinds[divergence, level](threshold=threshold)
    return gate
