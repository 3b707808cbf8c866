"""Hidden states and an LM head as a source: the same statistics and fused loss as from logits, which never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends.shards import VocabShards
from ...calls.hidden import ChunkSettings, Hidden
from ...rows.rows import Rows
from .. import again, temperature
from ..source import MoreMetrics, PlainSource, PolicyWork, SourceInfo
from ..sources import ALWAYS, refuse_transforms, why_two_passes
from .autograd import LinearOnePassLoss, LinearStatistics
from .gemms import inert_rows_dropped


def with_shards(settings: ChunkSettings, shards: VocabShards) -> ChunkSettings:
    """The settings of a rank that has agreed with the others on who has which columns."""
    return settings._replace(softmax=shards.params(settings.softmax.softcap), shards=shards)


@dataclass(frozen=True)
class HiddenSource(PlainSource):
    """Statistics of ``hidden @ weightᵀ``, chunk by chunk."""

    hidden: Hidden

    @property
    def rows(self) -> Rows:
        return self.hidden.rows

    @property
    def info(self) -> SourceInfo:
        h, s = self.hidden, self.hidden.settings
        return SourceInfo(
            h.states.device, s.logits_dtype, h.needs_grad, s.backend, ("token_stats",), "token_loss_grad",
            two_pass_reason=why_two_passes(h.shard, h.temperature),
        )  # fmt: skip

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        h = self.hidden
        found = (*ALWAYS, *(name for name in names if name not in ALWAYS))
        if h.shard is not None:
            known = self._of_shards(found, backend)
        elif backend == again.TORCH:
            known = dict(zip(found, again.linear_stats(h.states, h.head, h.ids, h.temperature, h.settings, found), strict=True))
        else:
            known = self._statistics(found, self._settings(backend))
        return {name: h.scatter(value) for name, value in known.items()}

    @torch.compiler.disable
    def _of_shards(self, found: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        h = self.hidden
        assert h.shard is not None
        refuse_transforms(h.rows, backend)
        return self._statistics(found, with_shards(self._settings(backend), h.shard.agreed(h.rows, found, h.needs_grad)))

    def _statistics(self, found: tuple[str, ...], settings: ChunkSettings) -> dict[str, Tensor]:
        h = self.hidden
        computed = temperature.with_reads(found, h.temperature)
        values = LinearStatistics.apply(h.states, *h.head, h.ids, h.temperature.detach(), settings, ",".join(computed))  # type: ignore[no-untyped-call]
        return temperature.differentiable(dict(zip(computed, values, strict=True)), found, h.temperature)

    def one_pass(self, work: PolicyWork, backend: str) -> tuple[Tensor, Tensor]:
        h = self.hidden
        inputs = tuple(None if t is None else h.gather(t) for t in work.inputs)
        loss, table = LinearOnePassLoss.apply(  # type: ignore[no-untyped-call]
            h.states, *h.head, h.ids, h.temperature, inputs, work.params, work.program, self._settings(backend)
        )
        return loss, torch.stack([h.scatter(row) for row in table.unbind()]) if h.index is not None else table

    def more_metrics(self, plan: str) -> MoreMetrics:
        return _DroppedRows(self.hidden, self.hidden.settings.chunk_rows if plan == "one_pass" else self.hidden.states.size(0))

    def _settings(self, backend: str) -> ChunkSettings:
        return self.hidden.settings._replace(backend=backend)


class _DroppedRows:
    """Metrics of the head: rows dropped before the first GEMM, and of the others those dropped from the backward GEMMs.

    In one_pass the latter are counted chunk by chunk. Holds no tensor of the head's size.
    """

    def __init__(self, hidden: Hidden, dropped_in: int) -> None:
        self.index, self.count, self.drop_inert = hidden.index, hidden.rows.count, hidden.settings.drop_inert
        self.dropped_in = dropped_in

    def __call__(self, derivatives: tuple[Tensor, Tensor]) -> dict[str, Any]:
        computed = self.count if self.index is None else self.index.numel()
        found: dict[str, Any] = {"rows_dropped_forward": self.count - computed, "rows_dropped_backward": 0}
        if self.drop_inert:
            inert = (derivatives[0] == 0) & (derivatives[1] == 0)
            inert = inert if self.index is None else inert[self.index]
            found["rows_dropped_backward"] = inert_rows_dropped(inert, max(self.dropped_in, 1))
        return found
