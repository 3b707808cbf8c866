"""What is computed of a chunk of logits: a row's statistics and their gradient, from one model's logits or from two models'.

A measure knows backends and formulas, and nothing of heads and chunks: those are :mod:`.autograd`'s. Records here have methods and no
properties: PyTorch 2.10 and 2.11 compile no property of a NamedTuple.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...backends.base import SoftmaxParams
from ...backends.picked import Picked
from ...backends.shards import VocabShards
from ...calls.sampling_mask import KeptSets
from .. import again, jsd_ops
from .. import ops as library
from ..autograd import FIXED, OpOptions, Softmaxes, asked_for, stats_table, whole_rows, with_empty, written_gradient
from ..picks import PICKED, PICKED_IDS, Picks
from .gemms import chunks


class PerRow(NamedTuple):
    """What is known of every computed row beside its logits. A temperature has one element or one a row."""

    ids: Tensor  # [M]
    temperature: Tensor
    other_temperature: Tensor | None = None
    picked: Tensor | None = None  # [M, K]: ids whose log-probs are wanted
    kept_ids: Tensor | None = None  # the three tensors of KeptSets
    kept_row: Tensor | None = None
    kept_bounds: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, temperature: Tensor, picked: Tensor | None, sets: KeptSets | None) -> PerRow:
        """Of one model's rows."""
        return cls(ids, temperature, None, picked, *((None,) * 3 if sets is None else sets[:3]))

    def sets(self) -> KeptSets | None:
        """Whose entropy is meant is told elsewhere."""
        if self.kept_ids is None or self.kept_row is None or self.kept_bounds is None:
            return None
        return KeptSets(self.kept_ids, self.kept_row, self.kept_bounds, False)

    def at(self, rows: slice | Tensor) -> PerRow:
        """Of these rows."""
        t, other = (t if t is None or t.size(-1) == 1 else t[rows].contiguous() for t in self[1:3])
        assert t is not None
        picked, sets = None if self.picked is None else self.picked[rows].contiguous(), self.sets()
        if sets is not None:
            sets = sets.rows(rows) if isinstance(rows, slice) else sets.select(rows)
        return PerRow(self.ids[rows].contiguous(), t, other, picked, *((None,) * 3 if sets is None else sets[:3]))


class LogitRows(NamedTuple):
    """The logits of some rows, those of the second model where there is one, and what else is known of the rows."""

    values: Tensor  # [n, V]
    other: Tensor | None
    rows: PerRow

    def tensors(self) -> tuple[Tensor, ...]:
        """What an op on one tensor or on two takes first."""
        if self.other is None:
            return self.values, self.rows.ids, self.rows.temperature
        assert self.rows.other_temperature is not None
        return self.values, self.other, self.rows.ids, self.rows.temperature, self.rows.other_temperature


class Found(NamedTuple):
    """What a measure has found of some rows, one element a row: what callers get, and what else its gradient reads."""

    outputs: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]

    def at(self, rows: slice) -> Found:
        """Of these rows."""
        return Found(*(tuple(x[rows] for x in part) for part in self))


#: Bytes of :func:`wide_blocks`: on a CPU few enough for a cache, on a GPU rows enough for every multiprocessor.
_BLOCK = {"cpu": 4 << 20, "cuda": 256 << 20}


def wide_blocks(logits: LogitRows) -> Iterator[tuple[slice, LogitRows]]:
    """A few rows at a time, with a copy of the first model's logits in the dtype of row arithmetic: where two gradients are added, the sum is rounded once."""
    dtype = library.row_dtype(logits.values)
    most = _BLOCK.get(logits.values.device.type, _BLOCK["cuda"]) // (logits.values.size(1) * dtype.itemsize)
    for rows in chunks(0, max(logits.values.size(0), 1), max(most, 1)):  # one of a call without rows
        other = None if logits.other is None else logits.other[rows]
        yield rows, LogitRows(logits.values[rows].to(dtype, copy=True), other, logits.rows.at(rows))


class Measure(Protocol):
    """Row statistics of logits."""

    def ran_by(self) -> str:
        """The backend."""

    def differentiable(self) -> tuple[bool, ...]:
        """Of each output, whether it has a gradient."""

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        """The statistics, and what the gradient reads if there will be one; of a shard, also what it is merged by."""

    def merged(self, found: Found, ids: Tensor) -> Found:
        """Of the statistics of all rows: those of whole rows, where several ranks have the vocabulary. One collective."""

    def gradient(self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool) -> Tensor | None:
        """The gradient by the first model's logits from the derivatives ``by`` each output; None if it stands over them now, which it does if it may."""

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        """The outputs as differentiable torch."""


class TokenMeasure(NamedTuple):
    """The named statistics of one model's logits; where ids are picked also their log-probs and themselves, ``top`` of them by their logits."""

    softmax: SoftmaxParams
    backend: str
    stats_of_rows: tuple[str, ...]
    picks: bool = False
    top: int = 0
    shards: VocabShards | None = None

    def ran_by(self) -> str:
        return self.backend

    def names(self) -> tuple[str, ...]:
        return (*self.stats_of_rows, PICKED, PICKED_IDS) if self.picks else self.stats_of_rows

    def differentiable(self) -> tuple[bool, ...]:
        return tuple(name not in (*FIXED, PICKED_IDS) for name in self.names())

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        z, ids, t = self._tensors(logits)
        wanted = asked_for(",".join(self.stats_of_rows), needs_grad or self.picks, self.shards)
        table = stats_table(z, ids, t, logits.rows.sets(), self.softmax, OpOptions(False, self.backend, False), wanted).unbind()
        outputs, rest = table[: len(self.stats_of_rows)], table[len(self.stats_of_rows) :]
        if self.picks:
            chosen = self._picks(logits).of(z, ids, self.softmax)
            lse = outputs[self.stats_of_rows.index("lse")]
            outputs = (*outputs, Picked(z, ids, chosen, t, self.softmax).logps(lse, rest[0]), chosen)
        return Found(outputs, rest)

    def merged(self, found: Found, ids: Tensor) -> Found:
        if self.shards is None:
            return found
        names = asked_for(",".join(self.stats_of_rows), True, self.shards)
        table = whole_rows(torch.stack([*found.outputs, *found.rest]), names, ids, self.shards).unbind()
        return Found(table[: len(self.stats_of_rows)], table[len(self.stats_of_rows) :])

    def gradient(self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool) -> Tensor | None:
        more = asked_for(",".join(self.stats_of_rows), True).split(",")[len(self.stats_of_rows) :]
        known = dict(zip((*self.names(), *more), (*found.outputs, *found.rest), strict=True))
        derivatives, options = dict(zip(self.names(), by, strict=True)), OpOptions(False, self.backend, over)
        return written_gradient(*self._tensors(logits), self.softmax, known, derivatives, options, over, logits.rows.sets())

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        z, ids, t = self._tensors(logits)
        chosen = self._picks(logits).of(z.detach(), ids, self.softmax) if self.picks else None
        return again.token_stats(z, ids, t, self.softmax, self.names(), chosen, logits.rows.sets())

    def _picks(self, logits: LogitRows) -> Picks:
        return Picks(logits.rows.picked, self.top)

    def _tensors(self, logits: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        return logits.values, logits.rows.ids, logits.rows.temperature


class DivergenceMeasure(NamedTuple):
    """``(KL(q‖p), KL(p‖q), H(p), H(q)[, JSD])`` of two models' logits: of the JSD, where there is a ``beta``, the gradient is that of nothing else."""

    softmaxes: Softmaxes
    backend: str
    beta: float | None
    shards: VocabShards | None = None  # over ranks, each with its columns of both models

    def ran_by(self) -> str:
        return self.backend

    def differentiable(self) -> tuple[bool, ...]:
        return (True, True, True, False) if self.beta is None else (False, False, False, False, True)

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        whole = library.called(library.divergence_stats, *logits.tensors(), *self.softmaxes, False, self.backend)
        if self.shards is not None:
            whole = with_empty(whole, logits.tensors(), self.softmaxes, self.backend)
        table = whole.unbind()
        if self.beta is None:
            return Found(table[:4], table[4:])
        return Found((*table[:4], jsd_ops.generalized_jsd(*logits.tensors(), self.beta, *self.softmaxes)), table[4:])

    def merged(self, found: Found, ids: Tensor) -> Found:
        if self.shards is None:
            return found
        table = self.shards.merged_divergences(torch.stack([*found.outputs, *found.rest]), ids).unbind()
        return Found(table[:4], table[4:])

    def gradient(self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool) -> Tensor | None:
        two, zero = logits.tensors(), torch.zeros_like(found.outputs[0])
        derivatives = [zero if g is None else g for g, moves in zip(by, self.differentiable(), strict=True) if moves]
        if self.beta is not None:
            arguments: tuple[Any, ...] = (*two, derivatives[0], self.beta, *self.softmaxes)
            if over:
                jsd_ops.generalized_jsd_grad_(*arguments)
                return None
            return jsd_ops.generalized_jsd_grad(*arguments)[1]  # type: ignore[no-any-return]
        table = torch.stack([*found.outputs, *found.rest])
        arguments = (*two, table, torch.stack(derivatives), *self.softmaxes, False, self.backend)
        found_by = library.called(library.divergence_grad_ if over else library.divergence_grad, *arguments)
        return None if over else found_by

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        return again.divergence_stats(logits.tensors(), self.softmaxes, False, self.beta)


class JointMeasure(NamedTuple):
    """One model's statistics and its divergences from a second one, of the same chunk of logits: the outputs of the first, then those of the second."""

    token: TokenMeasure
    divergence: DivergenceMeasure

    def ran_by(self) -> str:
        return self.token.ran_by()

    def differentiable(self) -> tuple[bool, ...]:
        return self.token.differentiable() + self.divergence.differentiable()

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        first, second = self.token.stats(logits, needs_grad), self.divergence.stats(logits, needs_grad)
        return Found(first.outputs + second.outputs, first.rest + second.rest)

    def merged(self, found: Found, ids: Tensor) -> Found:
        return found  # of one rank: a sharded vocabulary is refused beside a teacher

    def gradient(self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool) -> Tensor | None:
        outputs, rest = len(self.token.names()), 1  # of one model there is only lse_low besides
        parts: tuple[tuple[Measure, Found, tuple[Tensor | None, ...]], ...] = (
            (self.token, Found(found.outputs[:outputs], found.rest[:rest]), by[:outputs]),
            (self.divergence, Found(found.outputs[outputs:], found.rest[rest:]), by[outputs:]),
        )
        for (measure, known, derivatives), (_, _, others) in zip(parts, reversed(parts), strict=True):
            if all(g is None for g in others):
                return measure.gradient(logits, known, derivatives, over)
        out = logits.values if over else torch.empty_like(logits.values)
        for rows, wide in wide_blocks(logits):
            first, second = (
                # The second writes over the logits, which the first reads.
                measure.gradient(wide, known.at(rows), tuple(None if g is None else g[rows] for g in derivatives), over_wide)
                for (measure, known, derivatives), over_wide in zip(parts, (False, True), strict=True)
            )
            assert first is not None and second is None
            out[rows] = first.add_(wide.values)
        return None if over else out

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        return self.token.formulas(logits) + self.divergence.formulas(logits)
