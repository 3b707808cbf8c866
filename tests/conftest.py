"""Before anything imports Triton: without a GPU its kernels run in the interpreter. Compilation tests start a process of their own."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The trainer tests build their own tiny models and must not look for others.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Parallel test workers of one thread each: more threads than cores stall each other at every OpenMP barrier.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
