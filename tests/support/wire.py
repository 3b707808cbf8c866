"""The communication of a rank: every collective of a call, with its bytes."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist


@contextmanager
def collectives():
    """A list of ``(name, bytes)`` of every collective that starts inside."""
    seen = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(outputs, x, group=None, **options):
        seen.append(("all_gather", x.nbytes))
        return gather(outputs, x, group=group, **options)

    def all_reduce(x, *arguments, **options):
        seen.append(("all_reduce", x.nbytes))
        return reduce(x, *arguments, **options)

    with patch.object(dist, "all_gather", all_gather), patch.object(dist, "all_reduce", all_reduce):
        yield seen
