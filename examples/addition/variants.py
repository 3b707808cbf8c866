"""The variants of ``ablations.py``. Each changes one part of one method.

All have the same dual clip (0.2, 0.28, c = 10), and GRPO's advantages unless the
variant is about them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import reweight_ops as rw

from .loop import GROUP, Rollout, Variant

CLIP: dict[str, Any] = {"epsilon_low": 0.2, "epsilon_high": 0.28, "clip_ratio_c": 10.0}
PLAIN = rw.methods.dual_clip_ppo(**CLIP)


def twice(spec: rw.PolicyLossSpec) -> Callable[[Rollout], list[rw.PolicyLossSpec]]:
    """Use the same loss in both updates."""
    return lambda _: [spec, spec]


def lopti(order: str, alpha: float) -> Callable[[Rollout], tuple[rw.PolicyLossSpec, ...]]:
    """Train on one half of the tokens in each update. ``alpha`` adds AR."""
    specs = rw.schedules.lopti(order=order, eta=0.5, alpha=alpha, **CLIP)
    return lambda _: specs


def qae(quantile: float) -> Callable[[Rollout], Tensor]:
    return lambda rollout: rw.advantages.qae(rollout.rewards, quantile=quantile, group_size=GROUP)


def steer(floor: float) -> Callable[[Rollout], list[rw.PolicyLossSpec]]:
    """Weight tokens by the entropies of the rollout, as the authors' code does."""
    return lambda rollout: (
        [PLAIN.with_weight(rw.weights.steer(w_min=floor, entropies=rollout.entropies))] * 2
    )


def hapo(alpha: float, beta: float) -> Callable[[Rollout], list[rw.PolicyLossSpec]]:
    """``alpha=1`` gives every token its own clip bounds, and ``beta=1`` redistributes
    the advantages. 0 leaves that part out.
    """
    return lambda rollout: (
        [rw.methods.hapo(**CLIP, alpha=alpha, beta=beta, entropies=rollout.entropies)] * 2
    )


def token_average(rollout: Rollout) -> Tensor:
    """Return HAPO's advantages, whose group average is over tokens."""
    return rw.advantages.hapo(rollout.rewards, rollout.completion_mask.sum(1), group_size=GROUP)


def warmer(entropies: Tensor, last: Rollout) -> Tensor:
    """Return HAPO's temperature of the next token."""
    return rw.schedules.hapo_temperature(entropies, last.entropies, last.completion_mask)


BASELINE = Variant("baseline", "GRPO, dual clip", twice(PLAIN))
VARIANTS = (
    BASELINE,
    Variant(
        "AR and Lopti", "AR, α = 0.3", twice(rw.methods.advantage_reweighting(alpha=0.3, **CLIP))
    ),
    Variant("AR and Lopti", "Lopti, unlikely tokens first", lopti("low_first", 0.0)),
    Variant("AR and Lopti", "Lopti, unlikely tokens last", lopti("high_first", 0.0)),
    Variant("AR and Lopti", "AR and Lopti, unlikely tokens first", lopti("low_first", 0.3)),
    Variant("AR and Lopti", "AR and Lopti, unlikely tokens last", lopti("high_first", 0.3)),
    *(Variant("QAE's K", f"QAE, K = {k}", twice(PLAIN), qae(k)) for k in (0.2, 0.4, 0.6, 0.8)),
    *(
        Variant("STEER's floor", f"STEER, at least {floor}", steer(floor))
        for floor in (0.2, 0.5, 0.8)
    ),
    Variant("HAPO's parts", "HAPO: average over tokens only", twice(PLAIN), token_average),
    Variant("HAPO's parts", "HAPO: clip bounds only", hapo(1.0, 0.0)),
    Variant("HAPO's parts", "HAPO: redistribution only", hapo(0.0, 1.0)),
    Variant("HAPO's parts", "HAPO: sampler's temperature only", twice(PLAIN), temperature=warmer),
    Variant("HAPO's parts", "HAPO: all four", hapo(1.0, 1.0), token_average, warmer),
)
