"""Launch shapes: a table, no autotuning. What decides them (dtype, V, wave size) decides them for every row alike."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """``vector``: elements of a 16-byte load. ``block`` columns are in flight in a program; ``segment`` columns are one partial result."""

    block: int
    vector: int
    warps: int
    segment: int


#: Registers of a thread on NVIDIA's: 1024 threads of a multiprocessor can have that many.
MAX_REGISTERS = 64

#: Bytes of a row up to which a program has that many threads. More threads a row means fewer rows at once, which share the L2 between
#: the two sweeps; fewer threads mean cheaper reductions.
_THREADS = ((8 << 10, 128), (64 << 10, 256), (1 << 62, 512))
_VECTORS_PER_THREAD = 1
_SEGMENT_BYTES = 64 << 10


def config_for(columns: int, itemsize: int, wave: int = 32) -> Config:
    """``wave``: threads of a warp, 64 on AMD's data-center GPUs."""
    vector = 16 // itemsize
    threads = next(t for limit, t in _THREADS if columns * itemsize <= limit)
    block = threads * vector * _VECTORS_PER_THREAD
    return Config(block, vector, threads // wave, max(block, _SEGMENT_BYTES // itemsize))
