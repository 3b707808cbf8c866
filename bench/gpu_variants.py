"""Compile-time variants of the CUDA kernels (``csrc/cuda/variants.h``), built side by side as modules of their own.

A variant is a name and settings: ``direct=RING_DIRECT=1``, several separated by spaces, no settings for what is shipped. ``bench/triton_shapes.py``
has another kind.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import triton_shapes

ROOT = Path(__file__).resolve().parent.parent

#: What is timed if nothing is named: bench/NOTES.md has a prediction for each.
VARIANTS = {
    "shipped": "",
    "no kept tiles": "RING_KEEP=0",
    "direct": "RING_DIRECT=1",
    "direct, normal": "RING_DIRECT=1 RING_STORED=evict_normal",
    "loads normal": "RING_LOADS=evict_normal",
    "stores normal": "RING_STORED=evict_normal",
    "stores last": "RING_STORED=evict_last",
    "2 stores": "RING_STORES=2",
    "3 stores": "RING_STORES=3",
    "neighbours": "RING_NEIGHBOURS=1",
    "2 rows ahead": "RING_ROWS_AHEAD=2",
    "3 blocks": "STATS_BLOCKS=3 RULE_BLOCKS=2",
    "2 blocks": "STATS_BLOCKS=2 RULE_BLOCKS=2 GRAD_BLOCKS=1",
}
#: Of these files, and for this dtype alone, each variant has objects of its own; the others are built once.
_OWN, _DTYPE = ("ring", "streaming"), "bf16"


def defines(settings: str) -> list[str]:
    """The compilers' flags. Raises for a setting that the sources do not know: it would change nothing and be timed as if it did."""
    known = set(re.findall(r"#ifndef RW_(\w+)", (ROOT / "csrc/cuda/variants.h").read_text()))
    found = []
    for setting in settings.split():
        name, given, value = setting.partition("=")
        if name not in known or not given or not value:
            raise ValueError(f"setting {setting!r}: expected NAME=VALUE with a name of {sorted(known)}")
        found.append(f"-DRW_{name}={value}")
    return found


def parse(texts: list[str]) -> dict[str, str]:
    """From the command line. What is shipped comes first in any case: the others are compared with it."""
    found = {"shipped": ""}
    for text in texts:
        name, _, settings = text.partition("=")
        if triton_shapes.table_of(settings) is None:
            defines(settings)
        if not name or name in found:
            raise ValueError(f"variant {text!r}: a name of its own comes before the first =")
        found[name] = settings
    return found


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(variants: dict[str, str], arch: str, folder: Path) -> dict[str, Path]:
    """The path of each variant's ``_cuda``, for one architecture, by the flags and edges of setup.py."""
    import ninja

    made: Any = _load("reweight_ops_setup", ROOT / "setup.py")
    nvcc = made.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    toolkit, targets = made.toolkit_of(nvcc), [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags = [*made.FLAGS, *made.includes(), f"-I{toolkit / 'include'}", f'-DRW_CUDA_ARCHS="{arch}"']
    edges = {"bindings.o": made.edge("bindings.o", "cxx", "cuda/bindings.cpp", [*flags, made.sources("cuda")])}
    for kernel in made.CUDA_KERNELS:
        for dtype in made.CUDA_DTYPES:
            if kernel not in _OWN or dtype != _DTYPE:
                obj = f"{kernel}_{dtype}.o"
                edges[obj] = made.cuda_edge(obj, kernel, dtype, targets, nvcc)
    shared, links, paths = list(edges), [], {}
    for number, (name, settings) in enumerate(variants.items()):
        own = defines(settings)
        objects = {f"{kernel}_{number}.o": kernel for kernel in _OWN}
        for obj, kernel in objects.items():
            edges[obj] = made.cuda_edge(obj, kernel, _DTYPE, [*targets, *own], nvcc)
        dispatch = f"dispatch_{number}.o"
        edges[dispatch] = made.edge(dispatch, "cxx", "cuda/dispatch.cpp", [*flags, *own])
        paths[name] = folder / str(number) / "_cuda.so"
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        links.append(f"build {made.ninja_path(paths[name])}: link {' '.join([*shared, *objects, dispatch])}\n")
    words = made.ninja_quote(made.cuda_libraries(toolkit))
    link = f"rule link\n  command = {made.ninja_quote(made.cxx())} -shared $in {words} -o $out\n  description = LINK $out\n"
    # The slowest files first: the last one to begin decides when the build ends.
    ordered = sorted(edges, key=lambda obj: not obj.startswith(_OWN))
    (folder / "build.ninja").write_text("".join([made.RULES, link, *(edges[obj] for obj in ordered), *links]))
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(folder), "--quiet"], check=True, stdout=sys.stderr)
    return paths


def load(path: Path) -> ModuleType:
    """Several in one process: each is a module of its own file."""
    return _load("_cuda", path)
