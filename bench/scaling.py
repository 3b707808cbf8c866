"""Bytes, collectives and time of a call that several ranks make together: by formula, over the measured times of one H200.

``python -m bench.scaling`` prints the tables of ``docs/scaling.md``. Its tests hold the page to this file, and the formulas of bytes to what gloo ranks
hand to their collectives. Nothing here was measured on more than one GPU: links are assumptions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

#: Bytes of the exchange before a call, by each rank.
AGREEMENT = 64
#: Row states that every log-prob is merged by: itself, the log-sum-exp, and what rounding each of them lost.
LOGP_STATES = 4
#: Row states of two logits tensors.
DIVERGENCE_STATES = 8
#: Sums over the columns of a generalised JSD, when those are known.
JSD_SUMS = 2
#: Row states of the whole vocabulary beside those of a kept set: its entropy, log-sum-exp, what rounding that lost, and a log-prob.
OVER_VOCABULARY = 4

RESULTS = Path(__file__).parent / "results"


def states(rows: int, statistics: int, fp64: bool = False) -> int:
    """Bytes that a rank hands to the one all-gather of a call over a sharded vocabulary."""
    return (8 if fp64 else 4) * statistics * rows


def hidden_gradient(rows: int, width: int, itemsize: int) -> int:
    """Bytes that a rank hands to the all-reduces of a sharded head's backward, in all chunks together."""
    return rows * width * itemsize


def sequence_sum(sequences: int, fp64: bool = False) -> int:
    """Bytes of one sum over the ranks that have a call's sequences."""
    return (8 if fp64 else 4) * sequences


def gathered(given: int, world: int) -> int:
    """Bytes that a rank receives in an all-gather of so many from each."""
    return (world - 1) * given


def reduced(given: int, world: int) -> float:
    """Bytes that a rank sends in a ring all-reduce of so many."""
    return 2 * (world - 1) / world * given


class Links(NamedTuple):
    """Assumed, not measured: GB/s a direction of a GPU and microseconds a collective, inside of a node of 8 and between nodes."""

    inside: float = 450.0
    between: float = 50.0
    latency_inside: float = 20.0
    latency_between: float = 60.0
    node: int = 8

    def ms(self, received: float, world: int) -> float:
        """A collective in which a rank moves so many bytes."""
        if world == 1:
            return 0.0
        near = world <= self.node
        rate, latency = (self.inside, self.latency_inside) if near else (self.between, self.latency_between)
        return latency / 1e3 + received / rate / 1e6


class Job(NamedTuple):
    """A batch of one data-parallel rank, as in ``bench/results/h200-*.json``."""

    rows: int = 8192
    width: int = 4096
    vocab: int = 151936
    itemsize: int = 2


def measured(name: str, provider: str) -> float:
    """Milliseconds on one H200."""
    cases = json.loads((RESULTS / f"h200-{name}.json").read_text())["cases"]
    return next(r["median_ms"] for r in cases[0]["results"] if r["provider"] == provider)


class Cost(NamedTuple):
    """Of one rank, of a loss and its gradient: GiB of logits and their gradient or of the head and its gradient, bytes received, milliseconds."""

    memory: float
    wire: float
    ms: float


def from_logits(job: Job, vocabulary: int, links: Links) -> Cost:
    """``policy_loss``, two passes over a shard of the logits; an agreement and a gather of five states a row."""
    wire = gathered(states(job.rows, LOGP_STATES + 1), vocabulary)
    ms = (
        measured("loss", "cuda drop-in two_pass") / vocabulary
        + links.ms(gathered(AGREEMENT, vocabulary), vocabulary)
        + links.ms(wire, vocabulary)
    )
    return Cost(2 * job.rows * job.vocab * job.itemsize / vocabulary / 2**30, wire, ms)


def from_hidden(job: Job, vocabulary: int, links: Links, chunks: int = 4) -> Cost:
    """``linear_policy_loss``, two passes; the hidden gradient of all chunks but the last is summed while the next is computed."""
    wire = gathered(states(job.rows, LOGP_STATES + 1), vocabulary)
    hidden = reduced(hidden_gradient(job.rows, job.width, job.itemsize), vocabulary)
    compute = measured("linear", "cuda two_pass") / vocabulary
    ms = (
        compute + links.ms(gathered(AGREEMENT, vocabulary), vocabulary) + links.ms(wire, vocabulary) + links.ms(hidden / chunks, vocabulary)
    )
    return Cost(2 * job.vocab * job.width * job.itemsize / vocabulary / 2**30, wire + hidden, ms)


#: Ranks, and how many of them share a vocabulary: the rest have rows of their own.
PLACES = [(1, 1), (8, 1), (8, 8), (64, 8), (64, 16), (512, 8), (1024, 8), (1024, 16)]


def table() -> list[str]:
    """The rows of the page's table, in Markdown."""
    job, links = Job(), Links()
    lines = [
        "| ranks | vocabulary × rows | logits: GiB | MB received | ms | head: GiB | MB moved | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, vocabulary in PLACES:
        logits, hidden = from_logits(job, vocabulary, links), from_hidden(job, vocabulary, links)
        cells = [f"{x.memory:.2f} | {x.wire / 1e6:.2f} | {x.ms:.2f}" for x in (logits, hidden)]
        lines.append(f"| {ranks} | {vocabulary} × {ranks // vocabulary} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
