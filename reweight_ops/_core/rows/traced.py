"""Collectives as custom ops for graphs of torch.compile.

An op takes the name of a group, and calls gloo or NCCL when the graph runs. PyTorch's
functional collectives do not report which call failed; these ops use the eager
collectives of :mod:`.ranks`, which do.

A graph needs the columns of every rank before it runs. The ranks exchange them during
the trace (:func:`columns_of_ranks`). A rank that already has its graph answers a rank
that traces, and then waits for it (:func:`.ranks.agreed`). Therefore ranks may trace at
different times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import CompileContext
from torch.library import Library, infer_schema

from . import ranks

_library = Library("reweight_ops", "FRAGMENT")  # type: ignore[no-untyped-call]

#: The columns that were exchanged for a graph: torch.compile may restart its trace.
_told: dict[Any, tuple[int, ...]] = {}


def _of_name(group: str) -> Any:
    """Return the group of a name, as functional collectives do."""
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore


def _op(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    def define(function: Callable[..., Tensor]) -> Any:
        name = function.__name__
        _library.define(name + infer_schema(function, mutates_args=()))  # type: ignore[no-untyped-call]
        _library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"reweight_ops::{name}", fake, lib=_library)
        return getattr(torch.ops.reweight_ops, name).default

    return define


@_op(lambda x, op, group, world: x.new_empty((world, *x.shape)))
def gathered_over(x: Tensor, op: str, group: str, world: int) -> Tensor:
    return ranks.gathered(op, _of_name(group), x)


@_op(lambda x, op, group: torch.empty_like(x))
def summed_over(x: Tensor, op: str, group: str) -> Tensor:
    return ranks.summed_(op, _of_name(group), x.contiguous().clone())


@_op(lambda ids, *args: torch.empty_like(ids))
def met(
    ids: Tensor,
    lists: Sequence[Tensor],
    op: str,
    group: str,
    names: str,
    numbers: Sequence[int],
    own: int,
    expected: Sequence[int],
) -> Tensor:
    """Return ``ids`` after the ranks have agreed.

    All that reads the result comes after the exchange. ``lists`` holds ids that are the
    same on every rank.
    """
    same = dict(zip(names.split(","), numbers, strict=True)) | {
        "completion_ids and masks": ranks.digest(lists)
    }
    state = ranks.graph_for({"columns": tuple(expected)})
    ranks.agreed(op, _of_name(group), ids.device, same, {"columns": own}, state)
    return ids.clone()


@torch.compiler.assume_constant_result
def columns_of_ranks(op: str, group: str, device: str, names: str, own: int) -> tuple[int, ...]:
    """Return the columns of every rank, during the trace of a graph."""
    key = (CompileContext.current_compile_id(), op, group, own)
    if key not in _told:
        _told.clear()
        same: Mapping[str, int] = dict.fromkeys(names.split(","), 0)
        found = ranks.agreed(
            op, _of_name(group), torch.device(device), same, {"columns": own}, ranks.TRACES
        )
        _told[key] = found["columns"]
    return _told[key]
