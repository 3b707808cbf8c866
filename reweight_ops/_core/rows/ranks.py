"""Processes that make one call together: what they agree on before the call, and its
collectives.

Before anything else is sent, the ranks exchange :data:`FACTS` integers. The exchange
finds a rank whose arguments differ, or that has raised, and then every rank raises. If
a rank dies, or raises later, the wait of the others ends with an error: at once if its
connection closes, and otherwise after the group's timeout. Nothing here waits longer
than that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import local
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import InvalidCall, ReweightOpsError

#: The number of integers that each rank sends about a call: whether it has failed,
#: which call it is, and the values to compare.
FACTS = 8
_STATE, _OP, _FIRST = 0, 1, 2

#: States of a rank: it makes the call, it has raised, or it traces a graph of the call.
#: A larger number means that it runs a graph (:func:`graph_for`).
CALLS, FAILED, TRACES = 0, 1, 2

#: A number that a rank cannot tell. It differs from none.
UNKNOWN = -(2**62)

# the groups of this thread's call whose other ranks it has not met yet
_pending = local()


def check_group(op: str, name: str, group: Any) -> None:
    """Raise unless ``group`` is a process group of which this process is a member, or
    None.
    """
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise InvalidCall(
            f"{op}: {name} is a {type(group).__name__}, expected a "
            "torch.distributed.ProcessGroup, such as device_mesh.get_group('tp')."
        )


def size_and_rank(group: Any) -> tuple[int, int]:
    """Return how many processes the group has, and the rank of this one."""
    return dist.get_world_size(group), dist.get_rank(group)


@contextmanager
def announced(op: str, groups: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Announce a call with these groups.

    If the call raises before it has met the other ranks of a group, they are told and
    raise too.
    """
    before = getattr(_pending, "groups", [])
    _pending.groups = [
        group
        for group in groups.values()
        if group is not None and dist.is_available() and isinstance(group, dist.ProcessGroup)
    ]
    try:
        yield
    # any error is raised again: the others must not wait for this rank until the
    # group's timeout
    except Exception:
        for group in _pending.groups:
            with suppress(ReweightOpsError):  # the error to raise is this rank's own
                gathered(op, group, _facts(op, {}, FAILED, device))
        raise
    finally:
        _pending.groups = before


def agreed(
    op: str,
    group: Any,
    device: torch.device,
    same: Mapping[str, int],
    own: Mapping[str, int],
    state: int = CALLS,
) -> dict[str, tuple[int, ...]]:
    """Return ``own`` of every rank, by name.

    Raises on every rank if the ranks differ in ``same`` or are in different calls, or
    if one of them has raised. A rank that traces a graph of the call asks only for
    ``own``. The others answer, and meet it again when it makes the call.
    """
    facts = {**same, **own}
    _pending.groups = [other for other in getattr(_pending, "groups", []) if other is not group]
    told = gathered(op, group, _facts(op, facts, state, device)).tolist()
    mine = told[size_and_rank(group)[1]]
    for rank, theirs in enumerate(told):
        if theirs[_STATE] == FAILED:
            raise ReweightOpsError(
                f"{op}: rank {rank} of the group raised before its part of this call; see its "
                "own error."
            )
    for rank, theirs in enumerate(told):
        if theirs[_OP] != mine[_OP]:
            raise InvalidCall(
                f"{op}: rank {rank} of the group is in another call: all ranks of a group must "
                "make the same calls in the same order."
            )
    found = {
        name: tuple(theirs[at] for theirs in told)
        for at, name in enumerate(facts, _FIRST)
        if name in own
    }
    if state == TRACES:
        return found
    if any(theirs[_STATE] == TRACES for theirs in told):
        return agreed(op, group, device, same, own, state)
    for rank, theirs in enumerate(told):
        if theirs[_STATE] > TRACES and theirs[_STATE] != graph_for(found):
            raise InvalidCall(
                f"{op}: rank {rank} of the group runs a graph of torch.compile for other "
                f"numbers than the ranks have: {found}. Shards may "
                "change their sizes on all ranks at once, or after torch._dynamo.reset()."
            )
    for at, name in enumerate(same, _FIRST):
        values = [theirs[at] for theirs in told]
        if len(set(values) - {UNKNOWN}) > 1:
            raise InvalidCall(
                f"{op}: the ranks of the group differ in {name}, rank by rank: "
                f"{', '.join(map(str, values))}."
            )
    return found


def graph_for(found: Mapping[str, tuple[int, ...]]) -> int:
    """Return the state of a rank whose graph was traced for these results of
    :func:`agreed`.
    """
    return TRACES + 1 + zlib.crc32(repr(dict(found)).encode())


def digest(lists: Sequence[Tensor]) -> int:
    """Return a number that differs where lists of ids or their order differ."""
    return sum((i + 1) * _digest(x) for i, x in enumerate(lists)) % 2**62


def _digest(ids: Tensor) -> int:
    odd = 2 * torch.arange(ids.numel(), device=ids.device) + 1
    return int(((ids.flatten() + 1000) * odd).sum())


def _facts(op: str, facts: Mapping[str, int], state: int, device: torch.device) -> Tensor:
    numbers = [state, zlib.crc32(op.encode()), *facts.values()]
    assert len(numbers) <= FACTS
    return torch.tensor([*numbers, *[0] * (FACTS - len(numbers))], dtype=torch.int64, device=device)


@contextmanager
def waiting(op: str) -> Iterator[None]:
    """Run a collective. An error says which call it was and what may have happened."""
    try:
        yield
    except RuntimeError as error:
        raise ReweightOpsError(
            f"{op}: the other ranks of the group did not take part: one has raised, died, or "
            f"made another call. [{error}]"
        ) from error


def gathered(op: str, group: Any, x: Tensor) -> Tensor:
    """Return ``[W, *shape]``: ``x`` of every rank, in the order of ranks. It takes one
    collective.
    """
    world, _ = size_and_rank(group)
    x = x.detach().contiguous()
    out = x.new_empty((world, *x.shape))
    if x.numel():
        with waiting(op):
            dist.all_gather(list(out.unbind()), x, group=group)
    return out


def summed_(op: str, group: Any, x: Tensor) -> Tensor:
    """Sum ``x`` over all ranks in place, and return it.

    All ranks have the same bits, whatever the order of arrival.
    """
    if x.numel():
        with waiting(op):
            dist.all_reduce(x, group=group)
    return x


class Sums:
    """Sums over ranks of the parts of a tensor. A sum runs while the next part is
    computed.
    """

    def __init__(self, op: str, group: Any) -> None:
        self.op, self.group = op, group
        self._running: list[Any] = []

    def start(self, part: Tensor) -> None:
        """Start to sum a contiguous view in place. Nothing may use it before
        :meth:`finish`.
        """
        if part.numel():
            with waiting(self.op):
                self._running.append(dist.all_reduce(part, group=self.group, async_op=True))

    def finish(self) -> None:
        with waiting(self.op):
            for work in self._running:
                work.wait()
        self._running = []
