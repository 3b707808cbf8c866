"""Ids of which a call wants the log-probs, several a row, of a vocabulary in shards:
what a rank tells the others of its own, and what a row's are.

A rank sends, for every row, the logits of the given ids (0 for those of other ranks),
and the likeliest of its own columns with their ids. With these every rank has the
logits of all ids that are picked, and beside the row's log-sum-exp their log-probs, as
:class:`.picked.Picked` forms them of one process's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from .base import SoftmaxParams
from .picked import Picked

#: Integers that travel as bits of row states, by their size.
_INTEGERS = {4: torch.int32, 8: torch.int64}


def pick_states(
    logits: Tensor,
    ids: Tensor,
    given: Tensor | None,
    likeliest: Tensor | None,
    top: int,
    temperature: Tensor,
    softmax: SoftmaxParams,
    dtype: torch.dtype,
) -> Tensor:
    """``[N, K + 2·top]`` in ``dtype``, of a shard's logits ``R + (V_local,)``: K logits
    of ``given``, then those of ``likeliest``, and the bits of their ids.

    ``likeliest`` ``[N, min(top, V_local)]`` are the ids of the shard's
    largest logits."""
    parts = (
        [] if given is None else [Picked(logits, ids, given, temperature, softmax).logits.to(dtype)]
    )
    if likeliest is not None:
        z = Picked(logits, ids, likeliest, temperature, softmax).logits.to(dtype)
        # of a shard with fewer columns
        missing = (ids.numel(), top - likeliest.size(1))
        own = torch.cat([likeliest, ids.new_full(missing, IGNORE_INDEX)], 1)
        parts += [
            torch.cat([z, z.new_full(missing, -math.inf)], 1),
            own.to(_INTEGERS[dtype.itemsize]).view(dtype),
        ]
    return torch.cat(parts, 1)


def merged_picks(
    states: Tensor, ids: Tensor, given: Tensor | None, top: int, columns: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """``(logits, ids)``, ``[N, K + top]``, from the states ``[W, N, K + 2·top]`` of all
    shards; of equal logits the lowest id is the likeliest.
    """
    values, chosen, count = [], [], 0
    if given is not None:
        count = given.size(1)
        edges = torch.tensor(columns, device=ids.device).cumsum(0)
        owner = torch.searchsorted(edges, given.clamp(min=0), right=True).clamp(
            max=len(columns) - 1
        )
        values.append(states[:, :, :count].gather(0, owner[None])[0])
        chosen.append(given)
    if top:
        z = states[:, :, count : count + top].movedim(0, 1).flatten(1)
        named = (
            states[:, :, count + top :]
            .contiguous()
            .view(_INTEGERS[states.element_size()])
            .long()
            .movedim(0, 1)
            .flatten(1)
        )
        missing = named == IGNORE_INDEX
        # columns that do not exist come last
        by_id = torch.where(missing, sum(columns), named).argsort(dim=-1)
        z, named = z.gather(1, by_id), named.gather(1, by_id)
        first = z.sort(dim=-1, descending=True, stable=True).indices[:, :top]
        values.append(z.gather(1, first))
        chosen.append(
            torch.where((ids == IGNORE_INDEX)[:, None], IGNORE_INDEX, named.gather(1, first))
        )
    return torch.cat(values, 1), torch.cat(chosen, 1)
