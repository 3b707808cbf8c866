"""Launch shapes, from a model of what one multiprocessor has to have in flight. No autotuning: dtype and V decide, for every row alike.

**Bytes in flight.** Memory of ``B`` bytes a second with a latency of ``L`` needs ``B·L`` bytes on their way, ``B·L / processors`` each: 26 KiB on an H200
(4.3 TB/s, 0.8 us, 132), 14 KiB on an A100 (1.9 TB/s, 108), 14 KiB on an MI300X (5.3 TB/s, 304). A thread has ``ahead`` tiles in flight, ``16·vectors``
bytes each: :func:`bytes_in_flight` is what the programs of a processor have together. Statistics read all the time. A one-pass program reads from memory
for about half of its time and from L2 for the rest, so a program needs twice as much.

**Registers** decide the programs of a processor: ``65536 / (threads · registers)``. The tile at work and those ahead take ``4·vectors`` each.

**L2.** Between its sweeps a one-pass row should stay in L2. It is read backwards the second time, so on average half of each row is alive,
``processors · programs · row / 2`` of 50 MB: few programs for long rows, each with much in flight.

**Slots** are what the end of a row costs: about 500 instructions a thread, against 8.6 a logit of the sweep. 256 for a row of 150 000 columns: 10 %.
"""

from __future__ import annotations

import os
from typing import NamedTuple

#: Registers of a multiprocessor (NVIDIA's), in 32-bit words.
REGISTERS = 65536


class Launch(NamedTuple):
    """Threads of a program, the registers that each may have, and the tiles that are loaded ahead (1 or 2). None of it changes a bit of a result."""

    threads: int
    registers: int
    ahead: int = 1

    def programs(self) -> int:
        """Programs that a processor has room for."""
        return min(2048 // self.threads, REGISTERS // (self.threads * self.registers))

    def alone(self) -> Launch:
        """The same threads with all registers that they can have: for the few programs of split rows, which have the processors to themselves."""
        return self._replace(registers=min(255, REGISTERS // self.threads))


class Shape(NamedTuple):
    """A tile is ``vectors`` runs of ``slots`` vectors of 16 bytes. These two decide the order of additions; a :class:`Launch` does not."""

    slots: int
    vectors: int
    stats: Launch
    one_pass: Launch


class Config(NamedTuple):
    """A shape for one dtype: ``vector`` elements are 16 bytes, ``segment`` columns are what one program of a split row sweeps."""

    slots: int
    vectors: int
    vector: int
    segment: int
    stats: Launch
    one_pass: Launch
    grad: Launch
    grad_vectors: int

    @property
    def block(self) -> int:
        """Columns of a tile."""
        return self.slots * self.vectors * self.vector


def bytes_in_flight(launch: Launch, slots: int, vectors: int) -> int:
    """What the programs of one processor have on its way while they wait for memory."""
    return launch.programs() * slots * vectors * launch.ahead * 16


_SHORT, _LONG = 64 << 10, 384 << 10
_SHORT_ROWS = (
    (8 << 10, Shape(128, 1, Launch(128, 64), Launch(128, 64))),
    (_SHORT, Shape(128, 4, Launch(128, 80), Launch(128, 80))),
)
#: For rows of at most so many bytes. `REWEIGHT_OPS_TRITON_SHAPES` names another table than "default", for benchmarks; bench/NOTES.md has predictions.
VARIANTS: dict[str, tuple[tuple[int, Shape], ...]] = {
    "default": (
        *_SHORT_ROWS,
        (_LONG, Shape(256, 4, Launch(256, 80), Launch(256, 128, 2))),
        (1 << 62, Shape(512, 4, Launch(256, 128), Launch(512, 128, 2))),
    ),
    "three programs": (*_SHORT_ROWS, (1 << 62, Shape(256, 4, Launch(256, 128, 2), Launch(256, 80)))),
    "one program": (*_SHORT_ROWS, (1 << 62, Shape(512, 4, Launch(512, 128, 2), Launch(512, 128, 2)))),
    "two vectors": (*_SHORT_ROWS, (1 << 62, Shape(256, 2, Launch(256, 64), Launch(256, 64)))),
    "eight vectors": (*_SHORT_ROWS, (1 << 62, Shape(256, 8, Launch(256, 128), Launch(256, 128)))),
}
_GRAD, _GRAD_VECTORS = Launch(256, 80), 4
_CAPPED_VECTORS = 2
_SEGMENT_BYTES = 64 << 10
#: Two tensors: ten numbers a slot and twice the words.
_DIVERGENCE = ((64 << 10, Shape(128, 1, Launch(128, 128), Launch(128, 128))), (1 << 62, Shape(256, 2, Launch(256, 128), Launch(256, 128))))


def config_for(columns: int, itemsize: int, capped: bool = False) -> Config:
    """For rows of ``columns`` elements; ``capped``: a softcap takes registers, so tiles are smaller."""
    table = VARIANTS[os.environ.get("REWEIGHT_OPS_TRITON_SHAPES", "default")]
    shape = next(s for limit, s in table if columns * itemsize <= limit)
    vector, vectors = 16 // itemsize, min(shape.vectors, _CAPPED_VECTORS) if capped else shape.vectors
    segment = max(2 * shape.slots * vectors * vector, _SEGMENT_BYTES // itemsize)
    return Config(shape.slots, vectors, vector, segment, shape.stats, shape.one_pass, _GRAD, _CAPPED_VECTORS if capped else _GRAD_VECTORS)


def divergence_config(columns: int, itemsize: int, other_itemsize: int) -> Config:
    """For rows of two tensors: a vector is 16 bytes of the one with the smaller elements."""
    shape = next(s for limit, s in _DIVERGENCE if columns * max(itemsize, other_itemsize) <= limit)
    vector = 16 // min(itemsize, other_itemsize)
    # A vector of the narrower tensor is two of the wider one: with two of them a tile spills.
    vectors = shape.vectors if itemsize == other_itemsize else 1
    segment = max(2 * shape.slots * vectors * vector, _SEGMENT_BYTES // max(itemsize, other_itemsize))
    return Config(shape.slots, vectors, vector, segment, shape.stats, shape.one_pass, shape.one_pass, vectors)
