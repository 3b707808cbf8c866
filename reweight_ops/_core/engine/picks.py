"""The ids of a row whose log-probs a call needs: given ids, and the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..backends.picked import top_ids

#: The names of the statistics ``[N, K]``: log-probs, which are differentiable, and
#: their ids.
PICKED, PICKED_IDS = "picked_logps", "picked_ids"


class Picks(NamedTuple):
    """The ``given`` ids ``[N, K]``, and then the ``top`` likeliest ids."""

    given: Tensor | None = None
    top: int = 0

    def of(self, logits: Tensor, ids: Tensor, softmax: SoftmaxParams) -> Tensor:
        """Return the ``[N, K + top]`` ids for logits ``R + (V,)``. ``ids`` are the
        targets of the rows.
        """
        parts = [] if self.given is None else [self.given]
        if self.top:
            parts.append(top_ids(logits, ids, self.top, softmax))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
