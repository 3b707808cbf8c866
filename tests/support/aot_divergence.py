"""Compile the kernel on two logits tensors for GPUs that are not available; see
tests/support/aot.py.

Run it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import aot
import torch

from reweight_ops._core.backends import triton_divergence as divergence
from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams


def call_all(
    dtype: torch.dtype,
    other: torch.dtype,
    vocab: int = 151936,
    softcap: float = float("inf"),
    rows: int = 4,
    temperatures: int = 1,
) -> None:
    """Call every primitive once, on tensors that are described and never read."""
    x, y = torch.empty(rows, vocab, dtype=dtype), torch.empty(rows, vocab, dtype=other)
    t = torch.ones(temperatures)
    two = DivergenceInputs(
        x,
        y,
        torch.zeros(rows, dtype=torch.int64),
        t,
        t.clone(),
        SoftmaxParams(vocab, softcap),
        SoftmaxParams(vocab, softcap),
    )
    table = divergence.divergence_stats(two)
    divergence.divergence_grad(two, table, torch.zeros(3, rows), x)
    divergence.divergence_loss_grad(two, torch.ones(3), torch.ones(rows), x)


def compile_all(target: str, pairs, **more) -> list[dict]:
    result = []
    for dtype, other in pairs:
        with aot.Recorder(target) as recorder:
            call_all(dtype, other, **more)
        for name, kernel in recorder.kernels.values():
            result.append(asdict(aot.inspect(target, name, f"{dtype}+{other}", kernel)))
    return result


def count(target: str = "sm_90") -> int:
    """Count the compilations over calls that differ in rows, vocabulary, soft cap and
    temperatures. The calls have one pair of dtypes.
    """
    with aot.Recorder(target) as recorder:
        for rows, vocab, softcap, temperatures in (
            (4, 32000, 20.0, 1),
            (9, 32768, 30.0, 9),
            (1, 31992, 1.0, 1),
        ):
            call_all(torch.bfloat16, torch.bfloat16, vocab, softcap, rows, temperatures)
    return len(recorder.kernels)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
if __name__ == "__main__":
    task, *targets = sys.argv[1:]
    if task == "count":
        print(json.dumps(count()))
    elif task == "compile":
        print(json.dumps([k for t in targets for k in compile_all(t, [(BF16, BF16), (BF16, F32)])]))
    elif task == "unaligned":
        print(json.dumps([k for t in targets for k in compile_all(t, [(BF16, BF16)], vocab=50257)]))
    else:
        print(json.dumps([k for t in targets for k in compile_all(t, [(F16, F16)], softcap=30.0)]))
