"""Launch shapes: a table, no autotuning. What decides them (dtype, V, wave size) decides them for every row alike."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """A tile is ``vectors`` runs of ``slots`` vectors of 16 bytes, ``vector`` elements each; ``segment`` columns are one partial state.

    These four decide the order of additions, and ``warps`` does not.
    """

    slots: int
    vectors: int
    vector: int
    warps: int
    segment: int

    @property
    def block(self) -> int:
        """Columns of a tile."""
        return self.slots * self.vectors * self.vector


#: Registers of a thread on NVIDIA's: 1024 threads of a multiprocessor can have that many.
MAX_REGISTERS = 64

#: Bytes of a row up to which a program has that many threads. More threads a row means fewer rows at once, which share the L2 between
#: the two sweeps; fewer threads mean cheaper reductions.
_THREADS = ((8 << 10, 128), (64 << 10, 256), (1 << 62, 512))
_VECTORS = 2
_SEGMENT_BYTES = 64 << 10


def config_for(columns: int, itemsize: int, wave: int = 32) -> Config:
    """``wave``: threads of a warp, 64 on AMD's data-center GPUs."""
    vector = 16 // itemsize
    threads = next(t for limit, t in _THREADS if columns * itemsize <= limit)
    vectors = _VECTORS
    return Config(threads, vectors, vector, threads // wave, max(threads * vectors * vector, _SEGMENT_BYTES // itemsize))
