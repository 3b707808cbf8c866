"""Triton's kernels compiled ahead of their timing, many at a time.

One after the other they take seconds each, of the minutes for which a GPU is lent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from reweight_ops._core.backends import select

T = TypeVar("T")


def described(table: T) -> T:
    """The dataclass with all its tensors on ``meta``: jobs on them compute nothing."""
    found = [getattr(table, field.name) for field in fields(table)]  # type: ignore[arg-type]
    return type(table)(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), found))


def compile_ahead(jobs: Callable[[], Iterable[Callable[[], Any]]], device: str) -> None:
    """Compile for ``device`` what the jobs on meta tensors launch. ``jobs`` may launch
    too, while it makes them.

    An error is left to the job itself, which is run later.
    """
    with contextlib.suppress(Exception):
        select.load("triton")
        with _compiling(torch.device(device)) as compiles:
            for job in jobs() if compiles else ():
                with contextlib.suppress(Exception):
                    job()


@contextlib.contextmanager
def _compiling(device: torch.device) -> Iterator[bool]:
    """Launches compile, and launch nothing. Yields whether there is a compiler: the
    interpreter has none.
    """
    from reweight_ops._core.backends import triton_launch

    if triton_launch.interpreted():
        yield False
        return
    from triton import AsyncCompileMode

    options, before = triton_launch.options, dict(vars(triton_launch))
    wave, processors = triton_launch.wave(device), triton_launch.processors(device)

    def launch(kernel: Any, grid: int, *args: Any, shape: Any, wave: int = 32, **meta: Any) -> None:
        launched = options(shape, wave, torch.version.hip is not None)
        kernel.warmup(*args, grid=(grid,), **meta, **launched)

    instead = {"launch": launch, "wave": lambda _: wave, "processors": lambda _: processors}
    vars(triton_launch).update(instead)
    try:
        workers = max(1, (os.cpu_count() or 2) - 2)
        with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield True
    finally:
        vars(triton_launch).update({name: before[name] for name in instead})
