"""Two models' hidden states, or one's and the other's logits, as a source: divergences of logits that never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calls.two_hidden import TwoHidden
from ...rows.rows import Rows
from .. import again
from ..distillation import GENERALIZED_JSD, STATISTICS
from ..source import DivergenceWork, PlainSource, SourceInfo
from ..sources import refuse_transforms, why_two_passes
from .divergence import Heads, LinearDivergences, LinearOnePassDivergence, Measure, OtherHead, formulas
from .source import with_shards


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
            p.states.device, s.logits_dtype, p.needs_grad, s.backend, ("divergence_stats",), "divergence_loss_grad", self.both.other.dtype,
            why_two_passes(p.shard),
        )  # fmt: skip

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        p, q = self.both.p, self.both.other
        heads = self._heads(backend)
        if p.shard is not None:
            values = self._of_shards(heads, backend)
        elif backend == again.TORCH:
            values = formulas(p.states, p.head, p.ids, p.temperature, q.temperature, self._other, heads)
        else:
            values = LinearDivergences.apply(  # type: ignore[no-untyped-call]
                p.states, *p.head, p.ids, p.temperature, q.temperature, self._other, heads
            )
        found = (*STATISTICS, GENERALIZED_JSD)[: len(values)]
        return {name: p.scatter(value) for name, value in zip(found, values, strict=True)}

    @torch.compiler.disable
    def _of_shards(self, heads: Heads, backend: str) -> tuple[Tensor, ...]:
        p, q = self.both.p, self.both.other
        assert p.shard is not None
        refuse_transforms(p.rows, backend)
        if self.beta is not None:
            raise p.rows.unsupported(
                "process_group: a generalized_jsd is no sum of what the shards have by themselves; gather the vocabulary."
            )
        own = with_shards(heads.own, p.shard.agreed(p.rows, STATISTICS, p.needs_grad))
        measure = heads.measure._replace(softmaxes=(own.softmax.vocab_size, *heads.measure.softmaxes[1:]), sharded=True)
        found: tuple[Tensor, ...] = LinearDivergences.apply(  # type: ignore[no-untyped-call]
            p.states, *p.head, p.ids, p.temperature, q.temperature, self._other, Heads(own, heads.other, measure)
        )
        return found

    def one_pass(self, work: DivergenceWork, backend: str) -> tuple[Tensor, Tensor]:
        p, q = self.both.p, self.both.other
        loss, table = LinearOnePassDivergence.apply(  # type: ignore[no-untyped-call]
            p.states,
            *p.head,
            p.ids,
            p.temperature,
            q.temperature,
            work.constants,
            p.gather(work.weights),
            self._other,
            self._heads(backend),
        )
        return loss, torch.stack([p.scatter(row) for row in table.unbind()]) if p.index is not None else table

    @property
    def _other(self) -> OtherHead:
        q = self.both.other
        return OtherHead(q.values, q.head, self.both.p.index)

    def _heads(self, backend: str) -> Heads:
        p, q = self.both.p, self.both.other
        softmaxes = (p.settings.softmax.vocab_size, p.settings.softmax.softcap, q.softmax.softcap)
        return Heads(p.settings, q.settings, Measure(softmaxes, backend, self.beta))
