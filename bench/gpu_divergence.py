"""The kernels on two logits tensors in ``make gpu-kernels``: whole rows against rows
that blocks share, variants of both, and Triton.

All rows of the CUDA kernels must have the bits of the released whole rows; Triton must
pass the criterion of accuracy. Sure rows have most of their mass in one column: it is
left out of the sums, and a warp (in Triton, a program) reads some columns again. What
that costs is the time beside that of the same job on other rows. Fractions are of the
memory's own speed: a read of both tensors for statistics, and in addition an update in
place for what writes a gradient.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reweight_ops._core.backends import select
from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams
from reweight_ops._core.backends.native_divergence import NativeDivergence
from reweight_ops.testing.criterion import value_error

from . import ahead
from .device import FLUSH_BYTES, clock

#: The last shape is not split by default. The rows of the shape before it start
#: anywhere.
SHAPES = ((1, 151936), (8, 151936), (64, 151936), (160, 151936), (64, 50257), (264, 151936))
TINY_SHAPES = ((1, 33003), (2, 131101))
#: Whole rows come first, since the others must have their bits.
KERNELS = ("whole", "split")
GATE_ROWS = 8
SURE = "divergence, sure rows"

Job = Callable[[], Tensor | None]


def inputs(rows: int, vocab: int, device: str, sure: bool = False) -> DivergenceInputs:
    g = torch.Generator(device).manual_seed(0)
    made = 3 * torch.randn(2, rows, vocab, generator=g, device=device)
    if sure:
        made[..., vocab // 2] = 60
    logits, other = made.to(torch.bfloat16)
    one, softmax = torch.ones(1, device=device), SoftmaxParams(vocab)
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    return DivergenceInputs(logits, other, ids, one, one, softmax, softmax)


@dataclass
class Pairs:
    """The jobs of one shape by name, each on fresh logits, and the limit of each."""

    two: DivergenceInputs
    sure: DivergenceInputs
    pristine: Tensor
    flush: Tensor

    @classmethod
    def make(cls, rows: int, vocab: int, device: str) -> Pairs:
        two = inputs(rows, vocab, device)
        flush = FLUSH_BYTES if device == "cuda" else 16
        return cls(
            two,
            inputs(rows, vocab, device, sure=True),
            two.logits.clone(),
            torch.empty(flush, dtype=torch.uint8, device=device),
        )

    def some(self, dtype: torch.dtype) -> Pairs:
        """The first rows, in another dtype."""

        def cut(two: DivergenceInputs, logits: Tensor) -> DivergenceInputs:
            return two._replace(
                logits=logits[:GATE_ROWS].to(dtype),
                other=two.other[:GATE_ROWS].to(dtype),
                ids=two.ids[:GATE_ROWS],
                temperature=two.temperature.to(dtype),
                other_temperature=two.other_temperature.to(dtype),
            )

        two = cut(self.two, self.pristine)
        return Pairs(two, cut(self.sure, self.sure.logits), two.logits.clone(), self.flush[:16])

    def restore(self) -> None:
        self.two.logits.copy_(self.pristine)
        self.flush.zero_()

    def limits(self) -> dict[str, Callable[[], Any]]:
        def read() -> None:
            for logits in (self.two.logits, self.two.other):
                logits.view(torch.int16).max()

        def update() -> None:
            self.two.logits.neg_()
            self.two.other.view(torch.int16).max()

        return {"read": read, "update": update}

    def jobs(self, primitives: Any) -> dict[str, tuple[str, Job]]:
        two = self.two
        of_rows = {
            "dtype": torch.promote_types(two.logits.dtype, torch.float32),
            "device": two.logits.device,
        }
        constants = torch.tensor([0.5, 0.7, -0.3], **of_rows)
        weights = torch.ones(two.ids.numel(), **of_rows)
        derivatives = constants[:, None] * weights

        @functools.cache  # of logits that no gradient has replaced yet
        def table() -> Tensor:
            return primitives.divergence_stats(two)

        def gradient() -> None:
            primitives.divergence_grad(two, table(), derivatives, two.logits)

        return {
            "divergence": ("read", lambda: primitives.divergence_stats(two)),
            SURE: ("read", lambda: primitives.divergence_stats(self.sure)),
            "divergence, gradient": ("update", gradient),
            "divergence, both": (
                "update",
                lambda: primitives.divergence_loss_grad(two, constants, weights, two.logits),
            ),
        }

    def outcome(self, job: Job) -> list[Tensor]:
        """The gradient that a job writes, and the table that it returns."""
        self.restore()
        table = job()
        gradient = self.two.logits.clone()
        return [gradient] if table is None else [gradient, table]


def kernels(name: str, module: ModuleType | None, primitives: Any) -> dict[str, Any]:
    """The primitives of a variant by kernel: those of CUDA have two."""
    if module is None:
        return {name: primitives}

    class By(NativeDivergence):
        def __init__(self, kernel: str) -> None:
            super().__init__(primitives)
            self.kernel = kernel

        def _calls(self, two: DivergenceInputs) -> tuple[Any, Any]:
            module.set_divergence_kernel(self.kernel)
            return super()._calls(two)

    return {f"{name}, {kernel} rows": By(kernel) for kernel in KERNELS}


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.view(kinds[a.itemsize]), b.view(kinds[b.itemsize]))
        for a, b in zip(got, want, strict=True)
    )


def error(pairs: Pairs, what: str, got: list[Tensor]) -> float:
    """Error of an outcome divided by the error that the criterion of accuracy allows,
    for the gradient and for each row of the table; <= 1 passes.
    """
    reference = select.load("reference")
    exact, single = (
        few.outcome(few.jobs(reference)[what][1])
        for few in (pairs.some(torch.float64), pairs.some(torch.float32))
    )
    found = [value_error(got[0][:GATE_ROWS], single[0].to(got[0].dtype), exact[0])]
    for rows in zip(*(x[1:] for x in (got, single, exact)), strict=True):
        found += [value_error(a[:GATE_ROWS], b, c) for a, b, c in zip(*rows, strict=True)]
    return float(torch.tensor(found).max())  # a NaN stays


def time_pairs(
    rows: int,
    vocab: int,
    variants: dict[str, tuple[ModuleType | None, Any]],
    device: str,
    rounds: int,
) -> dict[str, Any]:
    """Time every job of every variant by each of its kernels, and the limits, in random
    orders. "shipped", the released defaults, comes first.
    """
    pairs = Pairs.make(rows, vocab, device)

    def on_meta() -> list[Job]:
        same = ahead.described(pairs)
        of_triton = [primitives for module, primitives in variants.values() if module is None]
        return [job for made in of_triton for _, job in same.jobs(made).values()]

    ahead.compile_ahead(on_meta, device)
    wrong: dict[str, str] = {}
    want: dict[str, list[Tensor]] = {}
    limit_of: dict[str, str] = {}
    timed: dict[str, Callable[[], Any]] = {
        f"limit: {name}": job for name, job in pairs.limits().items()
    }

    def fault(what: str, got: list[Tensor], is_cuda: bool) -> str | None:
        if is_cuda:
            first = want.setdefault(what, got)
            return None if same_bits(got, first) else "the bits differ from released whole rows"
        share = error(pairs, what, got)
        return None if share <= 1 else f"{share:.2f} of the error that is allowed"

    try:
        for name, (module, primitives) in variants.items():
            for kernel, made in kernels(name, module, primitives).items():
                for what, (limit, job) in pairs.jobs(made).items():
                    if what == SURE and module is not None and name != "shipped":
                        continue  # a variant may lose digits there
                    key = f"{kernel}: {what}"
                    try:
                        why = fault(what, pairs.outcome(job), module is not None)
                    except Exception as failed:  # a kernel that fails must not end the run
                        why = f"{type(failed).__name__}: {failed}"
                    if why:
                        wrong[key] = f"{why}: not timed"
                    else:
                        timed[key], limit_of[key] = job, limit
        ms: dict[str, list[float]] = {key: [] for key in timed}
        for number in range(rounds):
            for key in random.Random(number).sample(sorted(timed), len(timed)):
                pairs.restore()
                ms[key].append(clock(device, timed[key])[0])
    finally:
        for module, _ in variants.values():
            if module is not None:
                module.set_divergence_kernel("auto")
    fractions = {
        key: median(ms[f"limit: {limit}"]) / median(ms[key]) for key, limit in limit_of.items()
    }
    return {"rows": rows, "vocab": vocab, "ms": ms, "wrong": wrong, "fractions": fractions}
