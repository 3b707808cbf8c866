"""The resolver of shapes: which rows of a call are valid, and how they form
sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..detached import Detached, plain
from .across import across
from .groups import IGNORE_INDEX, Groups, describe
from .ids import check_ids
from .primitives import Masked, RowPrimitives, Runs
from .rows import Rows
from .structure import Structure, is_fake

#: The dtypes of values that the kernel of masks copies.
_COPIED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Rows without sequences are counted in runs of this many.
RUN = 1024

#: The arguments that say where packed sequences are.
_PACKED = ("cu_seqlens", "sequence_ids")

#: Where the rows of a sequence may lie anywhere, a row kernel looks for them among all
#: rows. Beyond this many looks PyTorch takes over, whose work does not grow with the
#: number of sequences.
_MOST_SEARCHED = 1 << 26


def packed_by(tensors: Mapping[str, Any]) -> str | None:
    """Return the argument that says where a call's packed sequences are, or None
    without any.
    """
    return next((name for name in _PACKED if tensors.get(name) is not None), None)


class RowLayout(NamedTuple):
    """The layout of rows that a backend's kernels resolve: everything except tensors.

    ``packed`` is the argument that says where the sequences are, if they are packed.
    """

    op: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    primitives: RowPrimitives
    runs: Runs
    packed: str | None = None

    def rows(
        self,
        found: Masked,
        tensors: dict[str, Any],
        segments: Groups | None = None,
        prompts: Groups | None = None,
        by_prompt: Masked | None = None,
    ) -> Rows:
        return Rows(
            self.op,
            self.shape,
            self.device,
            self.dtype,
            found.keep,
            found.counted,
            self.sequences(found),
            segments,
            tensors,
            found.ids,
            prompts,
            self.primitives,
            found,
            found.trust,
            by_prompt=by_prompt,
        )

    def sequences(self, found: Masked) -> Groups | None:
        runs, exist = found.runs, self.packed is not None or len(self.shape) > 1
        return Groups(runs.sequences, runs.length, runs.owner) if exist else None


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
    the backend, if given, do the work where they can.
    """
    if not shape:
        raise InvalidCall(
            f"{op}: the rows have no dimension; expected completion_ids of shape [N] or [B, T]. "
            f"{describe(tensors)}"
        )
    _check_kinds(op, tensors)
    over = across(op, tensors.get("sequence_group"))
    structure = Structure(op, tensors, validate)
    packed = _check_packed(op, shape, device, tensors, structure)
    layout = None
    if primitives is not None and over is None:  # they know the rows of one rank only
        layout = _layout(op, shape, device, dtype, tensors, primitives, packed)
    found = None if layout is None else _masked(layout, tensors, structure)
    if layout is not None and found is not None:
        if found.ids is not None:
            check_ids(op, found.ids, vocab_total, validate, tensors, found.bounds)
        sequences = layout.sequences(found)
        segments = _segments(op, shape, device, sequences, tensors, structure)
        _check_prompts(op, device, sequences, tensors, structure)
        return _with_prompts(layout, found, tensors, structure, tensors, segments)
    sequences = _sequences(shape, device, tensors, structure)
    if over is not None and sequences is not None:
        sequences = Groups(sequences.count, sequences.length, sequences.index, over)
    segments = _segments(op, shape, device, sequences, tensors, structure)
    _check_prompts(op, device, sequences, tensors, structure)
    prompts = _prompts(tensors, structure)
    ids = tensors.get("completion_ids")
    masks = []
    if tensors.get("completion_mask") is not None:
        masks.append(_mask(op, "completion_mask", shape, device, tensors))
    inside = None  # the rows of a sequence, of packed ones
    if sequences is not None and sequences.index is not None:
        _check_sequence_ids(
            structure,
            tensors,
            [*masks, *([] if ids is None else [ids.reshape(-1) != IGNORE_INDEX])],
        )
        inside = sequences.index < sequences.count
        masks.append(inside)
    if ids is not None:
        ids = ids.reshape(-1).long()
        if masks:
            ids = torch.where(functools.reduce(torch.logical_and, masks), ids, IGNORE_INDEX)
        keep = ids != IGNORE_INDEX
        check_ids(op, ids, vocab_total, validate, tensors)
    elif masks:
        keep = functools.reduce(torch.logical_and, masks)
    else:
        keep = torch.ones(math.prod(shape), dtype=torch.bool, device=device)
    denominator = keep
    if tensors.get("denominator_mask") is not None:
        denominator = _mask(op, "denominator_mask", shape, device, tensors)
        denominator = denominator if inside is None else denominator & inside
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


def bind_rows(layout: RowLayout, tensors: Mapping[str, Any], vocab_total: int) -> Rows:
    """Return the rows of a call whose tensors, except their values, have been checked
    before.

    No message describes them.
    """
    found = _masked(layout, tensors)
    assert found is not None, "the masks are where those of the first call were"
    if found.ids is not None:
        check_ids(layout.op, found.ids, vocab_total, False, {}, found.bounds)
    if tensors.get("group_ids") is None:
        return layout.rows(found, {})
    return _with_prompts(layout, found, tensors, Structure(layout.op, {}, False), {})


def _check_kinds(op: str, tensors: Mapping[str, Any]) -> None:
    """Raise for a tensor whose elements are not those at its address."""
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


def _check_packed(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    tensors: dict[str, Any],
    structure: Structure,
) -> str | None:
    """Check the shape and dtype of the argument that says where packed sequences are,
    not its values. Return its name, or None without any.
    """
    cu: Tensor | None
    ids: Tensor | None
    cu, ids, count = (tensors.get(name) for name in (*_PACKED, "num_sequences"))
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
    if ids is not None:
        structure.tensor("sequence_ids", ids, device)
        structure.count("num_sequences", count)
        if tuple(ids.shape) not in (shape, (math.prod(shape),)):
            raise InvalidCall(
                f"{op}: sequence_ids has shape {tuple(ids.shape)}, expected {shape}. "
                f"{describe(tensors)}"
            )
    return packed_by(tensors)


def _sequences(
    shape: tuple[int, ...],
    device: torch.device,
    tensors: dict[str, Any],
    structure: Structure,
) -> Groups | None:
    """Return the sequences of a call, as PyTorch finds them.

    A row whose sequence id is out of range is in no sequence here. Such an id is an
    error only in a valid row, and the valid rows are not known yet.
    """
    cu, ids, count = (tensors.get(name) for name in (*_PACKED, "num_sequences"))
    n = math.prod(shape)
    if cu is not None:
        structure.offsets("cu_seqlens", cu, n)
        position = torch.arange(n, device=device, dtype=cu.dtype)
        return Groups(
            cu.numel() - 1, index=torch.searchsorted(cu[1:].contiguous(), position, right=True)
        )
    if ids is not None and count is not None:
        index = ids.reshape(-1).long()
        return Groups(count, index=torch.where((index >= 0) & (index < count), index, count))
    return Groups(math.prod(shape[:-1]), length=shape[-1]) if len(shape) >= 2 else None


def _layout(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    tensors: Mapping[str, Any],
    primitives: RowPrimitives,
    packed: str | None,
) -> RowLayout | None:
    """Return the layout of a call, or None if row kernels cannot resolve it."""
    n = math.prod(shape)
    if packed == "cu_seqlens":
        runs = Runs(n, tensors["cu_seqlens"].numel() - 1)
    elif packed is not None:
        runs = Runs(n, tensors["num_sequences"])
        if runs.sequences < 1 or runs.sequences * n > _MOST_SEARCHED:
            return None
    else:
        length = shape[-1] if len(shape) > 1 else RUN
        runs = Runs(n, -(-n // max(length, 1)), length)
    return RowLayout(op, shape, device, dtype, primitives, runs, packed) if n else None


def _masked(
    layout: RowLayout, tensors: Mapping[str, Any], structure: Structure | None = None
) -> Masked | None:
    """Return the ids, masks and advantages of a call from one launch, or None if a mask
    is elsewhere.

    The values of offsets and sequence ids are checked too. Row kernels read only memory
    of the call whatever these are.
    """
    op, shape, device = layout.op, layout.shape, layout.device
    given: list[Tensor | None] = []
    for name in ("completion_ids", "completion_mask", "denominator_mask"):
        t = tensors.get(name)
        if t is not None and (not isinstance(t, Tensor) or t.shape != shape):
            raise _shape_error(op, name, t, shape, tensors)
        if t is not None and t.device != device:
            return None
        # There is at most one dimension of sequences, so that strides say where each
        # begins. Packed rows are one sequence here.
        if t is not None and layout.packed is not None:
            t = t.reshape(-1)
        elif t is not None and len(shape) > 2:
            t = t.reshape(-1, shape[-1])
        given.append(t)
    (ids, mask, denominator), runs = given, layout.runs
    where = None if layout.packed is None else tensors[layout.packed]
    if layout.packed == "cu_seqlens":
        runs = runs._replace(offsets=where)
    elif where is not None:
        runs = runs._replace(owner=where.reshape(-1))
    find = layout.primitives.mask
    if layout.primitives.copies and layout.packed is None:
        return find(ids, mask, denominator, runs, device, _to_copy(layout, tensors))
    found = find(ids, mask, denominator, runs, device)
    if where is None:
        return found
    structure = structure or Structure(op, {}, False)
    if found.trust is not None and not structure.reads(where):
        return found
    if layout.packed == "cu_seqlens":
        structure.offsets("cu_seqlens", where, runs.rows)
    else:
        masks = [] if mask is None else [mask != 0]
        _check_sequence_ids(
            structure, tensors, masks if ids is None else [*masks, ids != IGNORE_INDEX]
        )
    return found._replace(trust=structure.trust(layout.dtype))


def _to_copy(layout: RowLayout, tensors: Mapping[str, Any]) -> Tensor | None:
    """Return the advantages of padded rows as ``[S, length]``, for a kernel that copies
    them. They are None if they need no copy or PyTorch has to look at them.
    """
    value = tensors.get("advantages")
    if (
        not isinstance(value, Tensor)
        or value.device != layout.device
        or value.dtype not in _COPIED
        or value.requires_grad
        or layout.dtype != torch.float32
        or len(layout.shape) < 2
    ):
        return None
    found: Tensor = plain(value)
    *head, length = layout.shape
    if found.shape == layout.shape:
        is_there = found.dtype == layout.dtype and found.is_contiguous()
        return None if is_there else found.reshape(-1, length)
    if found.shape in (torch.Size(head), torch.Size([*head, 1])):
        return found.reshape(-1, 1).expand(-1, length)
    return None


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


def _check_prompts(
    op: str,
    device: torch.device,
    sequences: Groups | None,
    tensors: dict[str, Any],
    structure: Structure,
) -> None:
    """Check the shape and dtype of the prompts' ids, not their values."""
    ids, count = tensors.get("group_ids"), tensors.get("num_groups")
    if (ids is None) != (count is None):
        raise InvalidCall(
            f"{op}: group_ids and num_groups go together (an int, so that nothing waits for the "
            f"GPU). {describe(tensors)}"
        )
    if ids is None or count is None:
        return
    structure.tensor("group_ids", ids, device)
    structure.count("num_groups", count)
    total = 0 if sequences is None else sequences.count
    if ids.numel() != total or ids.dim() != 1:
        raise InvalidCall(
            f"{op}: group_ids must be of shape [S], one for each of the {total} sequences. "
            f"{describe(tensors)}"
        )


def _with_prompts(
    layout: RowLayout,
    found: Masked,
    tensors: Mapping[str, Any],
    structure: Structure,
    shown: dict[str, Any],
    segments: Groups | None = None,
) -> Rows:
    """Return the rows of a call with its prompts, which one launch finds where it can.

    They are trusted as far as every group is. Messages describe the tensors ``shown``.
    """
    ids, count, regroup = (
        tensors.get("group_ids"),
        tensors.get("num_groups"),
        layout.primitives.regroup,
    )
    prompts, by_prompt = None, None
    if ids is not None and count is not None:
        # a kernel looks for the sequences of each prompt, for RUN of them at a time
        if regroup is None or max(found.runs.sequences, RUN) * count > _MOST_SEARCHED:
            prompts = _prompts(tensors, structure)
        else:
            by_prompt, index = regroup(found, ids, count)
            if by_prompt.trust is found.trust or structure.reads(ids):
                structure.indices("group_ids", ids, count, "num_groups")
                by_prompt = by_prompt._replace(trust=found.trust)
            prompts, found = Groups(count, index=index), found._replace(trust=by_prompt.trust)
    rows = layout.rows(found, shown, segments, prompts, by_prompt)
    trust = structure.trust(layout.dtype)
    return rows if trust is None else rows.also_trusted(trust)


def _prompts(tensors: Mapping[str, Any], structure: Structure) -> Groups | None:
    """Return the prompts of a call, as PyTorch finds them."""
    ids, count = tensors.get("group_ids"), tensors.get("num_groups")
    if ids is None or count is None:
        return None
    structure.indices("group_ids", ids, count, "num_groups")
    index = ids.long()
    return Groups(count, index=torch.where((index >= 0) & (index < count), index, count))


def _check_sequence_ids(
    structure: Structure, tensors: Mapping[str, Any], masks: list[Tensor]
) -> None:
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
