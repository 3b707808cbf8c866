"""The sources without chunks: one logits tensor, two, stored log-probs, and a formula
over rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.base import DIVERGENCE_STATS, SoftmaxParams
from ..backends.select import load
from ..backends.shards import VocabShards
from ..calls import vocab_group
from ..calls.logits import Logits
from ..calls.sampling_mask import KeptSets
from ..calls.two_logits import TwoLogits
from ..calls.vocab_group import VocabGroup
from ..rows.rows import Rows
from ..rows.structure import is_readable
from . import again, temperature
from .autograd import (
    DivergenceStatistics,
    OnePassDivergence,
    OnePassLoss,
    OpOptions,
    RowStatistics,
    Softmaxes,
)
from .picked_ops import search_of
from .picks import PICKED, PICKED_IDS, Picks
from .sampling import by_reader, primitives, statistics_of
from .source import DivergenceWork, PlainSource, PolicyWork, SourceInfo


def _version(logits: Logits) -> int:
    """Return a number that grows when a call begins to write over the logits. It is 0
    if no call may.
    """
    return (
        int(logits.original._version) if logits.consume and not torch.compiler.is_compiling() else 0
    )


def one_pass_unsupported_reason(
    shard: VocabGroup | None, learnt: Tensor | None = None
) -> str | None:
    """Return what a source has that the fused loss does not support."""
    if shard is not None:
        return vocab_group.WHY_TWO_PASSES
    return temperature.WHY_TWO_PASSES if learnt is not None and temperature.learns(learnt) else None


def agreed(
    shard: VocabGroup,
    rows: Rows,
    ids: Tensor,
    wanted: tuple[str, ...],
    needs_grad: bool,
    picks: Picks | None,
    kept: KeptSets | None,
) -> tuple[VocabShards, Tensor]:
    """The columns of every rank, which all have the same call, and the ids to go on
    with.
    """
    picks, lists = picks or Picks(), () if kept is None else (kept.token_ids, kept.bounds)
    asked = (*wanted, picks.top, *(x.size(1) for x in picks.lists()), kept is not None)
    shards, ids = shard.agreed(rows, ids, asked, needs_grad, picks.lists() + lists)
    picks.check(rows, shards.total)
    return shards, ids


def part_of(
    kept: KeptSets | None, position: Tensor, shards: VocabShards, rows: Rows
) -> tuple[KeptSets | None, Tensor]:
    """Return a shard's part of kept sets, and the places of the rows' ids in it.

    A row whose set has an id beyond the vocabulary gives NaN, or an error.
    """
    if kept is None:
        return None, position
    known = kept.known(position, shards.total)
    if is_readable(known) and not bool(known.all()):
        raise rows.error(
            f"sampling_mask.token_ids has ids beyond {shards.total - 1}, the last of all ranks "
            "of process_group."
        )
    own = shards.params(math.inf)
    return kept.of_columns(torch.where(known, position, -1), own.vocab_start, own.vocab_size)


def refuse_transforms(rows: Rows, backend: str) -> None:
    """Raise if the statistics of a sharded vocabulary would be PyTorch's formula, which
    sees only one rank.
    """
    if backend == again.TORCH:
        raise rows.unsupported(
            "process_group: torch.func's transforms differentiate a formula of the whole "
            "vocabulary, but the vocabulary is in shards."
        )


@dataclass(frozen=True)
class LogitsSource(PlainSource):
    """Statistics of one logits tensor: those of ``STATS`` in
    :mod:`reweight_ops._core.backends.base`, and those of picked ids.
    """

    logits: Logits
    picks: Picks | None = None

    @property
    def rows(self) -> Rows:
        return self.logits.rows

    @property
    def info(self) -> SourceInfo:
        z = self.logits
        statistics, one_pass = primitives(z.kept)
        return SourceInfo(
            z.values.device,
            z.values.dtype,
            z.needs_grad,
            z.backend,
            statistics,
            one_pass,
            one_pass_unsupported_reason=one_pass_unsupported_reason(z.shard, z.temperature),
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        z = self.logits
        wanted = statistics_of(z.kept, names, z.rows)
        if z.shard is not None:
            whole: dict[str, Tensor] = self._of_shards(wanted, backend)
            return whole
        found = wanted if self.picks is None else (*wanted, PICKED, PICKED_IDS)
        if backend == again.TORCH:
            flat = again.rows(z.values, z.drop_last)
            picked = None if self.picks is None else self.picks.of(flat.detach(), z.ids, z.softmax)
            known = dict(
                zip(
                    found,
                    again.token_stats(flat, z.ids, z.temperature, z.softmax, found, picked, z.kept),
                    strict=True,
                )
            )
            return by_reader(known, z.kept)
        return self._statistics(wanted, z.softmax, self._options(backend))

    def _of_shards(self, wanted: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        z = self.logits
        assert z.shard is not None
        refuse_transforms(z.rows, backend)
        shards, ids = agreed(z.shard, z.rows, z.ids, wanted, z.needs_grad, self.picks, z.kept)
        kept, ids = part_of(z.kept, ids, shards, z.rows)
        part = replace(self, logits=replace(z, kept=kept, ids=ids))
        return part._statistics(
            wanted, shards.params(z.softmax.softcap), self._options(backend)._replace(shards=shards)
        )

    def _statistics(
        self, wanted: tuple[str, ...], softmax: SoftmaxParams, options: OpOptions
    ) -> dict[str, Tensor]:
        z, picked = self.logits, () if self.picks is None else (PICKED, PICKED_IDS)
        computed = temperature.with_reads(wanted, z.temperature, self.picks is not None)
        values = RowStatistics.apply(  # type: ignore[no-untyped-call]
            z.values,
            z.ids,
            z.temperature.detach(),
            z.kept,
            softmax,
            options,
            ",".join(computed),
            self.picks,
        )
        known = dict(zip((*computed, *picked), values, strict=True))
        return by_reader(
            temperature.differentiable(known, (*wanted, *picked), z.temperature), z.kept
        )

    def one_pass(self, work: PolicyWork, backend: str) -> tuple[Tensor, Tensor]:
        z = self.logits
        loss, table = OnePassLoss.apply(  # type: ignore[no-untyped-call]
            z.values,
            z.ids,
            z.temperature,
            z.kept,
            tuple(work.inputs),
            work.params,
            work.program,
            z.softmax,
            self._options(backend),
        )
        return loss, table

    def kernel(self, backend: str, device: torch.device, plan: str) -> str | None:
        kernel_of = load(backend).kernel_of
        return (
            None
            if plan != "one_pass" or kernel_of is None or self.logits.kept is not None
            else kernel_of(self.logits.values, self.logits.softmax.vocab_size, device)
        )

    def search(self, backend: str) -> str | None:
        return search_of(backend, 0 if self.picks is None else self.picks.top)

    def version(self) -> int:
        return _version(self.logits)

    def close(self) -> None:
        self.logits.mark_consumed()

    def _options(self, backend: str) -> OpOptions:
        return OpOptions(self.logits.drop_last, backend, self.logits.consume)


@dataclass(frozen=True)
class TwoLogitsSource(PlainSource):
    """Divergences of two logits tensors: ``forward_kl``, ``reverse_kl``, ``entropy``,
    ``other_entropy``.
    """

    both: TwoLogits

    @property
    def rows(self) -> Rows:
        return self.both.p.rows

    def kernel(self, backend: str, device: torch.device, plan: str) -> str | None:
        p, kernel_of = self.both.p, load(backend).divergence_kernel_of
        if kernel_of is None or p.shard is not None:
            return None
        return kernel_of(p.values, self.both.other, p.softmax.vocab_size, device)

    @property
    def info(self) -> SourceInfo:
        p = self.both.p
        return SourceInfo(
            p.values.device,
            p.values.dtype,
            p.needs_grad,
            p.backend,
            ("divergence_stats",),
            "divergence_loss_grad",
            self.both.other.dtype,
            one_pass_unsupported_reason=one_pass_unsupported_reason(p.shard),
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        if self.both.p.shard is not None:
            values = DivergenceStatistics.apply(*self.of_shards(DIVERGENCE_STATS, backend))  # type: ignore[no-untyped-call]
        elif backend == again.TORCH:
            softmaxes, options = self._rest(backend)
            values = again.divergence_stats(self.tensors, softmaxes, options.drop_last)
        else:
            values = DivergenceStatistics.apply(*self.tensors, *self._rest(backend))  # type: ignore[no-untyped-call]
        return dict(
            zip(("forward_kl", "reverse_kl", "entropy", "other_entropy"), values, strict=True)
        )

    def of_shards(self, asked: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
        """What an op is told where several ranks have the vocabulary, once they have
        agreed that ``asked`` is asked of all.
        """
        p = self.both.p
        assert p.shard is not None
        refuse_transforms(p.rows, backend)
        shards, ids = p.shard.agreed(p.rows, p.ids, asked, p.needs_grad)
        (_, cap, other_cap), options = self._rest(backend)
        logits, other, _, *temperatures = self.tensors
        return (
            logits,
            other,
            ids,
            *temperatures,
            (shards.params(cap).vocab_size, cap, other_cap),
            options._replace(shards=shards),
        )

    def one_pass(self, work: DivergenceWork, backend: str) -> tuple[Tensor, Tensor]:
        loss, table = OnePassDivergence.apply(*self.tensors, *work, *self._rest(backend))  # type: ignore[no-untyped-call]
        return loss, table

    def version(self) -> int:
        return _version(self.both.p)

    def close(self) -> None:
        self.both.p.mark_consumed()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        p = self.both.p
        return p.values, self.both.other, p.ids, p.temperature, self.both.other_temperature

    def _rest(self, backend: str) -> tuple[Softmaxes, OpOptions]:
        p = self.both.p
        softmaxes = (p.softmax.vocab_size, p.softmax.softcap, self.both.other_softmax.softcap)
        return softmaxes, OpOptions(p.drop_last, backend, p.consume)


@dataclass(frozen=True)
class JoinedSource(PlainSource):
    """A source and, under the name ``kl``, the forward divergence of a second source
    over the same rows.
    """

    first: LogitsSource
    second: TwoLogitsSource

    @property
    def rows(self) -> Rows:
        return self.first.rows

    @property
    def info(self) -> SourceInfo:
        other = self.second.info
        return self.first.info._replace(
            statistics=("token_stats", "divergence_stats"),
            one_pass=None,
            other_dtype=other.other_dtype,
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        kl = self.second.statistics(("forward_kl",), backend)["forward_kl"]
        return {
            **self.first.statistics(tuple(name for name in names if name != "kl"), backend),
            "kl": kl,
        }

    def version(self) -> int:
        return _version(self.first.logits)

    def close(self) -> None:
        self.first.close()


@dataclass(frozen=True)
class LogpsSource(PlainSource):
    """Statistics that the caller has computed, ``[N]`` each, by name in ``given``.

    ``evaluator`` is the backend whose row kernels evaluate the loss, None for PyTorch.
    """

    rows: Rows
    given: dict[str, Tensor]
    evaluator: str | None = None

    @property
    def info(self) -> SourceInfo:
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in self.given.values())
        return SourceInfo(
            self.rows.device, self.rows.dtype, needs_grad, None, evaluator=self.evaluator
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        return self.given
