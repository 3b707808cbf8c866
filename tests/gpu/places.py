"""The device of this folder's tests, and the operations that differ between a GPU and a
dry run on the CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops.testing import make_batch

_WISH = os.environ.get("REWEIGHT_OPS_GPU_TESTS", "")
#: A GPU's shapes without a GPU, and kernels that compute nothing: rehearsal.py.
REHEARSED = _WISH == "rehearsal" and not torch.cuda.is_available()
_DRY_BACKENDS = ["triton"] if REHEARSED else [b for b in _WISH.split(",") if b]
DRY = bool(_DRY_BACKENDS) and not torch.cuda.is_available()


class Place(NamedTuple):
    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def unsupported_reason(self) -> str | None:
        return unsupported_reason(
            self.backend, Request("token_stats", torch.device(self.device), torch.float32)
        )


PLACES = (
    [Place("cpu", b) for b in _DRY_BACKENDS]
    if DRY
    else [Place("cuda", "cuda"), Place("cuda", "triton")]
)


def sized(here: Any, dry: Any) -> Any:
    """What a GPU takes, and what a dry run takes instead."""
    return dry if DRY and not REHEARSED else here


def two_devices() -> list[str]:
    """Two of them, of which the second is not the current one; skips where there is one
    GPU. In a dry run, the CPU twice.
    """
    if DRY:
        return ["cpu", "cpu"]
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return ["cuda:0", "cuda:1"]


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """``(replay, outputs)`` of a CUDA graph of ``run``. In a dry run, ``run`` itself,
    whose outputs are overwritten as a graph's are.
    """
    if DRY:
        held = run()

        def again() -> None:
            for old, new in zip(held, run(), strict=True):
                old.copy_(new)

        return again, held
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and allocates what libraries allocate once
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    return graph.replay, held


def other_stream() -> Any:
    return contextlib.nullcontext() if DRY else torch.cuda.stream(torch.cuda.Stream())


def keep_busy(milliseconds: float) -> Any:
    """Keep the current stream busy for that long; return an event after it."""
    if DRY:
        return None
    cycles = int(milliseconds * 2e6)  # of a clock of at most about 2 GHz
    torch.cuda._sleep(cycles)
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def no_synchronization() -> Any:
    """Raise if anything makes the host wait for the GPU. In a dry run nothing can."""
    if DRY:
        yield
        return
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Peak bytes of ``run`` beyond the existing ones; None in a dry run."""
    run()  # what is allocated once and for all
    if DRY:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return int(peak)


@contextlib.contextmanager
def compilations() -> Any:
    """A list that grows by a name each time that Triton compiles a kernel, or loads it.
    In a dry run, where nothing is compiled, it stays empty.
    """
    from triton import knobs

    names: list[str] = []
    before = knobs.compilation.listener

    # Not a hook of the runtime: Triton 3.6 fails to describe a kernel that takes a
    # function to it.
    def heard(*, src: Any, **_: Any) -> None:
        names.append(src.name)

    knobs.compilation.listener = heard
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def batch_on(
    place: Place,
    spec: Any,
    shape: tuple[int, ...] = sized((4, 16), (2, 6)),
    vocab: int = 1031,
    dtype: torch.dtype = torch.bfloat16,
    **more: Any,
):
    """:func:`make_batch` there, with logits that are a tensor of their own."""
    batch = make_batch(spec, shape, sized(vocab, min(vocab, 131)), dtype, place.device, **more)
    batch["logits"] = batch["logits"].detach().clone()
    return batch


def as_leaf(z: Tensor) -> Tensor:
    return z.detach().clone().requires_grad_()
