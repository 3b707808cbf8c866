"""Compile what the Triton backend would launch, for GPUs that are not here. Run in a process without TRITON_INTERPRET.

A pretended driver names the target; the backend's own launch is replaced by Triton's ``warmup``, which specializes on the very arguments
(dtypes, alignments, constants) and compiles, but launches nothing. So what is measured is what a GPU would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

assert os.environ.get("TRITON_INTERPRET") != "1", "this module compiles: start it without TRITON_INTERPRET"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from reweight_ops.backends import triton as backend
from reweight_ops.backends.base import COEFS, Head, Program, RowInputs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32), "gfx90a": GPUTarget("hip", "gfx90a", 64), "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}  # fmt: skip


class PretendedDriver:
    """Enough of a driver for ``warmup``. Each target is a device of its own, so compilations are kept apart."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


@dataclass
class Compiled:
    """One kernel as compiled: registers, bytes of stack (NVIDIA) or scratch (AMD), and its 16-byte loads and stores."""

    target: str
    kernel: str
    dtype: str
    registers: int
    spilled: int
    wide_loads: int
    wide_stores: int
    shared: int

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} {self.dtype}: {self.registers} registers, {self.spilled} B spilled, {self.wide_loads} wide loads, {self.wide_stores} wide stores, {self.shared} B shared"


def inspect(target: str, name: str, dtype: str, kernel) -> Compiled:
    if TARGETS[target].backend == "hip":
        text = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

        spilled = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count") + 4 * number("sgpr_spill_count")
        loads, stores = (len(re.findall(rf"(?:global|buffer)_{kind}_(?:dwordx4|b128)", text)) for kind in ("load", "store"))
        return Compiled(target, name, dtype, number("vgpr_count"), spilled, loads, stores, kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        out = subprocess.run([str(tool) if tool.exists() else "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout).groups()  # LOCAL stays 0 when registers spill: STACK tells
    ptx = kernel.asm["ptx"]
    loads, stores = (len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st"))
    return Compiled(target, name, dtype, int(registers), int(stack), loads, stores, kernel.metadata.shared)


class Recorder:
    """Stands in for ``backend._launch``: compiles for ``target`` and keeps what came out, once for each specialization."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.kernels: dict[int, tuple[str, object]] = {}

    def __enter__(self):
        driver.set_active(PretendedDriver(self.target))
        self._launch, self._wave = backend._launch, backend._wave
        backend._launch, backend._wave = self.launch, lambda device: TARGETS[self.target].warp_size
        return self

    def __exit__(self, *error):
        backend._launch, backend._wave = self._launch, self._wave

    def launch(self, kernel, programs, *args, warps, **meta):
        compiled = kernel.warmup(*args, grid=(programs,), **meta, num_warps=warps, enable_fp_fusion=False)
        self.kernels[id(compiled)] = (kernel.fn.__name__, compiled)


PROGRAM = Program(("clip", "k3", "entropy_bonus"), (("advantage_reweighting", "surrogate"),))
PARAMS = torch.zeros(16)


def call_all(dtype: torch.dtype, vocab: int, rows: int = 4, softcap: float = float("inf"), program: Program = PROGRAM) -> None:
    """Every verb once, on tensors that are described and never read."""
    logits = torch.empty(rows, vocab, dtype=dtype)
    ids, temperature, head = torch.zeros(rows, dtype=torch.int64), torch.ones(1), Head(vocab, softcap)
    backend.token_stats(logits, ids, temperature, head, ("logp", "entropy", "lse"))
    stats = {name: torch.zeros(rows) for name in ("logp", "lse", "entropy", "log_sum_p_sq")}
    backend.token_grad(logits, ids, temperature, head, stats, {name: stats["logp"] for name in COEFS}, logits)
    inputs = RowInputs(torch.ones(len(program.terms), rows), *(stats["logp"] for _ in range(4)))
    backend.token_loss_grad(logits, ids, temperature, head, inputs, program, PARAMS, logits)


def compile_all(target: str, dtypes=(torch.bfloat16, torch.float16, torch.float32), vocab: int = 151936, **more) -> list[Compiled]:
    result = []
    for dtype in dtypes:
        with Recorder(target) as recorder:
            call_all(dtype, vocab, **more)
        result += [inspect(target, name, str(dtype)[6:], kernel) for name, kernel in recorder.kernels.values()]
    return result


if __name__ == "__main__":
    for target in sys.argv[1:] or TARGETS:
        for compiled in compile_all(target):
            print(compiled, flush=True)
