"""Which ids of a row, several at once, a call wants the log-probs of: ids that it gives, and the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..backends.picked import top_ids

#: Names of the statistics ``[N, K]``: log-probs, differentiable, and the ids they are of.
PICKED, PICKED_IDS = "picked_logps", "picked_ids"


class Picks(NamedTuple):
    """``given`` ids ``[N, K]``, and then the ``top`` likeliest."""

    given: Tensor | None = None
    top: int = 0

    def of(self, logits: Tensor, ids: Tensor, softmax: SoftmaxParams) -> Tensor:
        """``[N, K + top]`` ids of logits ``R + (V,)``; ``ids`` are the rows' own."""
        parts = [] if self.given is None else [self.given]
        if self.top:
            parts.append(top_ids(logits, ids, self.top, softmax))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
