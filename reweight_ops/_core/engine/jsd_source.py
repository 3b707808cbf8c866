"""A source of the generalised JSD of two logits tensors, together with the divergences
that have kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows.rows import Rows
from .again import generalized_jsd
from .chunked_rows import FormulaSource
from .distillation import GENERALIZED_JSD
from .source import PlainSource, SourceInfo
from .sources import TwoLogitsSource


def jsd_rows(source: TwoLogitsSource, beta: float) -> FormulaSource:
    """Return the JSD of every row, in chunks, because it has no kernel."""
    return FormulaSource(source.both, lambda x, y: generalized_jsd(torch.log_softmax(x, -1), torch.log_softmax(y, -1), beta))


@dataclass(frozen=True)
class JsdSource(PlainSource):
    """A source with a gradient by the JSD. The other divergences are values only."""

    divergences: TwoLogitsSource
    beta: float

    @property
    def rows(self) -> Rows:
        return self.divergences.rows

    @property
    def info(self) -> SourceInfo:
        return self.divergences.info._replace(one_pass=None, one_pass_unsupported_reason="the generalised JSD is a composite in chunks")

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        if self.divergences.both.p.shard is not None:
            raise self.rows.unsupported("process_group: a generalized_jsd is not a sum over shards; gather the vocabulary.")
        with torch.no_grad():
            values = self.divergences.statistics(names, backend)
        return {**values, GENERALIZED_JSD: jsd_rows(self.divergences, self.beta).statistics(("value",), backend)["value"]}
