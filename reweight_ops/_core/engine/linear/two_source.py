"""Two models' hidden states, or one's and the other's logits, as a source: divergences of logits that never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calls.two_hidden import TwoHidden
from ...rows.rows import Rows
from ..distillation import GENERALIZED_JSD, STATISTICS
from ..source import DivergenceWork, PlainSource, SourceInfo
from .autograd import LinearOnePass, linear_statistics
from .buffers import OtherHead
from .measures import DivergenceMeasure, PerRow
from .works import TwoWork


@dataclass(frozen=True)
class TwoHiddenSource(PlainSource):
    """Divergences of two heads: those of :class:`~..sources.TwoLogitsSource`, and with ``beta`` the generalised JSD."""

    both: TwoHidden
    beta: float | None = None

    @property
    def rows(self) -> Rows:
        return self.both.p.rows

    @property
    def info(self) -> SourceInfo:
        p, s = self.both.p, self.both.p.settings
        return SourceInfo(
            p.states.device, s.logits_dtype, p.needs_grad, s.backend, ("divergence_stats",), "divergence_loss_grad", self.both.other.dtype
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        values = linear_statistics(self.both.p, self._per_row, self._other, self._measure(backend))
        found = (*STATISTICS, GENERALIZED_JSD)[: len(values)]
        return {name: self.both.p.scatter(value) for name, value in zip(found, values, strict=True)}

    def one_pass(self, work: DivergenceWork, backend: str) -> tuple[Tensor, Tensor]:
        p = self.both.p
        two = TwoWork(work._replace(weights=p.gather(work.weights)), self._measure(backend))
        loss, table = LinearOnePass.apply(p.states, *p.head, self._per_row, self._other, p.settings, two)  # type: ignore[no-untyped-call]
        return loss, torch.stack([p.scatter(row) for row in table.unbind()]) if p.index is not None else table

    @property
    def _per_row(self) -> PerRow:
        return PerRow(self.both.p.ids, self.both.p.temperature, self.both.other.temperature)

    @property
    def _other(self) -> OtherHead:
        q = self.both.other
        return OtherHead(q.values, q.head, self.both.p.index, q.settings)

    def _measure(self, backend: str) -> DivergenceMeasure:
        softmax, other = self.both.p.settings.softmax, self.both.other.softmax
        return DivergenceMeasure((softmax.vocab_size, softmax.softcap, other.softcap), backend, self.beta)
