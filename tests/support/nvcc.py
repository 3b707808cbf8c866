"""Compiles csrc/cuda as setup.py does, to test the compiler's output. It
needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

SETUP = runpy.run_path(str(ROOT / "setup.py"))
KERNELS, DTYPES, FLAGS = SETUP["CUDA_KERNELS"], SETUP["CUDA_DTYPES"], SETUP["NVCC_FLAGS"]


def nvcc() -> Path:
    found = SETUP["find_nvcc"]()
    if found is None:
        pytest.skip("needs nvcc")
    return found


def archs() -> list[str]:
    """The targets of setup.py by default."""
    return SETUP["cuda_archs"](nvcc())


def compile_kernels(
    csrc: Path, kernel: str, dtype: str, archs: list[str], target: Path, flags: list[str] = FLAGS
) -> str:
    """Write a fatbin of one file of kernels for one dtype; return the compiler's other
    output; raise if it fails.
    """
    defines = [f"-DRW_ELEMENT={DTYPES[dtype]}", f"-DRW_DTYPE={dtype}"]
    words = [
        nvcc(),
        *flags,
        *SETUP["cuda_targets"](archs),
        f"-I{csrc}",
        *defines,
        "-fatbin",
        csrc / f"cuda/{kernel}.cu",
        "-o",
        target,
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kernel}.cu for {dtype} and {archs} does not compile:\n{done.stderr}")
    return done.stderr


def sass(fatbin: Path, arch: str) -> str:
    """The machine code for one target."""
    dump = dumper()
    if dump is None:
        pytest.skip("needs cuobjdump")
    environment = {**os.environ, "PATH": f"{Path(dump).parent}:{os.environ['PATH']}"}
    words = [dump, "-arch", f"sm_{arch}", "-sass", str(fatbin)]
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout


def dumper() -> str | None:
    """The dumper on the PATH, or the one that Triton ships."""
    found, spec = shutil.which("cuobjdump"), importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(shipped) if shipped.exists() else None
    return found
