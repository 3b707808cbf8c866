"""Hidden states and an LM head as a source: the same statistics and fused loss as from logits, which never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calls.hidden import ChunkSettings, Hidden
from ...rows.rows import Rows
from .. import again, temperature
from ..sampling import by_reader, primitives, statistics_of
from ..source import MoreMetrics, PlainSource, PolicyWork, SourceInfo
from .autograd import LinearOnePassLoss, LinearStatistics
from .gemms import inert_rows_dropped


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
        statistics, one_pass = primitives(h.kept)
        return SourceInfo(
            h.states.device, s.logits_dtype, h.needs_grad, s.backend, statistics, one_pass,
            two_pass_reason=temperature.WHY_TWO_PASSES if temperature.learns(h.temperature) else None,
        )  # fmt: skip

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        h = self.hidden
        names = statistics_of(h.kept, names, h.rows)
        if backend == again.TORCH:
            known = dict(zip(names, again.linear_stats(h.states, h.head, h.ids, h.temperature, h.settings, names, h.kept), strict=True))
        else:
            computed = temperature.with_reads(names, h.temperature)
            values = LinearStatistics.apply(  # type: ignore[no-untyped-call]
                h.states, *h.head, h.ids, h.temperature.detach(), h.kept, self._settings(backend), ",".join(computed)
            )
            known = temperature.differentiable(dict(zip(computed, values, strict=True)), names, h.temperature)
        known = known if h.kept is None else by_reader(known)
        return {name: h.scatter(value) for name, value in known.items()}

    def one_pass(self, work: PolicyWork, backend: str) -> tuple[Tensor, Tensor]:
        h = self.hidden
        inputs = tuple(None if t is None else h.gather(t) for t in work.inputs)
        loss, table = LinearOnePassLoss.apply(  # type: ignore[no-untyped-call]
            h.states, *h.head, h.ids, h.temperature, h.kept, inputs, work.params, work.program, self._settings(backend)
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
