"""Compiles csrc/cuda with the emulator into a Python module, once for each text of its
sources and flags.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
DTYPES = {"f32": "float", "bf16": "Bf16", "f16": "F16"}
#: Contraction is off as for nvcc (-fmad=false). The fortified longjmp would treat a
#: switch of stacks as an attack.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-DRW_EMULATION",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


#: The status of kernels of a dtype that is left out. The choice between kernels asks
#: them for clusters, and gets the number that the emulated device runs.
NOT_BUILT = -1
LEFT_OUT = """
#include "dispatch.h"
#include "divergence.h"
#include "platform.h"
#include "scale.h"
namespace reweight_ops {{
const StreamingKernels streaming_{0} = {{[](const StatsCall&) {{ return {1}; }}, [](const TopStatsCall&) {{ return {1}; }}, [](const GradCall&) {{ return {1}; }}, [](const LossGradCall&) {{ return {1}; }}}};
const RingKernels ring_{0} = {{[](const LossGradCall&, int, int& count) {{ return count = emulation::clusters(), 0; }}, [](const LossGradCall&, int, int64_t) {{ return {1}; }}}};
const DivergenceKernels divergence_{0} = {{[](const DivergenceCall&) {{ return {1}; }}, [](const DivergenceCall&, int& count) {{ return count = emulation::clusters(), 0; }}, [](const DivergenceCall&) {{ return {1}; }}}};
const ScaleLaunch scale_{0} = [](const ScaleCall&) {{ return {1}; }};
}}
"""


def build(
    csrc: Path = ROOT / "csrc",
    flags: tuple[str, ...] = ("-O1",),
    folder: Path = ROOT / "build" / "cuda_emulation",
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Path:
    """Return the path of ``_cuda_emulated``.

    Objects are cached by the hash of their inputs, so that a changed kernel does not
    recompile the bindings.
    """
    import pybind11

    includes = [
        f"-I{csrc}",
        f"-I{csrc / 'cuda'}",
        f"-I{HERE}",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    headers = [
        *sorted(csrc.glob("common/*")),
        *sorted(csrc.glob("cuda/*.h")),
        *sorted(HERE.glob("*.h")),
    ]
    host = [
        *sorted(csrc.glob("common/*")),
        *(
            csrc / "cuda" / name
            for name in (
                "dispatch.h",
                "divergence.h",
                "scale.h",
                "device.h",
                "platform.h",
                "slices.h",
                "variants.h",
            )
        ),
        *sorted(HERE.glob("*.h")),
    ]
    units: dict[str, tuple[Path, list[str], list[Path]]] = {
        # These use the kernels' arguments and a table, not their code.
        "bindings": (csrc / "cuda/bindings.cpp", ["-O0"], [csrc / "bindings.h", *host]),
        "dispatch": (csrc / "cuda/dispatch.cpp", ["-O1"], host),
        "emulator": (HERE / "emulator.cpp", ["-O2"], [*host, csrc / "cuda/asynchronous.h"]),
        "asynchronous": (HERE / "asynchronous.cpp", ["-O2"], [*host, csrc / "cuda/asynchronous.h"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, element in DTYPES.items():
        if name not in dtypes:
            source = folder / f"left_out_{name}.cpp"
            source.write_text(LEFT_OUT.format(name, NOT_BUILT))
            units[source.stem] = source, ["-O0"], host
            continue
        words = ["-x", "c++", f"-DRW_ELEMENT={element}", f"-DRW_DTYPE={name}"]
        units[f"streaming_{name}"] = (
            csrc / "cuda/streaming.cu",
            words,
            [h for h in headers if h.name not in ("ring.h", "asynchronous.h")],
        )
        units[f"divergence_{name}"] = (
            csrc / "cuda/divergence.cu",
            words,
            [h for h in headers if h.name != "ring.h"],
        )
        units[f"scale_{name}"] = csrc / "cuda/scale.cu", words, [*host, csrc / "cuda/elements.h"]
        units[f"ring_{name}"] = csrc / "cuda/ring.cu", words, headers

    def compile_one(name: str) -> Path:
        source, own, reads = units[name]
        words = [*FLAGS, *flags, *own]
        digest = hashlib.sha256(" ".join([compiler() or "", sys.version, *words]).encode())
        for path in (source, *reads):
            digest.update(path.read_bytes())
        target = folder / f"{name}-{digest.hexdigest()[:20]}.o"
        if not target.exists():
            run([*words, *includes, "-c", str(source)], target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, units))
    digest = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = folder / digest / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        run(
            ["-shared", *(f for f in flags if f.startswith("-fsanitize")), *map(str, objects)],
            target,
        )
    return target


def run(words: list[str], target: Path) -> None:
    """Compile to a separate file first: several processes may build at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        made = Path(own) / target.name
        subprocess.run([*(compiler() or "g++").split(), *words, "-o", str(made)], check=True)
        made.replace(target)


def load(path: Path) -> ModuleType:
    """Load a module under a name of its own: from a second file of a known name,
    pybind11 returns the first one's module.
    """
    own = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(f"of_{own}._cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
