"""Arguments of a policy loss that its spec does not read.

They are errors. If the caller always passes everything, they are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import InvalidCall
from ..rows.rows import Rows
from ..spec.policy import PolicyLossSpec
from ..spec.ratio import SegmentRatio
from ..spec.reduction import FromFunction, NoReduction, Reduction, SequenceMean, TokenMean, TokenSum
from .keywords import PolicyOptions

MODES = ("error", "ignore")


def without_unused(
    rows: Rows, advantages: Any, spec: PolicyLossSpec, data: PolicyOptions
) -> tuple[Any, PolicyOptions]:
    """Return advantages and the other arguments, with None for those without effect if
    ``unused="ignore"``.

    Otherwise an argument without effect is an error.
    """
    if data.unused not in MODES:
        raise rows.error(f"unused is {data.unused!r}, expected one of {', '.join(MODES)}.")
    given = {"advantages": advantages, **data.named()}
    found = {
        name: why for name, why in _without_effect(spec, data).items() if given[name] is not None
    }
    if found and data.unused == "error":
        raise _error(rows, next(iter(found.items())))
    if not found:
        return advantages, data
    rest: dict[str, Any] = {name: None for name in found if name != "advantages"}
    return None if "advantages" in found else advantages, dataclasses.replace(data, **rest)


def _error(rows: Rows, found: tuple[str, str]) -> InvalidCall:
    name, why = found
    return rows.error(
        f'{name} would have no effect: {why}. Leave it out, or pass unused="ignore" if a '
        "trainer passes everything."
    )


def _without_effect(spec: PolicyLossSpec, data: PolicyOptions) -> dict[str, str]:
    """Return the arguments that this spec does not read, and why."""
    reads = spec.requires
    against_old = "log_ratio" in reads and spec.ratio.against == "old"
    found = {}
    if "adv" not in reads:
        found["advantages"] = "no part of the spec reads them"
    if "old_logp" not in reads and not against_old:
        found["old_per_token_logps"] = "the spec has no ratio to the old policy"
    if "ref_logp" not in reads:
        found["ref_per_token_logps"] = "no part of the spec reads the reference policy"
    if "sampling_logp" not in reads:
        found["sampling_per_token_logps"] = "no weight of the spec reads the sampler's log-probs"
    if not isinstance(spec.ratio, SegmentRatio):
        found["segment_ids"] = "the spec's ratio is not a SegmentRatio"
    if not any(_counts(r, data) for r in spec.reductions):
        found["denominator_mask"] = "every reduction's divisor is given, or counts no tokens"
    return found


def _counts(reduction: Reduction, data: PolicyOptions) -> bool:
    """Return whether a reduction counts the rows of the denominator mask."""
    if isinstance(reduction, TokenMean):
        return reduction.weight is None and (reduction.per_call or data.num_items_in_batch is None)
    if isinstance(reduction, SequenceMean):
        return reduction.weight is None and _counts_sequences(reduction, data)
    return not isinstance(reduction, (TokenSum, FromFunction, NoReduction))


def _counts_sequences(reduction: SequenceMean, data: PolicyOptions) -> bool:
    return reduction.per == "token_mean" or (
        reduction.count == "nonempty" and data.num_sequences_in_batch is None
    )
