"""Bytes, collectives and time of a call that several ranks make together.

Formulas compute them from the measured times of one H200. ``python -m bench.scaling``
prints the tables of ``docs/scaling.md``. Its tests compare the page with this file, and
the byte formulas with what gloo ranks pass to their collectives. Nothing here was
measured on more than one GPU: the links are assumptions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

#: Bytes of the exchange before a call, from each rank.
AGREEMENT = 64
#: Row states from which a log-prob is merged: itself, the log-sum-exp, and the rounding
#: error of each.
LOGP_STATES = 4
#: Row states of two logits tensors.
DIVERGENCE_STATES = 8
#: Sums over the columns of a generalised JSD, once those states are known.
JSD_SUMS = 2
#: Sums over the columns of StableMax: of all, the label's, and whether a shard has it.
STABLEMAX_SUMS = 3
#: Row states of the whole vocabulary in addition to those of a kept set: its entropy,
#: log-sum-exp, the rounding error of that, and a log-prob.
OVER_VOCABULARY = 4

RESULTS = Path(__file__).parent / "results"


def states(rows: int, statistics: int, fp64: bool = False) -> int:
    """Bytes that a rank sends in the one all-gather of a call over a sharded
    vocabulary.
    """
    return (8 if fp64 else 4) * statistics * rows


def hidden_gradient(rows: int, width: int, itemsize: int) -> int:
    """Bytes that a rank sends in the all-reduces of a sharded head's backward, over all
    chunks.
    """
    return rows * width * itemsize


def sequence_sum(sequences: int, fp64: bool = False) -> int:
    """Bytes of one sum over the ranks that have a call's sequences."""
    return (8 if fp64 else 4) * sequences


def row_vector(rows: int, itemsize: int = 4) -> int:
    """Bytes of a vector of the rows of all ranks, which an order statistic reads."""
    return itemsize * rows


def whole_rows(rows: int, columns: int, fp64: bool = False) -> int:
    """Bytes that a rank sends of one logits tensor for a formula of whole rows, if the
    largest shard has that many columns.
    """
    return (8 if fp64 else 4) * rows * columns


def gathered(given: int, world: int) -> int:
    """Bytes that a rank receives in an all-gather of ``given`` bytes from each."""
    return (world - 1) * given


def reduced(given: int, world: int) -> float:
    """Bytes that a rank sends in a ring all-reduce of ``given`` bytes."""
    return 2 * (world - 1) / world * given


class Links(NamedTuple):
    """Assumed speeds: GB/s per direction of a GPU and microseconds per collective.

    They hold inside a node of 8 and between nodes. They are not measured.
    """

    inside: float = 450.0
    between: float = 50.0
    latency_inside: float = 20.0
    latency_between: float = 60.0
    node: int = 8

    def ms(self, received: float, world: int) -> float:
        """Milliseconds of a collective in which a rank moves ``received`` bytes."""
        if world == 1:
            return 0.0
        near = world <= self.node
        rate, latency = (
            (self.inside, self.latency_inside) if near else (self.between, self.latency_between)
        )
        return latency / 1e3 + received / rate / 1e6


class Job(NamedTuple):
    """The batch of one data-parallel rank, as in ``bench/results/h200-*.json``."""

    rows: int = 8192
    width: int = 4096
    vocab: int = 151936
    itemsize: int = 2


def measured(name: str, provider: str) -> float:
    """Milliseconds on one H200."""
    cases = json.loads((RESULTS / f"h200-{name}.json").read_text())["cases"]
    return next(r["median_ms"] for r in cases[0]["results"] if r["provider"] == provider)


class Cost(NamedTuple):
    """Cost of a loss and its gradient on one rank.

    It has the GiB of logits and their gradient or of the head and its gradient, the
    bytes received, and milliseconds.
    """

    memory: float
    wire: float
    ms: float


def from_logits(job: Job, vocabulary: int, links: Links) -> Cost:
    """``policy_loss`` in two passes over a shard of the logits: an agreement and a
    gather of five states per row.
    """
    wire = gathered(states(job.rows, LOGP_STATES + 1), vocabulary)
    ms = (
        measured("loss", "cuda drop-in two_pass") / vocabulary
        + links.ms(gathered(AGREEMENT, vocabulary), vocabulary)
        + links.ms(wire, vocabulary)
    )
    return Cost(2 * job.rows * job.vocab * job.itemsize / vocabulary / 2**30, wire, ms)


def from_hidden(job: Job, vocabulary: int, links: Links, chunks: int = 4) -> Cost:
    """``linear_policy_loss`` in two passes.

    The hidden gradient of all chunks but the last is summed while the next chunk is
    computed.
    """
    wire = gathered(states(job.rows, LOGP_STATES + 1), vocabulary)
    hidden = reduced(hidden_gradient(job.rows, job.width, job.itemsize), vocabulary)
    compute = measured("linear", "cuda two_pass") / vocabulary
    ms = (
        compute
        + links.ms(gathered(AGREEMENT, vocabulary), vocabulary)
        + links.ms(wire, vocabulary)
        + links.ms(hidden / chunks, vocabulary)
    )
    return Cost(2 * job.vocab * job.width * job.itemsize / vocabulary / 2**30, wire + hidden, ms)


#: Ranks, and how many of them share a vocabulary. The others have their own rows.
PLACES = [(1, 1), (8, 1), (8, 8), (64, 8), (64, 16), (512, 8), (1024, 8), (1024, 16)]


def table() -> list[str]:
    """Rows of the page's table, in Markdown."""
    job, links = Job(), Links()
    lines = [
        "| ranks | vocabulary × rows | logits: GiB | MB received | ms | head: GiB | MB moved | "
        "ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, vocabulary in PLACES:
        logits, hidden = from_logits(job, vocabulary, links), from_hidden(job, vocabulary, links)
        cells = [f"{x.memory:.2f} | {x.wire / 1e6:.2f} | {x.ms:.2f}" for x in (logits, hidden)]
        lines.append(
            f"| {ranks} | {vocabulary} × {ranks // vocabulary} | {cells[0]} | {cells[1]} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
