"""Peak memory of PyTorch's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch


def most_alive(call: Callable[[], object]) -> int:
    """Peak of the bytes alive while ``call`` runs, above the start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
