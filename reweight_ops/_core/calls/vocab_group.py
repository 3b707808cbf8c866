"""A call whose vocabulary is in shards, one on each rank of a group.

The ranks agree on the call before any of them sends a statistic.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.shards import VocabShards, columns_of
from ..compiler import constant_result
from ..rows.ranks import agreed, digest
from ..rows.rows import Rows
from ..rows.structure import is_readable
from ..rows.traced import met, numbers_of_ranks
from .keywords import SoftmaxOptions

#: The ``vocab_size`` of a sharded call that was not given one, until the ranks have
#: exchanged their columns.
ANY_ID = 2**62

WHY_TWO_PASSES = (
    "process_group shards the vocabulary, and a row's statistics need those of all ranks"
)


@dataclass(frozen=True)
class VocabGroup:
    """The process group of a call.

    ``columns`` is the number of this rank's columns, padding included. ``vocab_size``
    is the size of the whole vocabulary if the caller gave it.
    """

    group: Any
    columns: int
    vocab_size: int | None

    def agreed(
        self,
        rows: Rows,
        ids: Tensor,
        asked: tuple[Any, ...],
        needs_grad: bool,
        lists: Sequence[Tensor] = (),
    ) -> tuple[VocabShards, Tensor]:
        """Return the columns of every rank, from one exchange of a few integers, and
        ``ids``.

        A graph of torch.compile reads these ids, so that the exchange comes first.
        Raises on every rank if their calls do not fit together. ``lists`` holds ids
        other than the rows' own.
        """
        same = {
            "rows": rows.count,
            "completion_ids and masks": 0,
            "vocab_size": -1 if self.vocab_size is None else self.vocab_size,
            "what is asked for": _number(",".join([str(x) for x in (*asked, rows.dtype)])),
            "whether a gradient is needed": int(needs_grad),
        }
        every = [x for x in (rows.ids, *lists) if x is not None]
        if torch.compiler.is_compiling():
            of, names, own = (
                (rows.op, self.group.group_name),
                ",".join(same),
                operator.index(self.columns),
            )
            sizes = numbers_of_ranks(*of, rows.device.type, names, "columns", own)
            ids = met(
                ids,
                every if rows.device.type == "cpu" else [],
                *of,
                names,
                list(same.values()),
                own,
                list(sizes),
            )
        else:
            same["completion_ids and masks"] = digest([x for x in every if is_readable(x)])
            sizes = agreed(rows.op, self.group, rows.device, same, {"columns": self.columns})[
                "columns"
            ]
        shards = VocabShards(rows.op, self.group, columns_of(sizes, self.vocab_size))
        if self.vocab_size is not None and shards.total < self.vocab_size:
            raise rows.error(
                f"vocab_size is {self.vocab_size}, and all ranks of process_group together have "
                f"{sum(sizes)} columns."
            )
        if not shards.total:
            raise rows.error("no rank of process_group has a column of the vocabulary.")
        rows.check_ids(shards.total)
        return shards, ids


@constant_result
def _number(text: str) -> int:
    return zlib.crc32(text.encode())


def vocab_group(options: SoftmaxOptions, columns: int) -> VocabGroup | None:
    """Return the group of a call with this rank's columns, or None without a group."""
    return (
        None
        if options.process_group is None
        else VocabGroup(options.process_group, columns, options.vocab_size)
    )
