"""The number of threads of a call of the CPU kernels.

It is PyTorch's number, except in the child of a process that had threads, where it is
one. OpenMP's worker threads do not survive a fork, and a parallel region of the child
would wait for them forever. PyTorch's own operations do wait; its data loaders set one
thread for that reason. A child of a process that had no threads yet starts its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_TASKS = Path("/proc/self/task")
_had_threads = False
_lost = False


def threads() -> int:
    """Return the number of threads to pass to the module."""
    return 1 if _lost else torch.get_num_threads()


def _before_fork() -> None:
    global _had_threads
    try:
        _had_threads = sum(1 for _ in _TASKS.iterdir()) > 1
    except OSError:  # not Linux
        _had_threads = True


def _in_child() -> None:
    global _lost
    _lost = _lost or _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
