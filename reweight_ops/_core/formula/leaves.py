"""The fields of a token that a formula reads. Unselected rows get harmless values."""

from __future__ import annotations

import torch
from torch import Tensor

#: Placeholder fields of unselected rows. Every rule must be finite here:
#: ``torch.where`` discards the value, but a NaN gradient would survive it.
_SAFE = {
    "logp": -1.0,
    "old_logp": -1.0,
    "log_ratio": 0.0,
    "ref_logp": -1.0,
    "sampling_logp": -1.0,
    "adv": 1.0,
    "entropy": 1.0,
    "log_sum_p_sq": -1.0,
}


class Leaves:
    """The fields that a formula reads, as attributes ``[N]``."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Tensor:
        if name not in self.values:
            raise AttributeError(f"the formula reads {name!r}, which this call was not given")
        return self.values[name]


def safe_where(selected: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with harmless values in the rows that are not selected."""
    return {name: torch.where(selected, value, _SAFE[name]) for name, value in values.items()}
