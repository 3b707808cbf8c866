"""Which ids of a row, several at once, a call wants the log-probs of: ids that it gives, and the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..backends.picked import top_ids
from ..backends.shard_picks import merged_picks, pick_states
from ..calls.picked import check_ids, check_top
from ..rows.rows import Rows

#: Names of the statistics ``[N, K]``: log-probs, differentiable, and the ids they are of.
PICKED, PICKED_IDS = "picked_logps", "picked_ids"


class Picks(NamedTuple):
    """``given`` ids ``[N, K]``, and then the ``top`` likeliest; ``name`` is what messages call the first."""

    given: Tensor | None = None
    top: int = 0
    name: str = "selected_ids"

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return () if self.given is None else (self.given,)

    def check(self, rows: Rows, vocab_size: int) -> None:
        """Raise for what a vocabulary of this size does not have, once several ranks know their columns."""
        if self.given is not None:
            check_ids(rows, self.name, self.given, vocab_size)
        if self.top:
            check_top(rows, "top_k", self.top, vocab_size)

    def of(self, logits: Tensor, ids: Tensor, softmax: SoftmaxParams) -> Tensor:
        """``[N, K + top]`` ids of logits ``R + (V,)``; ``ids`` are the rows' own."""
        return self.joined(top_ids(logits, ids, self.top, softmax) if self.top else None)

    def joined(self, likeliest: Tensor | None) -> Tensor:
        """The same where the ``top`` likeliest are known."""
        parts = [t for t in (self.given, likeliest) if t is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def states(
        self, logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams, dtype: torch.dtype, likeliest: Tensor | None
    ) -> Tensor:
        """Of a shard's logits: what this rank tells the others, ``[N, K + 2·top]`` in the dtype of its statistics. ``likeliest``: of its columns."""
        return pick_states(logits, ids, self.given, likeliest, self.top, temperature, softmax, dtype)

    def merged(self, states: Tensor, ids: Tensor, columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """``(logits, ids)``, ``[N, K + top]``, from the states ``[W, N, K + 2·top]`` of all ranks."""
        return merged_picks(states, ids, self.given, self.top, columns)
