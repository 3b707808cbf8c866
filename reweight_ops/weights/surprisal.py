"""STARE: weights of the most surprising tokens by the sign of their advantage, and a
controller whose state the trainer keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.catalogue.registry import published
from .._core.formula.base import TokenWeight, weight
from .._core.ranges import AtLeastOne, NonNegative, Number, Unit, ranged


@published(
    "Surprisal-guided Token-level Advantage Reweighting (STARE)",
    name="stare",
    paper="STARE: Surprisal-Guided Token-Level Advantage Reweighting for Policy Entropy Stability",
    arxiv="2606.19236",
    level="token",
)
@weight
class SurprisalReweighting(TokenWeight):
    """``amplify`` for the most surprising ``fraction`` of the tokens with ``A > 0``,
    ``damp`` for that of those with ``A < 0``, else 1 (section 4.2).

    Surprisal is ``-logp`` of the current policy; ``max(1, ceil(fraction·n))`` tokens of
    n, over the tokens of this call, of equal ones the first. ``damp=1`` is variant O1,
    the default; ``damp=0.9`` variant C2. ``gate`` (1 on, 0 off, a 0-d tensor of
    :func:`stare_update`) is the target-entropy gate of section 4.3.
    """

    fraction: Unit[Number] = 0.1
    amplify: NonNegative[Number] = 1.1
    damp: NonNegative[Number] = 1.0
    gate: Unit[Number] = 1.0

    def weight(self, xp, t, batch):
        high, low = (batch.top(-t.logp, self.fraction, side) for side in (t.adv > 0, t.adv < 0))
        return 1 + self.gate * (high * (self.amplify - 1) + low * (self.damp - 1))


class StareState(NamedTuple):
    """The state of the controller, 0-d tensors: the two weights, and whether the gate
    is open (1 or 0).
    """

    amplify: NonNegative[Tensor]
    damp: NonNegative[Tensor]
    gate: Unit[Tensor]


@ranged
def stare_state(
    amplify: NonNegative[float] = 1.1,
    damp: NonNegative[float] = 0.9,
    device: torch.device | str | None = None,
) -> StareState:
    """Return the state before the first step. The gate is open."""
    return StareState(
        *(torch.full((), x, dtype=torch.float32, device=device) for x in (amplify, damp, 1.0))
    )


@ranged
def stare_update(
    state: StareState,
    entropy: Tensor,
    *,
    target_entropy: NonNegative[float] = 0.3,
    step: NonNegative[float] = 0.0,
    amplify_max: AtLeastOne[float] = 1.5,
    damp_min: Unit[float] = 0.5,
) -> tuple[StareState, SurprisalReweighting]:
    """Update the controller of sections 4.3 and 4.4 with the batch's mean ``entropy``
    (0-d), and return ``(state, weight)`` without a synchronisation.

    The gate is open while the entropy is below ``target_entropy``. ``step`` (α, 0:
    static weights) moves ``amplify`` up to ``amplify_max`` and ``damp`` down to
    ``damp_min`` below the target, and back above it. An entropy that is not finite
    leaves the state as it is.
    """
    entropy = entropy.detach().to(state.gate)
    sign = torch.sign(target_entropy - entropy)
    moved = StareState(
        (state.amplify + step * sign).clamp(1.0, amplify_max),
        (state.damp - step * sign).clamp(damp_min, 1.0),
        (entropy < target_entropy).to(state.gate),
    )
    if step == 0:
        moved = moved._replace(amplify=state.amplify, damp=state.damp)
    finite = torch.isfinite(entropy)
    state = StareState(
        *(torch.where(finite, new, old) for new, old in zip(moved, state, strict=True))
    )
    return state, SurprisalReweighting(amplify=state.amplify, damp=state.damp, gate=state.gate)
