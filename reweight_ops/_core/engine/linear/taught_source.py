"""A source from hidden states beside a teacher's.

A policy's statistics and its divergences from the teacher come from the same chunks of
logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.base import RowInputs
from ...rows.rows import Rows
from ..sampling import statistics_of
from ..source import PlainSource, SourceInfo
from ..taught import TEACHER, TaughtWork
from .autograd import LinearOnePass, linear_statistics
from .measures import JointMeasure, TokenMeasure
from .two_source import TwoHiddenSource
from .works import JointWork, TokenWork, TwoWork


@dataclass(frozen=True)
class TaughtSource(PlainSource):
    """The statistics of :class:`.source.HiddenSource` and those of
    :class:`.two_source.TwoHiddenSource`. The names of the latter have the prefix
    ``TEACHER``.
    """

    two: TwoHiddenSource

    @property
    def rows(self) -> Rows:
        return self.two.rows

    @property
    def info(self) -> SourceInfo:
        return self.two.info._replace(
            statistics=("token_stats", "divergence_stats"), one_pass="token_loss_grad"
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        own = statistics_of(
            None, tuple(name for name in names if not name.startswith(TEACHER)), self.rows
        )
        if self.two.both.p.shard is not None:
            whole: dict[str, Tensor] = self._of_shards(own, backend)
            return whole
        return self._statistics(self.two, own, backend)

    def _of_shards(self, own: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        return self._statistics(self.two.agreed(own, backend), own, backend)

    def _statistics(
        self, two: TwoHiddenSource, own: tuple[str, ...], backend: str
    ) -> dict[str, Tensor]:
        p = two.both.p
        measure = JointMeasure(
            TokenMeasure(p.settings.softmax, backend, own, shards=p.settings.shards),
            two.measure(backend),
        )
        values = linear_statistics(p, two.per_row, two.other, measure)
        found = (*own, *(TEACHER + name for name in two.names))
        return {name: p.scatter(value) for name, value in zip(found, values, strict=True)}

    def one_pass(self, work: TaughtWork, backend: str) -> tuple[Tensor, Tensor]:
        p, (policy, teacher) = self.two.both.p, work
        inputs = RowInputs(*(None if t is None else p.gather(t) for t in policy.inputs))  # type: ignore[arg-type]
        both = JointWork(
            TokenWork(policy._replace(inputs=inputs), p.settings.softmax, backend),
            TwoWork(teacher._replace(weights=p.gather(teacher.weights)), self.two.measure(backend)),
        )
        loss, table = LinearOnePass.apply(
            p.states, *p.head, self.two.per_row, self.two.other, p.settings, both
        )  # type: ignore[no-untyped-call]
        return loss, torch.stack(
            [p.scatter(row) for row in table.unbind()]
        ) if p.index is not None else table
