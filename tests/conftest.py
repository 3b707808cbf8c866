"""Before anything imports Triton: without a GPU its kernels run in the interpreter.
Compilation tests start a process of their own.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What these hold fails like a test: with the values in it.
pytest.register_assert_rewrite("contract", "criterion")

# The trainer tests build their own tiny models and must not look for others.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Parallel test workers of one thread each: more threads than cores stall each other at
# every OpenMP barrier.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def registry():
    """The rules and weights that a test defines are gone after it."""
    from reweight_ops._core.formula.base import RULES, WEIGHTS

    saved = dict(RULES), dict(WEIGHTS)
    yield
    for table, before in zip((RULES, WEIGHTS), saved, strict=True):
        table.clear()
        table.update(before)
