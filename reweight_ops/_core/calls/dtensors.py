"""DTensors among a call's arguments: their local parts, and the group over which the
vocabulary is sharded.

Each rank computes its local rows and columns, so its arguments without a placement are
read as local too. Gradients are DTensors with the arguments' placements, by
``DTensor.to_local``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from .keywords import HiddenLogits, Lora

#: The arguments that have a vocabulary dimension, and which dimension it is.
_VOCABULARY = {
    "logits": -1,
    "other_logits": -1,
    "teacher_logits": -1,
    "ref_logits": -1,
    "other": -1,
    "teacher": -1,
    "lm_head_weight": 0,
    "lm_head_bias": 0,
    "lora.a": None,
    "lora.b": 0,
}
_HEAD = ("lm_head_weight", "lm_head_bias", "lora.a", "lora.b")


class _Axis(NamedTuple):
    """A dimension of a device mesh."""

    mesh: Any
    dim: int


def has_dtensors(values: Iterable[Any]) -> bool:
    """Return whether one of a call's arguments is a DTensor, or holds one."""
    found = sys.modules.get("torch.distributed.tensor")
    if found is None:
        return False
    # Every call asks, and a generator would be a call of Python's for each value.
    for x in values:
        if isinstance(x, found.DTensor) or (isinstance(x, tuple) and has_dtensors(x)):
            return True
    return False


def localized(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with local tensors in place of DTensors, and with the
    ``process_group`` that their placements name.
    """
    placed = {name: x for name, x in _parts(arguments) if hasattr(x, "placements")}
    vocabulary = {_vocabulary_axis(op, name, x) for name, x in placed.items()} - {None}
    if len(vocabulary) > 1:
        raise UnsupportedRequest(
            f"{op}: the vocabulary is sharded over several dimensions of device meshes; it can "
            "be over one."
        )
    rows = {_Axis(x.device_mesh, i) for name, x in placed.items() for i in _row_shards(name, x)}
    for axis in vocabulary:
        assert axis is not None
        if arguments.get("process_group") is not None:
            raise InvalidCall(
                f"{op}: process_group is given, and the DTensors name it already: pass one of them."
            )
        if "lm_head_weight" in placed and not _is_replicated(placed.get("hidden"), axis):
            raise UnsupportedRequest(
                f"{op}: lm_head_weight is sharded on its rows, and hidden is not a DTensor that "
                "is replicated over the same ranks. If this is FSDP's "
                "parameter, call inside of its module's forward, or after unshard(). If the "
                "vocabulary is sharded, say that all ranks have the same "
                "hidden states: DTensor.from_local(hidden, mesh, [Replicate()]); or pass local "
                "tensors and process_group."
            )
    local = {name: _local(name, x, rows) for name, x in placed.items()}
    found = {name: _rebuilt(name, x, local) for name, x in arguments.items()}
    for axis in vocabulary:
        assert axis is not None
        found["process_group"] = axis.mesh.get_group(axis.dim)
    return found


def _parts(arguments: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Yield names and tensors. Those inside of a LoRA term or a second model are
    included.
    """
    for name, x in arguments.items():
        if isinstance(x, HiddenLogits):
            yield from ((f"{name}.{part}", y) for part, y in _parts(x._asdict()))
        elif isinstance(x, Lora):
            yield from (
                (f"lora.{part}", y) for part, y in x._asdict().items() if isinstance(y, Tensor)
            )
        elif isinstance(x, Tensor):
            yield name, x


def _rebuilt(name: str, x: Any, local: Mapping[str, Tensor]) -> Any:
    if isinstance(x, HiddenLogits):
        return HiddenLogits(
            **{part: _rebuilt(f"{name}.{part}", y, local) for part, y in x._asdict().items()}
        )
    if isinstance(x, Lora):
        prefix = name.removesuffix("lora") + "lora."
        return Lora(local.get(f"{prefix}a", x.a), local.get(f"{prefix}b", x.b), x.scale)
    return local.get(name, x)


def _own_name(name: str) -> str:
    """Return the argument's own name, such as that of ``teacher.lm_head_weight``."""
    return name if name.startswith("lora.") else ".".join(name.split(".")[1:]) or name


def _vocabulary_axis(op: str, name: str, x: Any) -> _Axis | None:
    from torch.distributed.tensor import Replicate, Shard

    of_vocabulary, found = _VOCABULARY.get(_own_name(name)), []
    for i, placement in enumerate(x.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise UnsupportedRequest(
                f"{op}: {name} is placed as {placement} on its mesh: redistribute it to Shard "
                "or Replicate."
            )
        if of_vocabulary is not None and placement.dim == of_vocabulary % x.dim():
            found.append(i)
        elif _own_name(name) in _HEAD:
            raise UnsupportedRequest(
                f"{op}: {name} is sharded on dimension {placement.dim}, which is not the "
                "vocabulary's: redistribute it."
            )
    if len(found) > 1:
        raise UnsupportedRequest(
            f"{op}: {name} has the vocabulary sharded over several dimensions of its mesh; it "
            "can be over one."
        )
    return _Axis(x.device_mesh, found[0]) if found else None


def _row_shards(name: str, x: Any) -> list[int]:
    """Return the dimensions of the mesh over which the rows of a tensor are sharded."""
    if _own_name(name) in _HEAD:
        return []
    vocabulary = _VOCABULARY.get(_own_name(name))
    dim = None if vocabulary is None else vocabulary % x.dim()
    return [
        i
        for i, placement in enumerate(x.placements)
        if placement.is_shard() and placement.dim != dim
    ]


def _is_replicated(x: Any, axis: _Axis) -> bool:
    return (
        x is not None and x.device_mesh == axis.mesh and bool(x.placements[axis.dim].is_replicate())
    )


def _local(name: str, x: Any, rows: set[_Axis]) -> Tensor:
    from torch.distributed.tensor import Partial

    if _own_name(name) not in _HEAD:
        local: Tensor = x.to_local()
        return local
    # Where each rank has other rows, it has its share of a parameter's gradient.
    partial = [
        Partial() if _Axis(x.device_mesh, i) in rows else placement
        for i, placement in enumerate(x.placements)
    ]
    shared: Tensor = x.to_local(grad_placements=partial)
    return shared
