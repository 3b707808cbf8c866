"""A GPU's shapes, and the clock for whatever is timed. Needs no extension of the package, so that kernels can be timed before one is built."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

#: About 2 GiB of bf16 logits each. First what matters most: a run that is out of time has it.
GPU_SHAPES = ((8192, 151936), (8192, 128256), (32768, 32000), (4096, 262144))
#: Bytes written before each run on a GPU: several times the largest L2, so that a run finds none of its data there.
FLUSH_BYTES = 256 << 20


def clock(device: str, job: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one run, and those until the host has issued it; what it returns is freed outside.

    On a GPU nothing waits before the start: the restoring of the data is still running, and the host issues the job behind it. So the
    first figure is the device's alone unless the host is slower than both together, and then the second one shows it.
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
