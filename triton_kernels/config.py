"""Launch shapes from a model of the bytes that one multiprocessor must have in flight.

There is no autotuning. Dtype and V decide, and they decide alike for every row.

**Bytes in flight.** A memory of ``B`` bytes per second and a latency of ``L`` needs
``B·L`` bytes in flight, ``B·L / processors`` on each processor: 26 KiB on an H200 (4.3
TB/s, 0.8 us, 132), 14 KiB on an A100 (1.9 TB/s, 108), 14 KiB on an MI300X (5.3 TB/s,
304). A thread has ``ahead`` tiles of ``16·vectors`` bytes in flight.
:func:`bytes_in_flight` adds up the programs of a processor. Statistics read all the
time. A one-pass program reads from memory for about half of its time and from L2 for
the rest, so that it needs twice as much.

**Registers** limit the programs of a processor to ``65536 / (threads · registers)``.
The current tile and each tile ahead take ``4·vectors`` registers.

**L2.** A one-pass row should stay in L2 between its sweeps. The second sweep reads it
backwards, so that on average half of each row is needed: ``processors · programs · row
/ 2`` of 50 MB. Long rows therefore need few programs, each with much in flight.

**Slots** are the cost of a row's end: about 500 instructions per thread, compared to
8.6 per logit of the sweep. 256 slots cost 10 % of a row of 150 000 columns.
"""

from __future__ import annotations

import os
from typing import NamedTuple

#: Registers of an NVIDIA multiprocessor, in 32-bit words.
REGISTERS = 65536


class Launch(NamedTuple):
    """Launch of a program: its threads, registers per thread, and tiles loaded ahead (1
    or 2).

    A launch never changes a bit of a result.
    """

    threads: int
    registers: int
    ahead: int = 1

    def programs(self) -> int:
        """Number of programs that a processor has room for."""
        return min(2048 // self.threads, REGISTERS // (self.threads * self.registers))

    def shifting(self) -> Launch:
        """Return the same threads with registers for rows at any address, and one tile
        ahead: of each vector, two are loaded.
        """
        return self._replace(registers=max(self.registers, 128), ahead=1)

    def alone(self) -> Launch:
        """Return the same threads with as many registers as possible.

        The few programs of split rows use it: they have the processors to themselves.
        """
        return self._replace(registers=min(255, REGISTERS // self.threads))


class Shape(NamedTuple):
    """A tile: ``vectors`` runs of ``slots`` vectors of 16 bytes.

    These two numbers decide the order of additions. A :class:`Launch` does not.
    """

    slots: int
    vectors: int
    stats: Launch
    one_pass: Launch


class Config(NamedTuple):
    """A shape for one dtype.

    ``vector`` elements are 16 bytes. One program of a split row sweeps ``segment``
    columns.
    """

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
    """Bytes that the programs of one processor have in flight while they wait for
    memory.
    """
    return launch.programs() * slots * vectors * launch.ahead * 16


_SHORT, _LONG = 64 << 10, 384 << 10
_SHORT_ROWS = (
    (8 << 10, Shape(128, 1, Launch(128, 64), Launch(128, 64))),
    (_SHORT, Shape(128, 4, Launch(128, 80), Launch(128, 80))),
)
#: Shapes for rows of at most the given number of bytes. `REWEIGHT_OPS_TRITON_SHAPES`
#: selects a table other than "default" for benchmarks; bench/NOTES.md has the
#: predictions.
VARIANTS: dict[str, tuple[tuple[int, Shape], ...]] = {
    "default": (
        *_SHORT_ROWS,
        (_LONG, Shape(256, 4, Launch(256, 80), Launch(256, 128, 2))),
        (1 << 62, Shape(512, 4, Launch(256, 128), Launch(512, 128, 2))),
    ),
    "three programs": (
        *_SHORT_ROWS,
        (1 << 62, Shape(256, 4, Launch(256, 128, 2), Launch(256, 80))),
    ),
    "one program": (
        *_SHORT_ROWS,
        (1 << 62, Shape(512, 4, Launch(512, 128, 2), Launch(512, 128, 2))),
    ),
    "two vectors": (*_SHORT_ROWS, (1 << 62, Shape(256, 2, Launch(256, 64), Launch(256, 64)))),
    "eight vectors": (*_SHORT_ROWS, (1 << 62, Shape(256, 8, Launch(256, 128), Launch(256, 128)))),
}
_GRAD, _GRAD_VECTORS = Launch(256, 80), 4
_CAPPED_VECTORS = 2
_SEGMENT_BYTES = 64 << 10
#: Shapes for two tensors. A slot has ten numbers, and a tile twice the words.
_DIVERGENCE = (
    (64 << 10, Shape(128, 1, Launch(128, 128), Launch(128, 128))),
    (1 << 62, Shape(256, 2, Launch(256, 128), Launch(256, 128))),
)


def config_for(columns: int, itemsize: int, capped: bool = False) -> Config:
    """Return the shape for rows of ``columns`` elements.

    ``capped`` selects smaller tiles: a softcap takes registers.
    """
    table = VARIANTS[os.environ.get("REWEIGHT_OPS_TRITON_SHAPES", "default")]
    shape = next(s for limit, s in table if columns * itemsize <= limit)
    vector, vectors = (
        16 // itemsize,
        min(shape.vectors, _CAPPED_VECTORS) if capped else shape.vectors,
    )
    segment = max(2 * shape.slots * vectors * vector, _SEGMENT_BYTES // itemsize)
    return Config(
        shape.slots,
        vectors,
        vector,
        segment,
        shape.stats,
        shape.one_pass,
        _GRAD,
        _CAPPED_VECTORS if capped else _GRAD_VECTORS,
    )


def divergence_config(columns: int, itemsize: int, other_itemsize: int) -> Config:
    """Return the shape for rows of two tensors.

    A vector is 16 bytes of the tensor with the smaller elements.
    """
    shape = next(s for limit, s in _DIVERGENCE if columns * max(itemsize, other_itemsize) <= limit)
    vector = 16 // min(itemsize, other_itemsize)
    # A vector of the narrower tensor is two of the wider one: a tile of two vectors
    # would spill.
    vectors = shape.vectors if itemsize == other_itemsize else 1
    segment = max(
        2 * shape.slots * vectors * vector, _SEGMENT_BYTES // max(itemsize, other_itemsize)
    )
    return Config(
        shape.slots, vectors, vector, segment, shape.stats, shape.one_pass, shape.one_pass, vectors
    )
