"""The ids of a row whose log-probs a call needs: given ids, and the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import SoftmaxParams
from ..backends.picked import top_ids
from ..backends.shard_picks import merged_picks, pick_states
from ..calls.picked import check_ids, check_top
from ..rows.rows import Rows

#: The names of the statistics ``[N, K]``: log-probs, which are differentiable, and
#: their ids.
PICKED, PICKED_IDS = "picked_logps", "picked_ids"


class Picks(NamedTuple):
    """The ``given`` ids ``[N, K]``, and then the ``top`` likeliest ids."""

    given: Tensor | None = None
    top: int = 0
    name: str = "selected_ids"

    def lists(self) -> tuple[Tensor, ...]:
        return () if self.given is None else (self.given,)

    def check(self, rows: Rows, vocab_size: int) -> None:
        """Raise for what a vocabulary of this size does not have, once several ranks
        know their columns.
        """
        if self.given is not None:
            check_ids(rows, self.name, self.given, vocab_size)
        if self.top:
            check_top(rows, "top_k", self.top, vocab_size)

    def of(self, logits: Tensor, ids: Tensor, softmax: SoftmaxParams) -> Tensor:
        """Return the ``[N, K + top]`` ids for logits ``R + (V,)``. ``ids`` are the
        targets of the rows.
        """
        return self.joined(top_ids(logits, ids, self.top, softmax) if self.top else None)

    def joined(self, likeliest: Tensor | None) -> Tensor:
        """Return the same ids where the ``top`` likeliest are known."""
        parts = [t for t in (self.given, likeliest) if t is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def states(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        dtype: torch.dtype,
        likeliest: Tensor | None,
    ) -> Tensor:
        """Of a shard's logits: what this rank tells the others, ``[N, K + 2·top]`` in
        the dtype of its statistics. ``likeliest``: of its columns.
        """
        return pick_states(
            logits, ids, self.given, likeliest, self.top, temperature, softmax, dtype
        )

    def merged(
        self, states: Tensor, ids: Tensor, columns: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """``(logits, ids)``, ``[N, K + top]``, from the states ``[W, N, K + 2·top]`` of
        all ranks.
        """
        return merged_picks(states, ids, self.given, self.top, columns)
