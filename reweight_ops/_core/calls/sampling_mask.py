"""The ids that a sampler kept of each row. The distribution of a row is renormalised
over its set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..rows.groups import IGNORE_INDEX
from ..rows.rows import Rows
from ..rows.structure import is_readable
from .keywords import SoftmaxOptions
from .sampled import kept_by_sampler
from .softmax import Fail

#: The sets over which the entropy of a call with a mask may be taken.
ENTROPIES = ("kept", "vocabulary")

#: The place of a row's id in its set where the set is a shard's part of it, and the id
#: is in another's.
ELSEWHERE = -2
#: Beyond any id, of a vocabulary whose size is not known yet.
_MOST_IDS = 2**31


class SamplingMask(NamedTuple):
    """The ids that a sampler (top-k, top-p, min-p) kept of every row, in vLLM's form.

    The ids of row i are ``token_ids[offsets[i]:offsets[i + 1]]``.

    ``token_ids`` is ``[M]``, int32 or int64, in any order, without repeats in a row.
    ``offsets`` is ``[N + 1]``, int32 or int64, for the N rows of ``completion_ids``
    (flat). An ignored row may keep nothing.

    >>> import torch, reweight_ops as rw
    >>> kept = rw.SamplingMask(torch.tensor([1, 3, 0]), torch.tensor([0, 2, 3]))
    >>> rw.token_logps(torch.zeros(2, 4), torch.tensor([1, 0]), sampling_mask=kept)
    tensor([-0.6931,  0.0000])
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> SamplingMask:
        """Return the sets of a bool mask ``R + (V,)``, True where an id is kept.

        On a GPU this waits for the number of kept ids.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2:
            got = (
                f"{tuple(mask.shape)} {mask.dtype}"
                if isinstance(mask, Tensor)
                else f"a {type(mask).__name__}"
            )
            raise InvalidCall(f"SamplingMask.from_mask: mask is {got}, expected bool R + (V,).")
        if torch.compiler.is_compiling():
            raise UnsupportedRequest(
                "a bool sampling mask has no fixed number of ids: make "
                "rw.SamplingMask.from_mask(mask) outside of the graph."
            )
        rows = mask.reshape(-1, mask.size(-1))
        if mask.device.type == "meta":
            return cls(
                mask.new_empty(0, dtype=torch.int32),
                mask.new_empty(rows.size(0) + 1, dtype=torch.int64),
            )
        counts = rows.sum(-1)
        return cls(rows.nonzero()[:, 1].int(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        top_k: int | Tensor | None = None,
        top_p: float | Tensor | None = None,
        min_p: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        vocab_size: int | None = None,
    ) -> SamplingMask:
        """Return the sets that vLLM would sample from, computed from the sampler's own
        logits ``R + (V,)``.

        It is for a trainer that did not receive the sets.

        The arithmetic is in fp32 and in vLLM's order (``topk_topp_sampler.py``, its
        PyTorch path). The logits are divided by ``temperature``. First, ids whose
        probability is below ``min_p`` times the largest are removed. Then ids whose
        logit is below the ``top_k``-th largest are removed, so that ties with it stay.
        The rest is renormalised and sorted ascending, and ids whose cumulative
        probability is at most ``1 - top_p`` are removed. Of two that tie there the
        smaller id goes first. The last id is never removed, and ``-inf`` is never kept.

        ``top_k`` (0 or -1: all), ``top_p``, ``min_p`` and ``temperature`` are numbers,
        or tensors with one number per row, of shape R. On a GPU this waits, as
        :meth:`from_mask` does. The result differs from the sampler's if its logits
        differ: the rounding of another kernel may move an id across a threshold. vLLM's
        GPU kernels (Triton, FlashInfer) do not promise the order of its PyTorch path
        either, where probabilities tie.

        Raises:
            InvalidCall: a setting out of its range or of another shape.

        >>> import torch, reweight_ops as rw
        >>> logits = torch.tensor([[0.0, 3.0, 2.0, 3.0]])
        >>> rw.SamplingMask.from_logits(logits, top_k=1).token_ids
        tensor([1, 3], dtype=torch.int32)
        """
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
            raise InvalidCall(
                "SamplingMask.from_logits: logits must be a tensor R + (V,) of a floating dtype."
            )
        z = logits.detach()
        columns = z.size(-1) if vocab_size is None else vocab_size
        if type(columns) is not int or not 0 < columns <= z.size(-1):
            raise InvalidCall(
                f"SamplingMask.from_logits: vocab_size is {vocab_size!r}, logits have "
                f"{z.size(-1)} columns."
            )
        settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
        parts = [cls.from_mask(kept) for kept in kept_by_sampler(z[..., :columns], settings)]
        if len(parts) == 1:
            return parts[0]
        counts = (
            torch.cat([part.offsets.diff() for part in parts])
            if parts
            else z.new_zeros(0, dtype=torch.int64)
        )
        ids = (
            torch.cat([part.token_ids for part in parts])
            if parts
            else z.new_zeros(0, dtype=torch.int32)
        )
        return cls(ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


class KeptSets(NamedTuple):
    """The checked sets of a call's rows.

    Entry j is ``token_ids[j]`` of row ``row[j]``. The entries of row i are
    ``bounds[0, i]`` to ``bounds[1, i]``.
    """

    token_ids: Tensor  # [M] int64, inside of the vocabulary
    row: Tensor  # [M] int64; a number that is not a row: in no set
    bounds: Tensor  # [2, N] int64
    over_vocabulary: bool  # the entropy

    def select(self, index: Tensor) -> KeptSets:
        """Return the sets of the rows ``index`` ``[n]``, in this order."""
        place = self.row.new_full((self.bounds.size(1) + 1,), -1)
        place[index] = torch.arange(index.numel(), device=index.device)
        return self._replace(
            row=place[self.row.clamp(0, self.bounds.size(1))], bounds=self.bounds[:, index]
        )

    def of_columns(self, position: Tensor, start: int, size: int) -> tuple[KeptSets, Tensor]:
        """The part of the sets that is in ``size`` columns from ``start`` on, as ids
        from 0 on, and the place of each row's id in it: :data:`ELSEWHERE` if it
        is not among them. Nothing waits: entries of other columns come last, and are in
        no row.
        """
        entries = self.token_ids.numel()
        own = (self.token_ids >= start) & (self.token_ids < start + size)
        before = torch.cat([own.new_zeros(1, dtype=torch.int64), own.cumsum(0)])
        order, bounds = (~own).long().argsort(stable=True), before[self.bounds]
        at = (self.bounds[0] + position).clamp(0, max(entries - 1, 0))
        here, place = (
            (own[at], before[at] - bounds[0])
            if entries
            else (torch.zeros_like(position, dtype=torch.bool), position)
        )
        ids = torch.where(own, self.token_ids - start, 0)[order]
        sets = KeptSets(ids, torch.where(own, self.row, -1)[order], bounds, self.over_vocabulary)
        return sets, torch.where(position < 0, position, torch.where(here, place, ELSEWHERE))

    def known(self, position: Tensor, vocab_size: int) -> Tensor:
        """``[N]``: whether all ids of a row's set are below ``vocab_size``; True of
        ignored rows.
        """
        beyond = (self.token_ids >= vocab_size).cumsum(0)
        beyond = torch.cat([beyond.new_zeros(1), beyond])
        return (beyond[self.bounds[1]] == beyond[self.bounds[0]]) | (position < 0)

    def rows(self, rows: slice) -> KeptSets:
        """Return the sets of a run of rows."""
        return self._replace(row=self.row - rows.start, bounds=self.bounds[:, rows].contiguous())


@dataclass(frozen=True)
class Sampled:
    """The result of :func:`resolve_sampling_mask`: the sets, and the place of each
    row's id in its set ``[N]``.

    The place is IGNORE_INDEX in an ignored row. -1 makes the row NaN.
    """

    sets: KeptSets
    position: Tensor


def refuse_sampling_mask(op: str, options: SoftmaxOptions, why: str) -> None:
    """Raise if an op does not support distributions over kept sets."""
    if options.sampling_mask is not None:
        raise UnsupportedRequest(f"{op}: sampling_mask: {why}.")


def mask_tensors(value: Any) -> dict[str, Any]:
    """Return the tensors of the keyword, by the names that messages use."""
    if isinstance(value, tuple) and len(value) == 2:
        return {"sampling_mask.token_ids": value[0], "sampling_mask.offsets": value[1]}
    return {"sampling_mask": value}


def resolve_sampling_mask(
    rows: Rows, options: SoftmaxOptions, vocab_size: int, validate: bool, fail: Fail
) -> Sampled | None:
    """Return the kept sets of a call, or None without a mask.

    Values that may be read (on a CPU, or with ``validate=True``) are checked, and an
    error names the row. Elsewhere a row with an invalid set gets the id -1, which makes
    it NaN.
    """
    if options.entropy_over not in ENTROPIES:
        raise fail(
            f"entropy_over is {options.entropy_over!r}, expected one of {', '.join(ENTROPIES)}."
        )
    given = options.sampling_mask
    if given is None:
        if options.entropy_over != "kept":
            raise fail("entropy_over would have no effect: there is no sampling_mask.")
        return None
    if isinstance(given, Tensor):
        if options.process_group is not None and options.vocab_size is None:
            raise fail(
                "a bool sampling_mask has the columns of all ranks of process_group: pass "
                "vocab_size, which they are, or a SamplingMask."
            )
        if tuple(given.shape) != (*rows.shape, vocab_size):
            raise fail(
                f"sampling_mask has shape {tuple(given.shape)}, expected {rows.shape} + "
                f"({vocab_size},), or a SamplingMask."
            )
        given = SamplingMask.from_mask(given)
    token_ids, offsets = _checked_tensors(given, rows, fail)
    checks = _Checks(rows, token_ids.long(), offsets.long(), vocab_size, fail)
    read = (
        validate or all(map(is_readable, (token_ids, offsets, rows.keep)))
    ) and token_ids.device.type != "meta"
    ok = checks.read() if read else checks.flagged()
    return checks.result(ok, options.entropy_over == "vocabulary", named=read)


def _checked_tensors(given: Any, rows: Rows, fail: Fail) -> tuple[Tensor, Tensor]:
    parts = tuple(getattr(given, name, None) for name in SamplingMask._fields)
    if not all(isinstance(t, Tensor) for t in parts):
        raise fail(
            f"sampling_mask is a {type(given).__name__}, expected a SamplingMask(token_ids, "
            "offsets) or a bool mask R + (V,)."
        )
    for name, t in zip(SamplingMask._fields, parts, strict=True):
        assert isinstance(t, Tensor)
        if t.dtype not in (torch.int32, torch.int64) or t.dim() != 1:
            raise fail(
                f"sampling_mask.{name} is {tuple(t.shape)} {t.dtype}, expected one dimension of "
                "int32 or int64."
            )
        if t.device != rows.device:
            raise fail(f"sampling_mask.{name} is on {t.device}, the rows are on {rows.device}.")
    token_ids, offsets = parts
    assert isinstance(token_ids, Tensor) and isinstance(offsets, Tensor)
    if offsets.numel() != rows.count + 1:
        raise fail(
            f"sampling_mask.offsets has {offsets.numel()} elements, expected {rows.count + 1}: "
            "one more than there are rows."
        )
    return token_ids, offsets


class _Checks:
    """Checks of sets, as tensors in int64."""

    def __init__(
        self, rows: Rows, token_ids: Tensor, offsets: Tensor, vocab_size: int, fail: Fail
    ) -> None:
        assert rows.ids is not None
        self.rows, self.ids, self.vocab_size, self.fail = rows, rows.ids, vocab_size, fail
        self.token_ids, self.offsets = token_ids, offsets
        self.entries = token_ids.numel()
        place = torch.arange(self.entries, device=token_ids.device)
        self.row = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
        self.inside = (token_ids >= 0) & (token_ids < vocab_size)

    def read(self) -> Tensor | None:
        """Raise for an invalid set."""
        values = self.offsets.tolist()
        if values[0] != 0 or values[-1] != self.entries:
            raise self.fail(
                f"sampling_mask.offsets run from {values[0]} to {values[-1]}, expected 0 to "
                f"{self.entries}, the number of token_ids."
            )
        if values != sorted(values):
            at = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
            raise self.fail(
                f"sampling_mask.offsets[{at}] is {values[at]}, less than offsets[{at - 1}] = "
                f"{values[at - 1]}."
            )
        outside = ~self.inside & self.rows.keep[self.row]
        if bool(outside.any()):
            at = int(outside.nonzero()[0, 0])
            raise self.fail(
                f"sampling_mask.token_ids[{at}] is {int(self.token_ids[at])}, in row "
                f"{int(self.row[at])} (flat), expected 0 to {self.vocab_size - 1}."
            )
        ascends = (self.token_ids[1:] > self.token_ids[:-1]) | (self.row[1:] != self.row[:-1])
        if not bool(ascends.all()) and bool((twice := self._twice() & self.rows.keep).any()):
            raise self.fail(
                f"sampling_mask keeps an id of row {int(twice.nonzero()[0, 0])} (flat) more "
                "than once."
            )
        return None

    def flagged(self) -> Tensor:
        """Return ``[N]``: the rows whose set is valid."""
        start, stop = self.offsets[:-1], self.offsets[1:]
        whole = (self.offsets[0] == 0) & (self.offsets[-1] == self.entries) & (stop >= start).all()
        return whole & ~self._twice() & (self._per_row((~self.inside).long(), 0) == 0)

    def _per_row(self, x: Tensor, start: int) -> Tensor:
        """Return the largest value of each row, ``[M] -> [N]``. It is ``start`` for a
        row without entries.
        """
        n = self.rows.count
        return x.new_full((n + 1,), start).scatter_reduce(0, self.row, x, "amax")[:n]

    def _twice(self) -> Tensor:
        """Return ``[N]``: the rows that keep an id more than once."""
        most = min(self.vocab_size, _MOST_IDS)
        key, order = (self.row * (most + 2) + self.token_ids.clamp(-1, most) + 1).sort()
        again = torch.zeros_like(key)
        again[1:] = (key[1:] == key[:-1]).long()
        n = self.rows.count
        return again.new_zeros(n + 1).scatter_reduce(0, self.row[order], again, "amax")[:n] > 0

    def result(self, ok: Tensor | None, over_vocabulary: bool, named: bool) -> Sampled:
        """Return the sets and places. With ``named``, an id outside of its set is an
        error.
        """
        keep = self.rows.keep
        known = torch.cat([self.ids, self.ids.new_full((1,), IGNORE_INDEX)])
        start, at = self.offsets[:-1], torch.arange(self.entries, device=self.row.device)
        found = self._per_row(torch.where(self.token_ids == known[self.row], at, -1), -1)
        position = torch.where(found < 0, -1, found - start)
        if named and bool((missing := keep & (position < 0)).any()):
            i = int(missing.nonzero()[0, 0])
            kept = int(self.offsets[i + 1] - start[i])
            raise self.fail(
                f"completion_ids[{i}] (flat) is {int(self.ids[i])}, which is not one of the "
                f"{kept} ids that sampling_mask keeps there."
            )
        bounds = torch.stack([start, self.offsets[1:]])
        if ok is not None:
            position, bounds = torch.where(ok, position, -1), torch.where(ok, bounds, 0)
        position = torch.where(keep, position, IGNORE_INDEX)
        sets = KeptSets(
            self.token_ids.clamp(0, self.vocab_size - 1), self.row, bounds, over_vocabulary
        )
        return Sampled(sets, position)
