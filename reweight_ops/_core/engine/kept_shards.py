"""A shard's part of kept sets, for kernels of packed rows, which know no row whose id
is somewhere else, nor an empty one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.base import PackedRows, SoftmaxParams
from ..backends.logp_low import LOGP_LOW, lost_of
from ..backends.mean_logit import capped
from ..backends.shards import empty_shard
from ..calls.sampling_mask import ELSEWHERE
from ..rows.groups import IGNORE_INDEX


class ShardRows:
    """Packed rows of a softmax. Those of a whole vocabulary are not changed.

    On a shard, the id of a row may be elsewhere. The first element then takes the
    place of the id. The derivative by the log-prob reaches every column by its
    probability, so it becomes one by the log-sum-exp. A row without elements is
    ignored.
    """

    def __init__(self, given: PackedRows, softmax: SoftmaxParams) -> None:
        self.sharded = bool(softmax.vocab_total)
        self.rows, self.ids, self.softmax = given, given.ids, softmax
        if not self.sharded:
            return
        self.softcap, self.known = softmax.softcap, given.ids >= 0
        self.elsewhere = given.ids == ELSEWHERE
        self.empty = (self.known | self.elsewhere) & (given.bounds[0] == given.bounds[1])
        place = torch.where(self.elsewhere, 0, given.ids)
        self.rows = given._replace(ids=torch.where(self.empty, IGNORE_INDEX, place))
        # Of the whole vocabulary only entropies are asked for: no column stands for the
        # id.
        self.softmax = SoftmaxParams(softmax.vocab_size, softmax.softcap, 0, softmax.vocab_size + 1)
        self.ids = torch.where(self.known | self.elsewhere, softmax.vocab_size, given.ids)

    def statistics(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the kernels found of the rows, as it is merged; with what rounding
        log-probs lost.
        """
        if not self.sharded:
            return found
        found = {
            **found,
            LOGP_LOW: lost_of(
                self._logits(), self.known, self.rows.temperature, self.softcap, found
            ),
        }
        empty = empty_shard(tuple(found), self.ids.numel(), found["logp"].dtype, self.ids.device)
        found["logp"] = torch.where(self.elsewhere, -math.inf, found["logp"])
        return {
            name: torch.where(self.empty, nothing, found[name])
            for name, nothing in zip(found, empty, strict=True)
        }

    def derivatives(
        self, stats: dict[str, Tensor], by: dict[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Statistics of whole rows, and derivatives by them, as the kernel of the
        gradient takes them.
        """
        if not self.sharded:
            return stats, by
        nothing = torch.zeros_like(stats["logp"])
        d_logp, d_lse = (nothing if by[name] is None else by[name] for name in ("logp", "lse"))
        assert d_logp is not None and d_lse is not None
        x = capped(self._logits().double(), self.softcap) / self.rows.temperature.double()
        first = ((x - stats["lse"].double()) - stats["lse_low"].double()).to(stats["logp"].dtype)
        return (
            {**stats, "logp": torch.where(self.elsewhere, first, stats["logp"])},
            {
                **by,
                "logp": torch.where(self.elsewhere, 0, d_logp),
                "lse": torch.where(self.elsewhere, d_lse - d_logp, d_lse),
            },
        )

    def _logits(self) -> Tensor:
        """The logit that stands for each row's id."""
        values, place = self.rows.values, self.rows.bounds[0] + self.rows.ids
        if not values.numel():
            return values.new_zeros(place.numel())
        return values[torch.where(self.rows.ids < 0, 0, place)]
