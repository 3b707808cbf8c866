"""A pytest plugin: the tests of this folder without a GPU, in their own shapes
(``make gpu-rehearsal``).

Every launch of Triton compiles for a GPU and computes nothing. What a test compares is
therefore wrong, and its failed assertions say nothing. Any other error is one that a
GPU would show too: the test's own, or that of a kernel that does not compile. The
report ends with the compilations, whose seconds a GPU's run spends as well.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter

import aot
import torch

from reweight_ops._core.backends import triton, triton_launch

#: The GPU that the tests were written on.
TARGET, PROCESSORS = "sm_90", 132


class _Timed(aot.Recorder):
    """Keeps the seconds of each compilation, by kernel and by test."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.test = ""
        self.seconds: dict[str, Counter[str]] = {"kernel": Counter(), "test": Counter()}
        self.count: dict[str, Counter[str]] = {"kernel": Counter(), "test": Counter()}

    def launch(self, kernel, grid, *args, shape, wave=32, **meta):
        known, began = len(self.kernels), time.perf_counter()
        super().launch(kernel, grid, *args, shape=shape, wave=wave, **meta)
        if len(self.kernels) > known:
            took = time.perf_counter() - began
            for what, name in (("kernel", kernel.fn.__name__), ("test", self.test)):
                self.count[what][name] += 1
                self.seconds[what][name] += took


_recorder = _Timed()
_errors: dict[str, str] = {}


def _without_garbage(allocate):
    """What a kernel would have written is 0, and so a valid id, and not what memory
    held before.
    """

    def allocated(*args, **more):
        t = allocate(*args, **more)
        return t if t.is_meta or type(t) is not torch.Tensor else t.zero_()

    return allocated


def pytest_sessionstart() -> None:
    # the tests' conftest asks for the interpreter where there is no GPU
    os.environ.pop("TRITON_INTERPRET", None)
    triton.BACKEND = dataclasses.replace(triton.BACKEND, unsupported_reason=lambda request: None)
    triton_launch.processors = lambda device: PROCESSORS
    for home, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(home, name, _without_garbage(getattr(home, name)))
    _recorder.__enter__()


def pytest_runtest_setup(item) -> None:
    _recorder.test = f"{item.path.name}::{item.originalname}"


def pytest_exception_interact(node, call) -> None:
    if not isinstance(call.excinfo.value, AssertionError):
        _errors[node.nodeid] = repr(call.excinfo.value)[:300]


def pytest_sessionfinish(session) -> None:
    session.exitstatus = bool(_errors)


def pytest_terminal_summary(terminalreporter) -> None:
    say = terminalreporter.write_line
    for what, seconds in _recorder.seconds.items():
        count = _recorder.count[what]
        say(f"\n{count.total()} compilations for {TARGET}, {seconds.total():.0f} s, by {what}")
        for name, took in seconds.most_common():
            say(f"{name:70s} {count[name]:5d} {took:8.1f} s")
    say(f"\n{len(_errors)} errors other than wrong numbers")
    for test, error in _errors.items():
        say(f"{test}: {error}")
