"""The resolver of shapes: a call's rows, which of them are valid, how they form
sequences, and per-row arguments as ``[N]``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..detached import Detached, plain
from ..ranges import check_inputs
from .across import Across, across
from .constants import ConstantRows, as_tensor, varies
from .groups import IGNORE_INDEX, Groups, describe
from .primitives import Masked, RowPrimitives
from .structure import Structure, is_fake, is_readable

#: The reason why nothing runs along a sequence that several ranks have.
NO_ORDER = (
    "runs along a sequence, and no rank knows which tokens of other ranks come before its own. "
    "Gather the log-probs of whole sequences for policy_loss_from_logps."
)

#: Rows without sequences are counted in runs of this many.
RUN = 1024


@dataclass(frozen=True)
class Rows:
    """The rows of a call: shape R, masks and groups. Everything per row is flat,
    ``[N]``.
    """

    op: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype  # dtype of the row arithmetic: fp32, or fp64 for fp64 logits
    keep: Tensor  # [N] bool: rows in the loss
    denominator: Tensor  # [N] bool: rows that count in denominators
    sequences: Groups | None
    segments: Groups | None
    tensors: dict[str, Any] = field(repr=False)
    ids: Tensor | None = None  # [N] int64, IGNORE_INDEX where not kept
    prompts: Groups | None = None  # groups of sequences: those of one prompt
    # the backend's primitives that found keep, denominator and ids
    primitives: RowPrimitives | None = None
    masked: Masked | None = None  # what they found
    # []: 1, or NaN where the device finds that sequences or groups are malformed and
    # nothing waits for it
    trust: Tensor | None = None
    across: Across | None = None  # ranks that have more tokens of the same sequences

    @property
    def run(self) -> int:
        """Return how many rows one program of the :attr:`primitives` takes: a sequence,
        or a run of rows without sequences.
        """
        return RUN if self.sequences is None else self.sequences.length

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def error(self, message: str) -> InvalidCall:
        return InvalidCall(f"{self.op}: {message} {describe(self.tensors)}")

    def unsupported(self, message: str) -> UnsupportedRequest:
        return UnsupportedRequest(f"{self.op}: {message}")

    def without_inputs(self) -> Rows:
        """Return the same rows without the arguments of the call."""
        return (
            self
            if not self.tensors
            else Rows(
                self.op,
                self.shape,
                self.device,
                self.dtype,
                self.keep,
                self.denominator,
                self.sequences,
                self.segments,
                {},
                self.ids,
                self.prompts,
                self.primitives,
                self.masked,
                self.trust,
                self.across,
            )
        )

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``[N]`` as a 0-d tensor. It includes the rows of other
        ranks.
        """
        return x.sum() if self.across is None else self.across.sum(x.sum())

    def padded_length(self, sequences: Groups) -> int | Tensor:
        """Return the length of sequences that are runs of rows. That of sequences which
        several ranks have is the sum over the ranks.
        """
        length = sequences.length
        if self.across is None:
            return length
        return self.across.sum(torch.full((), length, dtype=self.dtype, device=self.device))

    def refuse_across(self, what: str, why: str) -> None:
        """Raise if several ranks have the sequences. ``what`` knows only the rows of
        one rank.
        """
        if self.across is not None:
            raise self.unsupported(f"sequence_group: {what} {why}")

    def check_divisor(self, name: str, value: Any) -> None:
        """Raise for a divisor of 0 if there are valid rows, where they may be read.

        Without a valid row a divisor of 0 is right, and the loss is 0.
        """
        if (
            is_readable(self.keep)
            and isinstance(value, (int, float))
            and value == 0
            and bool(self.keep.any())
        ):
            raise self.error(
                f"{name} is 0, but rows are valid: pass how many there are in the whole batch, "
                "or None for those of this call."
            )

    def check_ids(self, vocab_total: int) -> None:
        """Raise for an id outside of ``[0, vocab_total)``, where ids may be read.

        It is for a call that did not know the vocabulary when its rows were resolved.
        """
        assert self.ids is not None
        _check_ids(self.op, self.ids, vocab_total, False, self.tensors)

    def trusted(self, loss: Tensor) -> Tensor:
        """Return the loss, or NaN if :attr:`trust` is NaN. This holds also if malformed
        offsets leave no valid row.
        """
        return loss if self.trust is None else loss + (self.trust - 1)

    def need_sequences(self, why: str) -> Groups:
        if self.sequences is None:
            raise self.error(
                f"{why} needs sequences: pass [B, T] tensors, or cu_seqlens, or sequence_ids "
                "with num_sequences."
            )
        return self.sequences

    def need_prompts(self, why: str, group_size: int | None = None) -> Groups:
        """Return the groups of sequences that share a prompt: the call's ``group_ids``,
        or runs of ``group_size`` sequences.
        """
        count = self.need_sequences(why).count
        if (group_size is None) == (self.prompts is None):
            raise self.error(f"{why} needs either a group_size, or group_ids [S] with num_groups.")
        if group_size is None:
            assert self.prompts is not None
            return self.prompts
        if count % group_size:
            raise self.error(
                f"{why}: {count} sequences are not a multiple of group_size = {group_size}."
            )
        return Groups(count // group_size, length=group_size)

    def unflatten(self, x: Tensor) -> Tensor:
        return x.view(self.shape)

    def flatten_per_token(
        self, name: str, value: Any, *, logps: bool = False, differentiable: bool = False
    ) -> Tensor:
        """Return a per-row argument as ``[N]`` in the row dtype.

        It may have the token shape or the sequence shape, or be a constant. Any other
        shape is an error. With ``logps`` the argument holds log-probs. They have no
        gradient unless they are ``differentiable``.
        """
        if not isinstance(value, Tensor):
            if varies(value):
                check_inputs(self.op, ConstantRows, ((name, value),))
                return as_tensor(value, self.dtype, self.device).expand(self.count).contiguous()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
                allowed = ConstantRows.__ranges__.get(name)
                if allowed is not None and not allowed.has(value):
                    raise self.error(f"{name} is {value}, expected {allowed}.")
                return torch.full((self.count,), float(value), dtype=self.dtype, device=self.device)
            got = "NaN" if isinstance(value, float) else f"a {type(value).__name__}"
            raise self.error(f"{name} is {got}, expected a tensor or a number.")
        value = plain(value)
        self._check(name, value, logps, differentiable)
        found = self._spread(name, value)
        if found.dtype != self.dtype:  # the rows and their dtype in one copy
            found = found.to(self.dtype, memory_format=torch.contiguous_format)
        flat = found.reshape(-1)
        if (
            not torch.compiler.is_compiling()
            and flat.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            flat = flat.clone()  # autograd refuses to save an inference tensor
        return flat.contiguous()

    def is_per_token(self, value: Tensor) -> bool:
        """Return whether a per-row argument has one value per token, which may differ
        inside a sequence.
        """
        short = (
            self.sequences is not None
            and self.sequences.index is None
            and self.sequences.length < 2
        )
        return value.dim() > 0 and not short and tuple(value.shape) in (self.shape, (self.count,))

    def _check(self, name: str, value: Tensor, logps: bool, differentiable: bool) -> None:
        if value.device != self.device:
            raise self.error(
                f"{name} is on {value.device}, the logits or log-probs are on {self.device}."
            )
        if value.dtype.is_complex:
            raise self.error(f"{name} is {value.dtype}, expected real numbers.")
        if logps and value.dtype not in (torch.float32, torch.float64):
            raise self.error(
                f"{name} is {value.dtype}: log-probs in 16 bits lose the ratio; compute them "
                "with .float()."
            )
        if logps and value.requires_grad and not differentiable:
            raise self.error(
                f"{name} requires grad, but no gradient flows to stored log-probs: pass it "
                "detached."
            )

    def _spread(self, name: str, value: Tensor) -> Tensor:
        """Return a per-row argument with one value for each row.

        It is ``[N]`` or has the shape of the rows.
        """
        shape, rows = tuple(value.shape), self.shape
        if value.dim() == 0:
            return value.expand(self.count)
        packed = self.sequences is not None and self.sequences.index is not None
        if shape == rows or (packed and shape == (self.count,)):
            return value
        if packed:
            assert self.sequences is not None
            if shape in ((self.sequences.count, 1), (self.sequences.count,)) and shape != (
                self.count,
            ):
                spread = self.sequences.spread(value.reshape(-1))
                return spread if self.trust is None else spread * self.trust
            expected = f"({self.count},) per token, or ({self.sequences.count}, 1) per sequence"
        else:
            head = rows[:-1]
            if shape in (head, (*head, 1)):
                return value.reshape(*head, 1).expand(rows)
            expected = f"{rows} per token" + (
                f", or {head} or {(*head, 1)} per sequence" if head else ", or a number"
            )
        raise self.error(f"{name} has shape {shape}; the rows are {rows}, so expected {expected}.")


class RowLayout(NamedTuple):
    """The layout of rows that a backend's kernels resolve: everything except the
    tensors that say which rows are valid.
    """

    op: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    sequences: Groups | None
    primitives: RowPrimitives

    @property
    def run(self) -> int:
        return RUN if self.sequences is None else self.sequences.length

    def rows(
        self,
        found: Masked,
        tensors: dict[str, Any],
        segments: Groups | None = None,
        prompts: Groups | None = None,
        trust: Tensor | None = None,
    ) -> Rows:
        return Rows(
            self.op,
            self.shape,
            self.device,
            self.dtype,
            found.keep,
            found.counted,
            self.sequences,
            segments,
            tensors,
            found.ids,
            prompts,
            self.primitives,
            found,
            trust,
        )


def _mask(
    op: str,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    tensors: dict[str, Any],
) -> Tensor:
    mask = tensors[name]
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise _shape_error(op, name, mask, shape, tensors)
    if mask.device != device or mask.layout is not torch.strided:
        raise InvalidCall(
            f"{op}: {name} is a {mask.layout} tensor on {mask.device}, expected a strided one on "
            f"{device}. {describe(tensors)}"
        )
    return mask.reshape(-1) != 0


def _shape_error(
    op: str, name: str, mask: Any, shape: tuple[int, ...], tensors: Mapping[str, Any]
) -> InvalidCall:
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return InvalidCall(
        f"{op}: {name} has shape {got}, expected {shape} like the rows. {describe(tensors)}"
    )


def _sequences(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    tensors: dict[str, Any],
    structure: Structure,
) -> Groups | None:
    """Return the sequences of a call.

    A row whose sequence id is out of range is in no sequence here. Such an id is an
    error only in a valid row, and the valid rows are not known yet.
    """
    cu: Tensor | None
    ids: Tensor | None
    count: int | None
    cu, ids, count = (
        tensors.get("cu_seqlens"),
        tensors.get("sequence_ids"),
        tensors.get("num_sequences"),
    )
    n = math.prod(shape)
    if cu is not None and ids is not None:
        raise InvalidCall(f"{op}: pass cu_seqlens or sequence_ids, not both. {describe(tensors)}")
    if (ids is None) != (count is None):
        raise InvalidCall(
            f"{op}: sequence_ids and num_sequences go together (an int, so that nothing waits "
            f"for the GPU). {describe(tensors)}"
        )
    if cu is not None:
        structure.tensor("cu_seqlens", cu, device)
        if cu.dim() != 1 or cu.numel() < 2:
            raise InvalidCall(
                f"{op}: cu_seqlens must be of shape [S + 1], S at least 1. {describe(tensors)}"
            )
        if math.prod(shape[:-1]) != 1:
            raise InvalidCall(
                f"{op}: cu_seqlens needs packed rows, [N] or [1, N], not {shape}. "
                f"{describe(tensors)}"
            )
        structure.offsets("cu_seqlens", cu, n)
        position = torch.arange(n, device=device, dtype=cu.dtype)
        return Groups(
            cu.numel() - 1, index=torch.searchsorted(cu[1:].contiguous(), position, right=True)
        )
    if ids is not None and count is not None:
        structure.tensor("sequence_ids", ids, device)
        structure.count("num_sequences", count)
        if tuple(ids.shape) not in (shape, (n,)):
            raise InvalidCall(
                f"{op}: sequence_ids has shape {tuple(ids.shape)}, expected {shape}. "
                f"{describe(tensors)}"
            )
        index = ids.reshape(-1).long()
        return Groups(count, index=torch.where((index >= 0) & (index < count), index, count))
    return Groups(math.prod(shape[:-1]), length=shape[-1]) if len(shape) >= 2 else None


def _segments(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    sequences: Groups | None,
    tensors: dict[str, Any],
    structure: Structure,
) -> Groups | None:
    """Return the segments of a call. A segment is a run of equal ``segment_ids`` inside
    one sequence.
    """
    segment_ids = tensors.get("segment_ids")
    if segment_ids is None:
        return None
    structure.tensor("segment_ids", segment_ids, device)
    if tuple(segment_ids.shape) != shape:
        raise InvalidCall(
            f"{op}: segment_ids has shape {tuple(segment_ids.shape)}, expected {shape}. "
            f"{describe(tensors)}"
        )
    flat, n = segment_ids.reshape(-1), math.prod(shape)
    position = torch.arange(n, device=flat.device)
    owner = (
        torch.zeros_like(position)
        if sequences is None
        else (position // max(sequences.length, 1) if sequences.index is None else sequences.index)
    )
    start = torch.ones_like(position)
    start[1:] = ((flat[1:] != flat[:-1]) | (owner[1:] != owner[:-1])).long()
    return Groups(n, index=start.cumsum(0) - 1)


def _prompts(
    op: str,
    device: torch.device,
    sequences: Groups | None,
    tensors: dict[str, Any],
    structure: Structure,
) -> Groups | None:
    ids, count = tensors.get("group_ids"), tensors.get("num_groups")
    if (ids is None) != (count is None):
        raise InvalidCall(
            f"{op}: group_ids and num_groups go together (an int, so that nothing waits for the "
            f"GPU). {describe(tensors)}"
        )
    if ids is None or count is None:
        return None
    structure.tensor("group_ids", ids, device)
    structure.count("num_groups", count)
    total = 0 if sequences is None else sequences.count
    if ids.numel() != total or ids.dim() != 1:
        raise InvalidCall(
            f"{op}: group_ids must be of shape [S], one for each of the {total} sequences. "
            f"{describe(tensors)}"
        )
    structure.indices("group_ids", ids, count, "num_groups")
    index = ids.long()
    return Groups(count, index=torch.where((index >= 0) & (index < count), index, count))


def resolve_rows(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    tensors: dict[str, Any],
    vocab_total: int = 0,
    validate: bool = False,
    primitives: RowPrimitives | None = None,
) -> Rows:
    """Check the masks, ids and sequences of a call, and flatten them.

    ``tensors`` holds the arguments of the call by their public names. ``primitives`` of
    the backend, if given, do the work for ids of sequences of equal length.
    """
    if not shape:
        raise InvalidCall(
            f"{op}: the rows have no dimension; expected completion_ids of shape [N] or [B, T]. "
            f"{describe(tensors)}"
        )
    for name, t in tensors.items():
        if (
            isinstance(t, Tensor)
            and type(t) not in (Tensor, torch.nn.Parameter, Detached)
            and not torch.compiler.is_compiling()
            and not is_fake(t)
        ):
            raise UnsupportedRequest(
                f"{op}: {name} is a {type(t).__name__}; tensor subclasses are not supported, "
                "pass the local tensor."
            )
        # kernels receive addresses
        if isinstance(t, Tensor) and not torch.compiler.is_compiling() and t.is_neg():
            raise UnsupportedRequest(
                f"{op}: {name} is a lazy negation (Tensor.is_neg); pass {name}.resolve_neg()."
            )
    over = across(op, tensors.get("sequence_group"))
    structure = Structure(op, tensors, validate)
    sequences = _sequences(op, shape, device, tensors, structure)
    if over is not None:
        primitives = None  # the row kernels know the rows of one rank only
        sequences = (
            None
            if sequences is None
            else Groups(sequences.count, sequences.length, sequences.index, over)
        )
    segments = _segments(op, shape, device, sequences, tensors, structure)
    prompts = _prompts(op, device, sequences, tensors, structure)
    if (
        primitives is not None
        and math.prod(shape) > 0
        and (sequences is None or sequences.index is None)
    ):
        layout = RowLayout(op, shape, device, dtype, sequences, primitives)
        found = _masked(layout, tensors)
        if found is not None:
            _check_ids(op, found.ids, vocab_total, validate, tensors, found.bounds)
            return layout.rows(found, tensors, segments, prompts, structure.trust(dtype))
    ids = tensors.get("completion_ids")
    masks = []
    if tensors.get("completion_mask") is not None:
        masks.append(_mask(op, "completion_mask", shape, device, tensors))
    if sequences is not None and sequences.index is not None:
        _check_sequence_ids(
            structure,
            tensors,
            [*masks, *([] if ids is None else [ids.reshape(-1) != IGNORE_INDEX])],
        )
        masks.append(sequences.index < sequences.count)
    if ids is not None:
        ids = ids.reshape(-1).long()
        if masks:
            ids = torch.where(functools.reduce(torch.logical_and, masks), ids, IGNORE_INDEX)
        keep = ids != IGNORE_INDEX
        _check_ids(op, ids, vocab_total, validate, tensors)
    elif masks:
        keep = functools.reduce(torch.logical_and, masks)
    else:
        keep = torch.ones(math.prod(shape), dtype=torch.bool, device=device)
    denominator = keep
    if tensors.get("denominator_mask") is not None:
        denominator = _mask(op, "denominator_mask", shape, device, tensors)
    return Rows(
        op,
        shape,
        device,
        dtype,
        keep,
        denominator,
        sequences,
        segments,
        tensors,
        ids,
        prompts,
        trust=structure.trust(dtype),
        across=over,
    )


def _check_sequence_ids(structure: Structure, tensors: dict[str, Any], masks: list[Tensor]) -> None:
    """Check sequence ids. A row that the caller's ``masks`` ignore may have any
    sequence id.
    """
    index, count = tensors.get("sequence_ids"), tensors.get("num_sequences")
    if index is not None and count is not None:
        structure.indices(
            "sequence_ids",
            index.reshape(-1),
            count,
            "num_sequences",
            functools.reduce(torch.logical_and, masks) if masks else None,
        )


def bind_rows(layout: RowLayout, tensors: Mapping[str, Any], vocab_total: int) -> Rows:
    """Return the rows of a call whose tensors, except their values, have been checked
    before.

    No message describes them.
    """
    found = _masked(layout, tensors)
    assert found is not None, "the first call of this layout had ids"
    _check_ids(layout.op, found.ids, vocab_total, False, {}, found.bounds)
    return layout.rows(found, {})


def _masked(layout: RowLayout, tensors: Mapping[str, Any]) -> Masked | None:
    """Return the ids and masks of a call from one launch, or None without ids."""
    op, shape = layout.op, layout.shape
    given = []
    for name in ("completion_ids", "completion_mask", "denominator_mask"):
        t = tensors.get(name)
        if t is not None and (not isinstance(t, Tensor) or t.shape != shape):
            raise _shape_error(op, name, t, shape, tensors)
        # There is at most one dimension of sequences, so that strides say where each
        # begins.
        given.append(t if t is None or len(shape) <= 2 else t.reshape(-1, shape[-1]))
    ids, mask, denominator = given
    if ids is None or any(t is not None and t.device != layout.device for t in (mask, denominator)):
        return None
    return layout.primitives.mask(ids, mask, denominator, layout.run)


def _check_ids(
    op: str,
    ids: Tensor,
    vocab_total: int,
    validate: bool,
    tensors: dict[str, Any],
    bounds: tuple[int, int] | None = None,
) -> None:
    if bounds is not None and bounds[0] >= 0 and bounds[1] < vocab_total:
        return
    if not (validate or is_readable(ids)) or ids.device.type == "meta" or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low >= 0 and high < vocab_total:
        return  # the usual case takes one sweep
    bad = ((ids < 0) & (ids != IGNORE_INDEX)) | (ids >= vocab_total)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InvalidCall(
            f"{op}: completion_ids[{row}] (flat) is {int(ids[row])}, expected 0 to "
            f"{vocab_total - 1}, or {IGNORE_INDEX} for an ignored row. {describe(tensors)}"
        )
