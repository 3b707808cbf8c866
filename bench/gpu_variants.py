"""Compile-time variants of the CUDA kernels (``csrc/cuda/variants.h``), built as
separate modules.

A variant is a name and settings, for example ``direct=RING_DIRECT=1``. Spaces separate
several settings; a variant without settings has the released defaults.
``bench/triton_shapes.py`` and ``bench/gpu_rows.py`` have other kinds of variants.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import gpu_rows, triton_shapes

ROOT = Path(__file__).resolve().parent.parent

#: The variants that `--all` times. bench/NOTES.md has a prediction for each.
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
    "3 blocks": "STATS_BLOCKS=3 RULE_BLOCKS=2 TOP_BLOCKS=2",
    "2 blocks": "STATS_BLOCKS=2 RULE_BLOCKS=2 GRAD_BLOCKS=1",
    "no second sum": "DIVERGENCE_SURE=0",
}
#: Those that a minute has time for: the best predictions, and two tensors.
FIRST = ("shipped", "direct, normal", "2 rows ahead", "no second sum")
#: Variants are compiled for this dtype only.
_DTYPE = "bf16"


def files(settings: str) -> tuple[str, ...]:
    """The files of kernels that the settings change. The others are compiled once."""
    of_two = {setting.startswith("DIVERGENCE_") for setting in settings.split()}
    one, two = ("ring", "streaming") * (False in of_two), ("divergence",) * (True in of_two)
    return (*one, *two)


def defines(settings: str) -> list[str]:
    """Compiler flags of the settings.

    Raises for a setting that the sources do not have: it would change nothing, and
    would be timed as if it did.
    """
    known = set(re.findall(r"#ifndef RW_(\w+)", (ROOT / "csrc/cuda/variants.h").read_text()))
    found = []
    for setting in settings.split():
        name, given, value = setting.partition("=")
        if name not in known or not given or not value:
            raise ValueError(
                f"setting {setting!r}: expected NAME=VALUE with a name of {sorted(known)}"
            )
        found.append(f"-DRW_{name}={value}")
    return found


def parse(texts: list[str]) -> dict[str, str]:
    """Parse variants of the command line.

    The released defaults always come first: the others are compared with them.
    """
    found = {"shipped": ""}
    for text in texts:
        name, _, settings = text.partition("=")
        if all(kind.table_of(settings) is None for kind in (triton_shapes, gpu_rows)):
            defines(settings)
        if not name or name in found:
            raise ValueError(f"variant {text!r}: expected a unique name before the first =")
        found[name] = settings
    return found


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(variants: dict[str, str], arch: str, folder: Path) -> dict[str, Path]:
    """Build ``_cuda`` of each variant for one architecture with the flags and edges of
    setup.py; return paths.
    """
    import ninja

    made: Any = _load("reweight_ops_setup", ROOT / "setup.py")
    nvcc = made.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    toolkit, targets = made.toolkit_of(nvcc), [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags = [*made.FLAGS, *made.includes(), f"-I{toolkit / 'include'}", f'-DRW_CUDA_ARCHS="{arch}"']
    edges = {
        "bindings.o": made.edge(
            "bindings.o", "cxx", "cuda/bindings.cpp", [*flags, made.sources("cuda")]
        )
    }
    shared = {
        (kernel, dtype): f"{kernel}_{dtype}.o"
        for kernel in made.CUDA_KERNELS
        for dtype in made.CUDA_DTYPES
    }
    for (kernel, dtype), obj in shared.items():
        edges[obj] = made.cuda_edge(obj, kernel, dtype, targets, nvcc)
    links, paths = [], {}
    for number, (name, settings) in enumerate(variants.items()):
        own = defines(settings)
        objects = shared | {(kernel, _DTYPE): f"{kernel}_{number}.o" for kernel in files(settings)}
        for (kernel, dtype), obj in objects.items() - shared.items():
            edges[obj] = made.cuda_edge(obj, kernel, dtype, [*targets, *own], nvcc)
        dispatch = f"dispatch_{number}.o"
        edges[dispatch] = made.edge(dispatch, "cxx", "cuda/dispatch.cpp", [*flags, *own])
        paths[name] = folder / str(number) / "_cuda.so"
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        links.append(
            f"build {made.ninja_path(paths[name])}: link "
            f"{' '.join(['bindings.o', *objects.values(), dispatch])}\n"
        )
    words = made.ninja_quote(made.cuda_libraries(toolkit))
    link = (
        f"rule link\n  command = {made.ninja_quote(made.cxx())} -shared $in {words} -o "
        "$out\n  description = LINK $out\n"
    )
    # Put the slowest files first: the file that starts last determines when the build
    # ends.
    slowest = ("streaming", "divergence")
    ordered = sorted(edges, key=lambda obj: not obj.startswith(slowest))
    (folder / "build.ninja").write_text(
        "".join([made.RULES, link, *(edges[obj] for obj in ordered), *links])
    )
    subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-C", str(folder), "--quiet"], check=True, stdout=sys.stderr
    )
    return paths


def load(path: Path) -> ModuleType:
    """Load a variant. Several can be loaded in one process, each under a name of its
    own: from a second file of a known name, pybind11 returns the first one's module.
    """
    return _load(f"{path.parent}._cuda", path)
