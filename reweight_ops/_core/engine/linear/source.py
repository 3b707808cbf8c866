"""A source from hidden states and an LM head.

It gives the same statistics and fused loss as logits, but the logits never exist as a
whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backends.base import RowInputs
from ...backends.shards import VocabShards
from ...calls.hidden import Hidden
from ...rows.groups import IGNORE_INDEX
from ...rows.rows import Rows
from .. import again, temperature
from ..picked_ops import search_of
from ..picks import PICKED, PICKED_IDS, Picks
from ..sampling import by_reader, primitives, statistics_of
from ..source import MoreMetrics, PlainSource, PolicyWork, SourceInfo
from ..sources import agreed, one_pass_unsupported_reason, part_of, refuse_transforms
from .autograd import LinearOnePass, linear_statistics
from .gemms import zero_gradient_rows_dropped
from .measures import PerRow, TokenMeasure
from .works import TokenWork


def with_shards(hidden: Hidden, shards: VocabShards, ids: Tensor) -> Hidden:
    """Return a rank's call after the ranks have agreed on their columns."""
    settings, (kept, ids) = hidden.settings, part_of(hidden.kept, ids, shards, hidden.rows)
    return replace(
        hidden,
        kept=kept,
        ids=ids,
        settings=settings._replace(softmax=shards.params(settings.softmax.softcap), shards=shards),
    )


@dataclass(frozen=True)
class HiddenSource(PlainSource):
    """Statistics of ``hidden @ weightᵀ``, chunk by chunk."""

    hidden: Hidden
    picks: Picks | None = None

    @property
    def rows(self) -> Rows:
        return self.hidden.rows

    @property
    def info(self) -> SourceInfo:
        h, s = self.hidden, self.hidden.settings
        statistics, one_pass = primitives(h.kept)
        return SourceInfo(
            h.states.device,
            s.logits_dtype,
            h.needs_grad,
            s.backend,
            statistics,
            one_pass,
            one_pass_unsupported_reason=one_pass_unsupported_reason(h.shard, h.temperature),
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        wanted = statistics_of(self.hidden.kept, names, self.hidden.rows)
        if self.hidden.shard is not None:
            whole: dict[str, Tensor] = self._of_shards(wanted, backend)
            return whole
        return self._statistics(self.hidden, wanted, backend)

    def search(self, backend: str) -> str | None:
        return search_of(backend, 0 if self.picks is None else self.picks.top)

    def _of_shards(self, wanted: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        h = self.hidden
        assert h.shard is not None
        refuse_transforms(h.rows, backend)
        met = agreed(h.shard, h.rows, h.ids, wanted, h.needs_grad, self.picks, h.kept)
        return self._statistics(with_shards(h, *met), wanted, backend)

    def _statistics(self, h: Hidden, wanted: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        picks, torch_only = self.picks or Picks(), backend == again.TORCH
        computed = (
            wanted
            if torch_only
            else temperature.with_reads(wanted, h.temperature, self.picks is not None)
        )
        given = (
            None
            if picks.given is None
            else picks.given
            if h.index is None
            else picks.given[h.index]
        )
        per_row = PerRow.of(
            h.ids, h.temperature if torch_only else h.temperature.detach(), given, h.kept
        )
        measure = TokenMeasure(
            h.settings.softmax,
            backend,
            computed,
            self.picks is not None,
            picks.top,
            h.settings.shards,
        )
        known = dict(
            zip(measure.names(), linear_statistics(h, per_row, None, measure), strict=True)
        )
        if not torch_only:
            kept = (*wanted, PICKED, PICKED_IDS) if self.picks is not None else wanted
            known = temperature.differentiable(known, kept, h.temperature)
        ids = known.pop(PICKED_IDS, None)
        found = {name: h.scatter(value) for name, value in by_reader(known, h.kept).items()}
        return found if ids is None else {**found, PICKED_IDS: h.scatter(ids, IGNORE_INDEX)}

    def one_pass(self, work: PolicyWork, backend: str) -> tuple[Tensor, Tensor]:
        h = self.hidden
        inputs = RowInputs(*(None if t is None else h.gather(t) for t in work.inputs))  # type: ignore[arg-type]
        over = h.kept is not None and h.kept.over_vocabulary
        loss, table = LinearOnePass.apply(  # type: ignore[no-untyped-call]
            h.states,
            *h.head,
            PerRow.of(h.ids, h.temperature, None, h.kept),
            None,
            h.settings,
            TokenWork(work._replace(inputs=inputs), h.settings.softmax, backend, over),
        )
        return loss, torch.stack(
            [h.scatter(row) for row in table.unbind()]
        ) if h.index is not None else table

    def more_metrics(self, plan: str) -> MoreMetrics:
        return _DroppedRows(
            self.hidden,
            self.hidden.settings.chunk_rows if plan == "one_pass" else self.hidden.states.size(0),
        )


class _DroppedRows:
    """Metrics of the head: rows dropped before the first GEMM, and further rows dropped
    from the backward GEMMs.

    In one_pass the latter are counted chunk by chunk. This holds no tensor of the
    head's size.
    """

    def __init__(self, hidden: Hidden, dropped_in: int) -> None:
        self.index, self.count, self.drop_zero_gradient = (
            hidden.index,
            hidden.rows.count,
            hidden.settings.drop_zero_gradient,
        )
        self.dropped_in = dropped_in

    def __call__(self, derivatives: tuple[Tensor, Tensor]) -> dict[str, Any]:
        computed = self.count if self.index is None else self.index.numel()
        found: dict[str, Any] = {
            "rows_dropped_forward": self.count - computed,
            "rows_dropped_backward": 0,
        }
        if self.drop_zero_gradient:
            zero_gradient = (derivatives[0] == 0) & (derivatives[1] == 0)
            zero_gradient = zero_gradient if self.index is None else zero_gradient[self.index]
            found["rows_dropped_backward"] = zero_gradient_rows_dropped(
                zero_gradient, max(self.dropped_in, 1)
            )
        return found
