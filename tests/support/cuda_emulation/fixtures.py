"""The three primitives on CPU tensors by the emulated CUDA kernels, for the tests of
the CUDA backend.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reweight_ops._core.backends.native import Native

from .build import NOT_BUILT, build, compiler, load

SCHEDULES = ("eager", "late", "random", "skew")


def emulated() -> tuple[object, Native]:
    """The module and its primitives.

    ``REWEIGHT_OPS_EMULATED`` names another build, of kernels with a planted bug or with
    sanitizers.
    """
    pytest.importorskip("pybind11")
    named = os.environ.get("REWEIGHT_OPS_EMULATED")
    if named is None and compiler() is None:
        pytest.skip("no C++ compiler to build the emulated kernels")
    module = load(Path(named) if named else build())

    def check(status: int) -> None:
        if status == NOT_BUILT:
            pytest.skip("this build lacks the dtype")
        assert status == 0, f"status {status}: {module.last_error()}"

    return module, Native(module, "cpu", lambda device: {}, check)
