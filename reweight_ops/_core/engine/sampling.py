"""The effect of a sampling mask on a source: the primitives that it takes, and the
internal names of its statistics.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.base import VOCABULARY, Primitive
from ..backends.mean_logit import MEAN_LOGIT
from ..calls.sampling_mask import KeptSets
from ..rows.rows import Rows
from .picks import PICKED, PICKED_IDS

#: Statistics of one tensor that the kernel of their gradient also reads.
_ALWAYS = ("logp", "lse")


def primitives(kept: KeptSets | None) -> tuple[tuple[Primitive, ...], Primitive]:
    """Return the primitives that statistics take, and the one that a
    fused loss takes."""
    if kept is None:
        return ("token_stats",), "token_loss_grad"
    return ("packed_stats", "token_stats") if kept.over_vocabulary else (
        "packed_stats",
    ), "packed_grad"


def statistics_of(kept: KeptSets | None, names: tuple[str, ...], rows: Rows) -> tuple[str, ...]:
    """Return what is computed for a caller who reads ``names``, without picked ids."""
    found = (*_ALWAYS, *[name for name in names if name not in (*_ALWAYS, PICKED, PICKED_IDS)])
    if kept is None:
        return found
    if PICKED in names or PICKED_IDS in names:
        raise rows.unsupported(
            "picked ids and their log-probs are over the whole vocabulary: request them without "
            "sampling_mask."
        )
    if MEAN_LOGIT in found:
        raise rows.unsupported(
            "mean_logits is over the whole vocabulary: request it without sampling_mask."
        )
    return tuple(
        [
            VOCABULARY + name if name == "entropy" and kept.over_vocabulary else name
            for name in found
        ]
    )


def by_reader(found: dict[str, Tensor], kept: KeptSets | None) -> dict[str, Tensor]:
    """Return what was computed, by the names that the caller reads."""
    if kept is None:
        return found
    return {name.removeprefix(VOCABULARY): t for name, t in found.items()}
