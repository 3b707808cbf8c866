"""A source from the hidden states of two models, or from those of one and the logits of
the other.

It gives divergences of logits that never exist as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...calls.two_hidden import TwoHidden
from ...rows.rows import Rows
from ..distillation import GENERALIZED_JSD, STATISTICS
from ..source import DivergenceWork, PlainSource, SourceInfo
from ..sources import one_pass_unsupported_reason, refuse_transforms
from .autograd import LinearOnePass, linear_statistics
from .buffers import OtherHead
from .measures import DivergenceMeasure, PerRow
from .source import with_shards
from .works import TwoWork


@dataclass(frozen=True)
class TwoHiddenSource(PlainSource):
    """Divergences of two heads: those of :class:`~..sources.TwoLogitsSource`, and with
    ``beta`` the generalised JSD.
    """

    both: TwoHidden
    beta: float | None = None

    @property
    def rows(self) -> Rows:
        return self.both.p.rows

    @property
    def info(self) -> SourceInfo:
        p, s = self.both.p, self.both.p.settings
        return SourceInfo(
            p.states.device,
            s.logits_dtype,
            p.needs_grad,
            s.backend,
            ("divergence_stats",),
            "divergence_loss_grad",
            self.both.other.dtype,
            one_pass_unsupported_reason(p.shard),
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        if self.both.p.shard is not None:
            whole: dict[str, Tensor] = self._of_shards(backend)
            return whole
        return self._statistics(backend)

    def _of_shards(self, backend: str) -> dict[str, Tensor]:
        return self.agreed((), backend)._statistics(backend)

    def agreed(self, asked: tuple[str, ...], backend: str) -> TwoHiddenSource:
        """The same once all ranks have agreed on who has which columns, and that
        ``asked`` is asked besides.
        """
        p = self.both.p
        assert p.shard is not None
        refuse_transforms(p.rows, backend)
        own = with_shards(
            p, *p.shard.agreed(p.rows, p.ids, (*asked, *self.names, self.beta), p.needs_grad)
        )
        return replace(self, both=replace(self.both, p=own))

    def _statistics(self, backend: str) -> dict[str, Tensor]:
        values = linear_statistics(self.both.p, self.per_row, self.other, self.measure(backend))
        return {
            name: self.both.p.scatter(value) for name, value in zip(self.names, values, strict=True)
        }

    def one_pass(self, work: DivergenceWork, backend: str) -> tuple[Tensor, Tensor]:
        p = self.both.p
        two = TwoWork(work._replace(weights=p.gather(work.weights)), self.measure(backend))
        loss, table = LinearOnePass.apply(
            p.states, *p.head, self.per_row, self.other, p.settings, two
        )  # type: ignore[no-untyped-call]
        return loss, torch.stack(
            [p.scatter(row) for row in table.unbind()]
        ) if p.index is not None else table

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the statistics in the order of the measure's outputs."""
        return STATISTICS if self.beta is None else (*STATISTICS, GENERALIZED_JSD)

    @property
    def per_row(self) -> PerRow:
        return PerRow(self.both.p.ids, self.both.p.temperature, self.both.other.temperature)

    @property
    def other(self) -> OtherHead:
        q = self.both.other
        return OtherHead(q.values, q.head, self.both.p.index, q.settings)

    def measure(self, backend: str) -> DivergenceMeasure:
        settings, other = self.both.p.settings, self.both.other.softmax
        softmaxes = (settings.softmax.vocab_size, settings.softmax.softcap, other.softcap)
        return DivergenceMeasure(softmaxes, backend, self.beta, settings.shards)
