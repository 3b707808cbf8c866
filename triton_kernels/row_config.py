"""Sizes of the kernels on rows: how many rows a program takes at a time, and with how
many threads.

There is no autotuning. A size may decide the order of additions, and nothing else of a
result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from .config import Launch

#: The fewest rows and threads of a program.
_LEAST = 64


class RowConfig(NamedTuple):
    """Rows that a program takes at a time, and its launch.

    ``padded`` is the most that it takes of a padded sequence, and ``scanned`` of a sum
    along a sequence, of whose rows a thread holds two fp64 numbers each. ``packed`` is
    for packed sequences. It does not depend on their lengths, which differ from batch
    to batch. ``part`` is for a statistic of the call, ``weighed`` for row weights, and
    ``evaluated`` for a program's loss and its metrics.

    A thread has ``per_thread`` rows, unless that makes more than ``threads`` threads.
    It holds many numbers of each: ``registers`` are more than a sweep may have.
    """

    padded: int = 2048
    scanned: int = 1024
    packed: int = 1024
    part: int = 1024
    weighed: int = 1024
    evaluated: int = 256
    per_thread: int = 8
    threads: int = 256
    registers: int = 128

    def block(self, length: int) -> int:
        """Return how many rows are taken at a time of padded sequences, or with a
        ``length`` of 0 of packed ones.
        """
        if not length:
            return self.packed
        return min(self.padded, max(_LEAST, 1 << (length - 1).bit_length()))

    def launch(self, block: int) -> Launch:
        """Return the launch of a program that takes ``block`` rows."""
        return Launch(min(self.threads, max(_LEAST, block // self.per_thread)), self.registers)


#: When it is imported, `REWEIGHT_OPS_TRITON_ROWS` selects a table other than "default"
#: for benchmarks; bench/NOTES.md has the predictions.
VARIANTS = {
    "default": RowConfig(),
    "half": RowConfig(1024, 512, 512, 512, 512, 128),
    "wide": RowConfig(4096, 2048, 2048, 2048, 2048, registers=255),
    "four rows": RowConfig(evaluated=512, per_thread=4, threads=512),
}


_current = VARIANTS[os.environ.get("REWEIGHT_OPS_TRITON_ROWS", "default")]


def row_config() -> RowConfig:
    """Return the sizes of every launch of a kernel on rows."""
    return _current


@contextlib.contextmanager
def using(sizes: RowConfig) -> Iterator[None]:
    """Launch with other sizes meanwhile."""
    global _current
    before, _current = _current, sizes
    try:
        yield
    finally:
        _current = before
