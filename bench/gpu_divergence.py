"""The kernel on two logits tensors in ``make gpu-kernels``: whole rows against rows
that blocks share.

Both must give the same bits. Fractions are of the memory's own speed: a read of both
tensors for statistics, and in addition an update in place for what writes a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams
from reweight_ops._core.backends.native_divergence import NativeDivergence

from .device import FLUSH_BYTES, clock

#: The last shape is not split by default. The rows of the shape before it start
#: anywhere.
SHAPES = ((1, 151936), (8, 151936), (64, 151936), (160, 151936), (64, 50257), (264, 151936))
TINY_SHAPES = ((1, 33003), (2, 131101))
#: Whole rows come first, since the others must have their bits.
KERNELS = ("whole", "split")


def inputs(rows: int, vocab: int, device: str) -> DivergenceInputs:
    g = torch.Generator(device).manual_seed(0)
    made = torch.randn(2, rows, vocab, generator=g, device=device)
    logits, other = (3 * made).to(torch.bfloat16)
    one, softmax = torch.ones(1, device=device), SoftmaxParams(vocab)
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    return DivergenceInputs(logits, other, ids, one, one, softmax, softmax)


def time_pairs(
    rows: int, vocab: int, module: ModuleType, native: Any, device: str, rounds: int
) -> dict[str, Any]:
    """Time every primitive by both kernels, and the limits, in random orders."""
    primitives, two = NativeDivergence(native), inputs(rows, vocab, device)
    pristine = two.logits.clone()
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 16, dtype=torch.uint8, device=device)
    constants, weights = torch.tensor([0.5, 0.7, -0.3], device=device), torch.ones(rows).to(device)
    table = primitives.divergence_stats(two)
    derivatives = constants[:, None] * weights

    def restore() -> None:
        two.logits.copy_(pristine)
        flush.zero_()

    def read() -> None:
        for logits in (two.logits, two.other):
            logits.view(torch.int16).max()

    def update() -> None:
        two.logits.neg_()
        two.other.view(torch.int16).max()

    def gradient() -> None:
        primitives.divergence_grad(two, table, derivatives, two.logits)

    jobs: dict[str, tuple[str, Callable[[], Tensor | None]]] = {
        "divergence": ("read", lambda: primitives.divergence_stats(two)),
        "divergence, gradient": ("update", gradient),
        "divergence, both": (
            "update",
            lambda: primitives.divergence_loss_grad(two, constants, weights, two.logits),
        ),
    }

    def run(kernel: str, what: str) -> Tensor | None:
        module.set_divergence_kernel(kernel)
        return jobs[what][1]()

    def outcome(kernel: str, what: str) -> list[Tensor]:
        restore()
        found = run(kernel, what)
        parts = [two.logits.clone().view(torch.int16)]
        return parts if found is None else [*parts, found.view(torch.int32)]

    wrong: dict[str, str] = {}
    timed: dict[str, Callable[[], Any]] = {"limit: read": read, "limit: update": update}
    try:
        for what in jobs:
            want = outcome(KERNELS[0], what)
            for kernel in KERNELS:
                key = f"{kernel} rows: {what}"
                try:
                    if not all(map(torch.equal, outcome(kernel, what), want)):
                        wrong[key] = "the bits differ from whole rows: not timed"
                        continue
                except Exception as error:  # a kernel that fails must not end the run
                    wrong[key] = f"{type(error).__name__}: {error}"
                    continue
                timed[key] = lambda kernel=kernel, what=what: run(kernel, what)
        ms: dict[str, list[float]] = {key: [] for key in timed}
        for number in range(rounds):
            for key in random.Random(number).sample(sorted(timed), len(timed)):
                restore()
                ms[key].append(clock(device, timed[key])[0])
    finally:
        module.set_divergence_kernel("auto")
    fractions = {
        key: median(ms[f"limit: {jobs[key.partition(': ')[2]][0]}"]) / median(ms[key])
        for key in ms
        if not key.startswith("limit")
    }
    return {"rows": rows, "vocab": vocab, "ms": ms, "wrong": wrong, "fractions": fractions}
