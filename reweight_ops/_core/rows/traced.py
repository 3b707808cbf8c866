"""Collectives as custom ops for graphs of torch.compile.

An op takes the name of a group, and calls gloo or NCCL when the graph runs. PyTorch's
functional collectives do not report which call failed; these ops use the eager
collectives of :mod:`.ranks`, which do.

A graph needs some numbers of every rank before it runs, such as the columns of a shard.
The ranks exchange them during the trace (:func:`numbers_of_ranks`). A rank that already
has its graph answers a rank that traces, and then waits for it (:func:`.ranks.agreed`).
Therefore ranks may trace at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import CompileContext
from torch.library import Library, infer_schema

from ..compiler import constant_result, never_compiled
from . import ranks

_library = Library("reweight_ops", "FRAGMENT")  # type: ignore[no-untyped-call]

#: The numbers that were exchanged for a graph: torch.compile may restart its trace.
_told: dict[Any, tuple[int, ...]] = {}


def _of_name(group: str) -> Any:
    """Return the group of a name, as functional collectives do."""
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore


def _op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__
        _library.define(name + infer_schema(function, mutates_args=()))  # type: ignore[no-untyped-call]
        _library.impl(name, never_compiled(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
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


@_op(lambda after, *args: after.new_empty(0, dtype=torch.float32))
def agreed_after(
    after: Tensor,
    op: str,
    group: str,
    names: str,
    numbers: Sequence[int],
    name: str,
    own: int,
    expected: Sequence[int],
) -> Tensor:
    """Return a token once the ranks have agreed. ``after`` is computed before it.

    ``own`` is this rank's number of that name. A graph that was traced for the numbers
    of all ranks has them in ``expected``.
    """
    state = ranks.graph_for({name: tuple(expected)}) if expected else ranks.CALLS
    same = dict(zip(names.split(","), numbers, strict=True))
    ranks.agreed(op, _of_name(group), after.device, same, {name: own}, state)
    return after.new_empty(0, dtype=torch.float32)


@_op(lambda x, token, op, group: (torch.empty_like(x), torch.empty_like(token)))
def summed_after(x: Tensor, token: Tensor, op: str, group: str) -> tuple[Tensor, Tensor]:
    """Return the sum of ``x`` over ranks, after the collective that wrote the token,
    and a token. The adjoint is a sum over ranks too.
    """
    return ranks.summed_(op, _of_name(group), x.contiguous().clone()), token.clone()


def _of_sum(ctx: Any, inputs: tuple[Tensor, Tensor, str, str], output: Any) -> None:
    ctx.of, ctx.summed = inputs[2:], ctx.needs_input_grad[0]


def _gradient_of_sum(ctx: Any, upstream: Tensor, token: Tensor) -> tuple[Any, ...]:
    if ctx.summed:
        return *summed_after(upstream, token, *ctx.of), None, None
    return None, token, None, None


torch.library.register_autograd(
    "reweight_ops::summed_after", _gradient_of_sum, setup_context=_of_sum, lib=_library
)


@constant_result
def numbers_of_ranks(
    op: str, group: str, device: str, names: str, name: str, own: int
) -> tuple[int, ...]:
    """Return the number of that name of every rank, during the trace of a graph.

    ``names`` are those of the numbers that precede it in the exchange of the call.
    """
    trace = CompileContext.current_compile_id()
    key = (trace, op, group, own)
    if key not in _told:
        for other in [other for other in _told if other[0] != trace]:
            del _told[other]
        same: Mapping[str, int] = dict.fromkeys(names.split(","), 0)
        found = ranks.agreed(
            op, _of_name(group), torch.device(device), same, {name: own}, ranks.TRACES
        )
        _told[key] = found[name]
    return _told[key]
