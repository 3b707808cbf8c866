"""What is computed of a chunk of logits: row statistics and their gradient, for one
model or two.

A measure uses backends and formulas. It does not know heads and chunks, which belong to
:mod:`.autograd`. Records here have methods and no properties: PyTorch 2.10 and
2.11 compile no property of a NamedTuple.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...backends.base import DIVERGENCE_STATS, SoftmaxParams
from ...backends.picked import Picked
from ...backends.shards import VocabShards
from ...calls.sampling_mask import KeptSets
from .. import again, jsd_ops
from .. import ops as library
from ..autograd import (
    FIXED,
    LSE_LOW,
    OpOptions,
    Softmaxes,
    asked_for,
    merged_rows,
    stats_table,
    with_empty,
    written_gradient,
)
from ..picks import PICKED, PICKED_IDS, Picks
from .gemms import chunks


class PerRow(NamedTuple):
    """The data of every computed row, apart from its logits. A temperature has one
    element, or one per row.
    """

    ids: Tensor  # [M]
    temperature: Tensor
    other_temperature: Tensor | None = None
    picked: Tensor | None = None  # [M, K]: ids whose log-probs are wanted
    kept_ids: Tensor | None = None  # the three tensors of KeptSets
    kept_row: Tensor | None = None
    kept_bounds: Tensor | None = None

    @classmethod
    def of(
        cls, ids: Tensor, temperature: Tensor, picked: Tensor | None, sets: KeptSets | None
    ) -> PerRow:
        """Return the data of one model's rows."""
        return cls(ids, temperature, None, picked, *((None,) * 3 if sets is None else sets[:3]))

    def sets(self) -> KeptSets | None:
        """Return the kept sets. They do not tell over which set the
        entropy is taken."""
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
        return PerRow(
            self.ids[rows].contiguous(),
            t,
            other,
            picked,
            *((None,) * 3 if sets is None else sets[:3]),
        )


class LogitRows(NamedTuple):
    """The logits of some rows, those of the second model if there is one, and the other
    data of the rows.
    """

    values: Tensor  # [n, V]
    other: Tensor | None
    rows: PerRow

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the first arguments of an op on one tensor or on two."""
        if self.other is None:
            return self.values, self.rows.ids, self.rows.temperature
        assert self.rows.other_temperature is not None
        return (
            self.values,
            self.other,
            self.rows.ids,
            self.rows.temperature,
            self.rows.other_temperature,
        )


class Found(NamedTuple):
    """The results of a measure for some rows, one element per row.

    They are the outputs for callers, and the further values that their gradient reads.
    """

    outputs: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]

    def at(self, rows: slice) -> Found:
        """Of these rows."""
        return Found(*(tuple(x[rows] for x in part) for part in self))


#: Bytes of :func:`wide_blocks`: on a CPU few enough for a cache, on a GPU rows enough
#: for every multiprocessor.
_BLOCK = {"cpu": 4 << 20, "cuda": 256 << 20}


def wide_blocks(logits: LogitRows) -> Iterator[tuple[slice, LogitRows]]:
    """Work on a few rows at a time, with a copy of the first model's logits in the
    dtype of row arithmetic.

    Where two gradients are added, the sum is rounded once.
    """
    dtype = library.row_dtype(logits.values)
    # a shard may have no column
    most = _BLOCK.get(logits.values.device.type, _BLOCK["cuda"]) // (
        max(logits.values.size(1), 1) * dtype.itemsize
    )
    # one of a call without rows
    for rows in chunks(0, max(logits.values.size(0), 1), max(most, 1)):
        other = None if logits.other is None else logits.other[rows]
        yield rows, LogitRows(logits.values[rows].to(dtype, copy=True), other, logits.rows.at(rows))


class Measure(Protocol):
    """Row statistics of logits."""

    def ran_by(self) -> str:
        """The backend."""

    def differentiable(self) -> tuple[bool, ...]:
        """Return for each output whether it has a gradient."""

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        """Return the statistics, and the values that the gradient reads if there will
        be one.

        For a shard they include those by which shards are merged.
        """

    def over(self) -> VocabShards | None:
        """Of a vocabulary that several ranks have."""

    def states(self, found: Found) -> Tensor:
        """``[S, M]``: what a rank tells the others of its shard's statistics of all
        rows.
        """

    def merged(self, states: Tensor, rows: PerRow) -> Found:
        """The statistics of whole rows from the states ``[W, S, M]`` of all ranks."""

    def sweeps_again(self) -> bool:
        """Whether some outputs are sums over the columns of what is known of whole
        rows: of shards, then, a second sweep finds them.
        """

    def sums(self, logits: LogitRows, found: Found) -> Tensor:
        """``[S, n]``: a shard's parts of these sums, from the statistics
        of whole rows."""

    def with_sums(self, found: Found, sums: Tensor) -> Found:
        """All that is found, with the sums ``[S, M]`` over all shards."""

    def gradient(
        self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool
    ) -> Tensor | None:
        """Return the gradient by the first model's logits from the derivatives ``by``
        each output.

        It is None if the gradient was written over them, which happens if ``over``
        allows it.
        """

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        """Return the outputs as differentiable torch."""


class TokenMeasure(NamedTuple):
    """The named statistics of one model's logits.

    If ids are picked, there are also their log-probs and the ids, ``top`` of them by
    their logits.
    """

    softmax: SoftmaxParams
    backend: str
    stats_of_rows: tuple[str, ...]
    picks: bool = False
    top: int = 0
    shards: VocabShards | None = None

    def ran_by(self) -> str:
        return self.backend

    def over(self) -> VocabShards | None:
        return self.shards

    def names(self) -> tuple[str, ...]:
        return (*self.stats_of_rows, PICKED, PICKED_IDS) if self.picks else self.stats_of_rows

    def differentiable(self) -> tuple[bool, ...]:
        return tuple(name not in (*FIXED, PICKED_IDS) for name in self.names())

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        z, ids, t = self._tensors(logits)
        wanted = asked_for(",".join(self.stats_of_rows), needs_grad or self.picks, self.shards)
        picks, options = self._picks(logits.rows), OpOptions(False, self.backend, False)
        whole, likeliest = stats_table(
            z, ids, t, logits.rows.sets(), self.softmax, options, wanted, picks
        )
        table = whole.unbind()
        outputs, rest = table[: len(self.stats_of_rows)], table[len(self.stats_of_rows) :]
        if self.picks and self.shards is not None:
            return Found(
                outputs, (*rest, picks.states(z, ids, t, self.softmax, whole.dtype, likeliest))
            )
        return (
            self._with_picks(outputs, rest, logits.rows, z, picks.joined(likeliest))
            if self.picks
            else Found(outputs, rest)
        )

    def _with_picks(
        self,
        outputs: tuple[Tensor, ...],
        rest: tuple[Tensor, ...],
        rows: PerRow,
        z: Tensor,
        chosen: Tensor,
        known: Tensor | None = None,
    ) -> Found:
        names = asked_for(",".join(self.stats_of_rows), True).split(",")
        by_name = dict(zip(names, (*outputs, *rest), strict=True))
        picked = Picked(z, rows.ids, chosen, rows.temperature, self.softmax, known)
        return Found((*outputs, picked.logps(by_name["lse"], by_name[LSE_LOW]), chosen), rest)

    def states(self, found: Found) -> Tensor:
        table = torch.stack([t for t in (*found.outputs, *found.rest) if t.dim() == 1])
        return torch.cat([table, found.rest[-1].t()]) if self.picks else table

    def merged(self, states: Tensor, rows: PerRow) -> Found:
        assert self.shards is not None
        names = asked_for(",".join(self.stats_of_rows), True, self.shards)
        table, picked = merged_rows(
            states, names, rows.ids, self.shards, self._picks(rows) if self.picks else None
        )
        outputs, rest = (
            table.unbind()[: len(self.stats_of_rows)],
            table.unbind()[len(self.stats_of_rows) :],
        )
        if picked is None:
            return Found(outputs, rest)
        values, chosen = picked
        return self._with_picks(outputs, rest, rows, values, chosen, values)

    def sweeps_again(self) -> bool:
        return False

    def sums(self, logits: LogitRows, found: Found) -> Tensor:
        raise NotImplementedError

    def with_sums(self, found: Found, sums: Tensor) -> Found:
        raise NotImplementedError

    def gradient(
        self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool
    ) -> Tensor | None:
        more = asked_for(",".join(self.stats_of_rows), True).split(",")[len(self.stats_of_rows) :]
        known = dict(zip((*self.names(), *more), (*found.outputs, *found.rest), strict=True))
        derivatives, options = (
            dict(zip(self.names(), by, strict=True)),
            OpOptions(False, self.backend, over),
        )
        return written_gradient(
            *self._tensors(logits),
            self.softmax,
            known,
            derivatives,
            options,
            over,
            logits.rows.sets(),
        )

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        z, ids, t = self._tensors(logits)
        chosen = self._picks(logits.rows).of(z.detach(), ids, self.softmax) if self.picks else None
        return again.token_stats(z, ids, t, self.softmax, self.names(), chosen, logits.rows.sets())

    def _picks(self, rows: PerRow) -> Picks:
        return Picks(rows.picked, self.top)

    def _tensors(self, logits: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        return logits.values, logits.rows.ids, logits.rows.temperature


class DivergenceMeasure(NamedTuple):
    """``(KL(q‖p), KL(p‖q), H(p), H(q)[, JSD])`` of two models' logits.

    With a ``beta`` there is the JSD, and only it has a gradient.
    """

    softmaxes: Softmaxes
    backend: str
    beta: float | None
    # shards over ranks, each with its columns of both models
    shards: VocabShards | None = None

    def ran_by(self) -> str:
        return self.backend

    def over(self) -> VocabShards | None:
        return self.shards

    def differentiable(self) -> tuple[bool, ...]:
        return (
            (True, True, True, False) if self.beta is None else (False, False, False, False, True)
        )

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        whole = library.called(
            library.divergence_stats, *logits.tensors(), *self.softmaxes, False, self.backend
        )
        if self.shards is not None:
            whole = with_empty(whole, logits.tensors(), self.softmaxes, self.backend)
        table = whole.unbind()
        if self.beta is None or self.shards is not None:
            return Found(table[:4], table[4:])
        return Found(
            (*table[:4], jsd_ops.generalized_jsd(*logits.tensors(), self.beta, *self.softmaxes)),
            table[4:],
        )

    def states(self, found: Found) -> Tensor:
        return torch.stack([*found.outputs, *found.rest])

    def merged(self, states: Tensor, rows: PerRow) -> Found:
        assert self.shards is not None
        table = self.shards.merged_divergences(states, rows.ids).unbind()
        return Found(table[:4], table[4:])

    def sweeps_again(self) -> bool:
        return self.beta is not None and self.shards is not None

    def sums(self, logits: LogitRows, found: Found) -> Tensor:
        known = torch.stack(found.rest)
        parts: Tensor = library.called(
            jsd_ops.jsd_parts, *logits.tensors(), known, self.beta, *self.softmaxes, False
        )
        return parts

    def with_sums(self, found: Found, sums: Tensor) -> Found:
        assert self.beta is not None
        to_p, to_q = sums.unbind()
        return Found(
            (*found.outputs, self.beta * to_q + (1 - self.beta) * to_p), (*found.rest, to_p)
        )

    def gradient(
        self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool
    ) -> Tensor | None:
        two, zero = logits.tensors(), torch.zeros_like(found.outputs[0])
        derivatives = [
            zero if g is None else g
            for g, moves in zip(by, self.differentiable(), strict=True)
            if moves
        ]
        if self.beta is not None and self.shards is not None:
            parts = (
                *two,
                torch.stack(found.rest),
                derivatives[0],
                self.beta,
                *self.softmaxes,
                False,
            )
            by_logits = library.called(
                jsd_ops.jsd_parts_grad_ if over else jsd_ops.jsd_parts_grad, *parts
            )
            return None if over else by_logits
        if self.beta is not None:
            arguments: tuple[Any, ...] = (*two, derivatives[0], self.beta, *self.softmaxes)
            if over:
                jsd_ops.generalized_jsd_grad_(*arguments)
                return None
            return jsd_ops.generalized_jsd_grad(*arguments)[1]  # type: ignore[no-any-return]
        table = torch.stack([*found.outputs, *found.rest])
        arguments = (*two, table, torch.stack(derivatives), *self.softmaxes, False, self.backend)
        found_by = library.called(
            library.divergence_grad_ if over else library.divergence_grad, *arguments
        )
        return None if over else found_by

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        return again.divergence_stats(logits.tensors(), self.softmaxes, False, self.beta)


class JointMeasure(NamedTuple):
    """One model's statistics and its divergences from a second model, from the same
    chunk of logits.

    The outputs of the first measure come first, then those of the second.
    """

    token: TokenMeasure
    divergence: DivergenceMeasure

    def ran_by(self) -> str:
        return self.token.ran_by()

    def differentiable(self) -> tuple[bool, ...]:
        return self.token.differentiable() + self.divergence.differentiable()

    def stats(self, logits: LogitRows, needs_grad: bool) -> Found:
        return self._joined(
            self.token.stats(logits, needs_grad), self.divergence.stats(logits, needs_grad)
        )

    def over(self) -> VocabShards | None:
        return self.token.over()

    def states(self, found: Found) -> Tensor:
        return torch.cat(
            [measure.states(part) for measure, part in self._parts(found, of_shard=True)]
        )

    def merged(self, states: Tensor, rows: PerRow) -> Found:
        own = states.size(1) - len(DIVERGENCE_STATS)
        return self._joined(
            self.token.merged(states[:, :own], rows), self.divergence.merged(states[:, own:], rows)
        )

    def sweeps_again(self) -> bool:
        return self.divergence.sweeps_again()

    def sums(self, logits: LogitRows, found: Found) -> Tensor:
        return self.divergence.sums(logits, self._parts(found)[1][1])

    def with_sums(self, found: Found, sums: Tensor) -> Found:
        (_, first), (_, second) = self._parts(found)
        return self._joined(first, self.divergence.with_sums(second, sums))

    def _parts(
        self, found: Found, of_shard: bool = False
    ) -> tuple[tuple[TokenMeasure, Found], tuple[DivergenceMeasure, Found]]:
        # lse_low, and of a shard what rounding its log-prob lost
        outputs, rest = len(self.token.names()), 2 if of_shard else 1
        first, second = (
            Found(found.outputs[:outputs], found.rest[:rest]),
            Found(found.outputs[outputs:], found.rest[rest:]),
        )
        return (self.token, first), (self.divergence, second)

    def _joined(self, first: Found, second: Found) -> Found:
        return Found(first.outputs + second.outputs, first.rest + second.rest)

    def gradient(
        self, logits: LogitRows, found: Found, by: tuple[Tensor | None, ...], over: bool
    ) -> Tensor | None:
        (_, first_known), (_, second_known) = self._parts(found)
        outputs = len(self.token.names())
        parts: tuple[tuple[Measure, Found, tuple[Tensor | None, ...]], ...] = (
            (self.token, first_known, by[:outputs]),
            (self.divergence, second_known, by[outputs:]),
        )
        for (measure, known, derivatives), (_, _, others) in zip(
            parts, reversed(parts), strict=True
        ):
            if all(g is None for g in others):
                return measure.gradient(logits, known, derivatives, over)
        out = logits.values if over else torch.empty_like(logits.values)
        for rows, wide in wide_blocks(logits):
            first, second = (
                # The second writes over the logits, which the first reads.
                measure.gradient(
                    wide,
                    known.at(rows),
                    tuple(None if g is None else g[rows] for g in derivatives),
                    over_wide,
                )
                for (measure, known, derivatives), over_wide in zip(
                    parts, (False, True), strict=True
                )
            )
            assert first is not None and second is None
            out[rows] = first.add_(wide.values)
        return None if over else out

    def formulas(self, logits: LogitRows) -> tuple[Tensor, ...]:
        return self.token.formulas(logits) + self.divergence.formulas(logits)
