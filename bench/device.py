"""Shapes for a GPU, and the clock of every measurement.

This module needs no extension of the package, so that kernels can be timed before one
is built.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

#: About 2 GiB of bf16 logits each. The most important come first: a run without enough
#: time still has them.
GPU_SHAPES = ((8192, 151936), (8192, 128256), (32768, 32000), (4096, 262144))
#: Bytes written before each run on a GPU: several times the largest L2, which then
#: holds none of the run's data.
FLUSH_BYTES = 256 << 20


def clock(device: str, job: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one run, and milliseconds until the host has issued it.

    The result of the run is freed outside of the measured time. On a GPU nothing waits
    before the start: the data is still being restored, and the host issues the job
    behind it. The first number is therefore the device's alone unless the host is
    slower than both together, which the second number shows.
    """
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        kept = job()
        issued = time.perf_counter() - began
        end.record()
        end.synchronize()
        del kept
        return float(start.elapsed_time(end)), issued * 1e3
    began = time.perf_counter()
    kept = job()
    elapsed = time.perf_counter() - began
    del kept
    return elapsed * 1e3, elapsed * 1e3
