"""Builds the extensions ``reweight_ops._C`` and, with nvcc, ``reweight_ops._cuda``.

Neither links PyTorch. ninja compiles both. All metadata is in pyproject.toml.

``REWEIGHT_OPS_BUILD`` says what to build: ``cpu``, ``cuda`` (C++ and CUDA), ``none`` or
``auto``. ``auto``, the default, builds C++, and CUDA if PyTorch is built for CUDA, and
is never an error. Otherwise a part that cannot be built is an error. A file beside the
package says which part was not built, and why.

``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are honoured. nvcc is looked for in ``CUDA_HOME``,
``PATH`` and ``/usr/local/cuda``. Kernels are compiled for the GPUs of this machine, and
without a GPU for all from Ampere on. ``REWEIGHT_OPS_CUDA_ARCHS`` (``80;90``, or
``all``) replaces that choice.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
# csrc/cpu/kernels.cpp and divergence.cpp are compiled once per level. At run time
# dispatch.cpp picks the best level that the processor has.
X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v4_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
# Kernels of csrc/cuda are compiled once per dtype. No contraction: kernels that share a
# sweep must round alike. A spill is an error.
CUDA_DTYPES = {"f32": "float", "bf16": "Bf16", "f16": "F16"}
CUDA_KERNELS = ("streaming", "ring", "divergence", "scale")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]
BENCH, IN_A_CHECKOUT = (
    "reweight_ops.bench",
    (
        *("gpu", "gpu_divergence", "gpu_kernels", "gpu_rows", "gpu_search", "gpu_variants"),
        *("page", "scaling", "test_bench", "triton_shapes"),
    ),
)
# GCC 12 warns about its own AVX-512 header, and about the ABI of vectors that never
# leave their file.
NO_FALSE_ALARM = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]


class NinjaBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("REWEIGHT_OPS_BUILD", "auto")
        if wanted not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"REWEIGHT_OPS_BUILD is {wanted!r}, expected auto, cpu, cuda or none.")
        say(f"REWEIGHT_OPS_BUILD is {wanted} (of auto, cpu, cuda, none).")
        missing: dict[str, str] = {}
        for name, module, part in (("C++", "_C", self.cpu_part), ("CUDA", "_cuda", self.cuda_part)):
            try:
                if why := why_left_out(module, wanted):
                    raise LeftOut(why)
                self.build(*part())
            except (OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as error:
                if wanted != "auto" and not isinstance(error, LeftOut):
                    raise
                missing[module] = str(error)
                say(f"installing without {name} kernels, because: {error}.")
        shared("built")["remember"](
            Path(self.get_ext_fullpath("reweight_ops._C")).absolute().parent, missing
        )

    def cpu_part(self) -> tuple[str, str]:
        """Return the module's name and its build edges."""
        openmp = (
            []
            if subprocess.run(
                [*cxx(), "-fopenmp", "-E", "-xc++", os.devnull], capture_output=True
            ).returncode
            else ["-fopenmp"]
        )
        levels = (
            X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
        )
        flags = [*FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        names = ",".join(levels)
        defines = [
            f'-DRW_VERSION="{self.distribution.get_version()}"',
            f'-DRW_FLAGS="{" ".join(flags)}"',
            f'-DRW_LEVEL_NAMES="{names}"',
        ]
        defines += [f"-DRW_HAS_{name.upper()}" for name in levels]
        objects = {
            "bindings.o": edge(
                "bindings.o", "cxx", "bindings.cpp", [*flags, *includes(), *defines, sources("cpu")]
            )
        }
        objects["dispatch.o"] = edge(
            "dispatch.o", "cxx", "cpu/dispatch.cpp", [*flags, *includes(), *defines]
        )
        objects["evaluate_rows.o"] = edge(
            "evaluate_rows.o", "cxx", "cpu/evaluate_rows.cpp", [*flags, *includes()]
        )
        objects["rows.o"] = edge("rows.o", "cxx", "cpu/rows.cpp", [*flags, *includes()])
        for name, march in levels.items():
            obj = f"kernels_{name}.o"
            objects[obj] = edge(
                obj,
                "cxx",
                "cpu/kernels.cpp",
                [*flags, *includes(), *march, f"-DRW_LEVEL={name}", *NO_FALSE_ALARM],
            )
            obj = f"divergence_{name}.o"
            objects[obj] = edge(
                obj,
                "cxx",
                "cpu/divergence.cpp",
                [*flags, *includes(), *march, f"-DRW_LEVEL={name}", *NO_FALSE_ALARM],
            )
        return self.link("reweight_ops._C", objects, openmp)

    def cuda_part(self) -> tuple[str, str]:
        """Return the name and the build edges of the CUDA module."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
        archs = cuda_archs(nvcc)
        say(
            f"CUDA kernels with {nvcc}, for compute capability {', '.join(archs)} "
            "(REWEIGHT_OPS_CUDA_ARCHS: others, as 80;90, or all)."
        )
        targets = cuda_targets(archs)
        toolkit = toolkit_of(nvcc)
        flags = [
            *FLAGS,
            *shlex.split(os.environ.get("CXXFLAGS", "")),
            *includes(),
            f"-I{toolkit / 'include'}",
            f'-DRW_CUDA_ARCHS="{";".join(archs)}"',
        ]
        objects = {
            "cuda_bindings.o": edge(
                "cuda_bindings.o", "cxx", "cuda/bindings.cpp", [*flags, sources("cuda")]
            )
        }
        objects["cuda_dispatch.o"] = edge("cuda_dispatch.o", "cxx", "cuda/dispatch.cpp", flags)
        for name in CUDA_DTYPES:
            for kernel in CUDA_KERNELS:
                obj = f"{kernel}_{name}.o"
                objects[obj] = cuda_edge(obj, kernel, name, targets, nvcc)
        return self.link("reweight_ops._cuda", objects, cuda_libraries(toolkit))

    def link(self, module: str, objects: dict[str, str], words: list[str]) -> tuple[str, str]:
        target = Path(self.get_ext_fullpath(module)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        words = [*words, *shlex.split(os.environ.get("LDFLAGS", ""))]
        command = f"{shlex.join(cxx())} -shared $in {ninja_quote(words)} -o $out"
        rule = f"rule link\n  command = {command}\n  description = LINK $out\n"
        return "".join(
            [rule, *objects.values(), f"build {ninja_path(target)}: link {' '.join(objects)}\n"]
        ), module

    def build(self, edges: str, module: str) -> None:
        import ninja

        folder = Path(self.build_temp).absolute() / module
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(RULES + edges)
        said = []
        with subprocess.Popen(
            [Path(ninja.BIN_DIR) / "ninja", "-C", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                said.append(line.strip())
        if process.returncode:
            raise RuntimeError(
                next(
                    (line for line in said if re.search(r"\b(error|fatal)\b", line, re.I)), said[-1]
                )[:300]
            )


class Modules(build_py):
    """Finds the package's modules, without those of bench/ that only work in a
    checkout.
    """

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if package != BENCH or module[1] not in IN_A_CHECKOUT]


class LeftOut(RuntimeError):
    """This build was asked to leave a part out."""


def say(text: str) -> None:
    print(f"reweight_ops: {text}", flush=True)


def shared(name: str) -> dict[str, Any]:
    """Run a file that the package and its build share, and return its names.

    Importing the package would import torch.
    """
    return runpy.run_path(str(ROOT / f"reweight_ops/_core/backends/{name}.py"))


def why_left_out(module: str, wanted: str) -> str | None:
    """Return why a module is not built, or None if it is."""
    if wanted == "none" or (wanted == "cpu" and module == "_cuda"):
        return f"REWEIGHT_OPS_BUILD was {wanted}"
    if wanted != "auto" or module != "_cuda":
        return None
    torch = installed_torch()
    if torch is None:
        return (
            "no PyTorch was found where it is installed, and these are for a PyTorch that is "
            "built for CUDA"
        )
    return None if torch["cuda"] else f"PyTorch {torch['version']} is not built for CUDA"


_ASK = """
import importlib.util, json, pathlib, runpy
found = importlib.util.find_spec("torch")
if found is not None and found.origin:
    said = runpy.run_path(str(pathlib.Path(found.origin).with_name("version.py")))
    print(json.dumps({"version": said["__version__"], "cuda": said.get("cuda")}))
"""


def installed_torch() -> dict[str, Any] | None:
    """Return ``version`` and ``cuda`` (None: not built for CUDA) of the PyTorch in the
    environment that the package is installed into, without importing it.

    pip builds in an environment of its own, but runs the interpreter that it installs
    for. Without ``PYTHON*`` variables that interpreter sees the packages installed
    there.
    """
    for flags in ([], ["-E"]):
        done = subprocess.run(
            [sys.executable, *flags, "-c", _ASK], cwd="/", capture_output=True, text=True
        )
        if done.stdout.strip():
            found: dict[str, Any] = json.loads(done.stdout)
            return found
    return None


def cxx() -> list[str]:
    found = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
    if found is None:
        raise RuntimeError("no C++ compiler was found (g++, clang++, c++, or CXX)")
    return shlex.split(found)


def sources(part: str) -> str:
    """Return the flag with the hash that Python later compares with the sources."""
    return f'-DRW_SOURCES="{shared("sources")["source_hash"](part)}"'


def includes() -> list[str]:
    import pybind11

    return [
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{d}" for d in (pybind11.get_include(), sysconfig.get_paths()["include"])),
    ]


def edge(obj: str, kind: str, source: str, words: list[str], compiler: Path | None = None) -> str:
    command = ninja_quote(cxx() if compiler is None else [str(compiler)])
    return (
        f"build {obj}: {kind} {ninja_path(ROOT / 'csrc' / source)}\n  compiler = {command}\n "
        f" words = {ninja_quote(words)}\n"
    )


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # the user names a toolkit, so no other is looked for
        return next(filter(Path.is_file, [Path(home, "bin", "nvcc")]), None)
    found = shutil.which("nvcc")
    return (
        Path(found)
        if found
        else next(filter(Path.is_file, [Path("/usr/local/cuda/bin/nvcc")]), None)
    )


def toolkit_of(nvcc: Path) -> Path:
    """Ask nvcc for its toolkit, because the nvcc on the PATH may be a wrapper."""
    said = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"TOP=(.+)", said)
    return (Path(top.group(1).strip()) if top else nvcc.parents[1]).resolve()


def cuda_libraries(toolkit: Path) -> list[str]:
    library = next(
        (d for d in (toolkit / "lib64", toolkit / "lib") if (d / "libcudart_static.a").exists()),
        None,
    )
    if library is None:
        raise RuntimeError(f"libcudart_static.a was not found in {toolkit}")
    return [
        f"-L{library}",
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
        "-Wl,--exclude-libs,ALL",
    ]


def cuda_archs(nvcc: Path) -> list[str]:
    """Return the architectures to compile for: those of this machine's GPUs, or all
    that this toolkit knows, from Ampere on.

    For a newer GPU, a driver compiles the PTX of the last one.
    """
    named = os.environ.get("REWEIGHT_OPS_CUDA_ARCHS", "")
    if named not in ("", "all"):
        return named.split(";")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < (11, 8):
        raise RuntimeError("CUDA 11.8 or newer is needed")
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    here = [] if named else [arch for arch in gpus_here() if int(arch) >= 80]
    if here and all(f"sm_{arch}" in known for arch in here):
        return here
    return ["80", "90", "100", "120"] if version >= (12, 8) else ["80", "90"]


def cuda_targets(archs: list[str]) -> list[str]:
    return [
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs),
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}",
    ]


def gpus_here() -> list[str]:
    """Return the compute capabilities of this machine's GPUs, as nvcc writes them.

    There are none if nvidia-smi finds none.
    """
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({"".join(found) for found in re.findall(r"^(\d+)\.(\d)$", said, re.M)}, key=int)


def cuda_edge(obj: str, kernel: str, dtype: str, targets: list[str], nvcc: Path) -> str:
    """Return the edge that compiles one file of kernels for one dtype."""
    words = [
        *NVCC_FLAGS,
        "-ccbin",
        cxx()[0],
        *targets,
        f"-I{ROOT / 'csrc'}",
        f"-DRW_ELEMENT={CUDA_DTYPES[dtype]}",
        f"-DRW_DTYPE={dtype}",
    ]
    return edge(obj, "nvcc", f"cuda/{kernel}.cu", words, nvcc)


def ninja_quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


#: How ninja compiles an edge.
RULES = "".join(
    f"rule {kind}\n  description = {kind.upper()} $out\n"
    "  command = $compiler $words -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = "
    "gcc\n"
    for kind in ("cxx", "nvcc")
)


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


LICENSE = {
    "license_expression" if int(__version__.split(".")[0]) >= 77 else "license": "Apache-2.0"
}

# bench/gpu_variants.py and tests/support/nvcc.py import the flags from here.
if __name__ == "__main__":
    setup(
        **LICENSE,
        packages=[
            *find_packages(str(ROOT), include=["reweight_ops", "reweight_ops.*"]),
            "reweight_ops.triton_kernels",
            BENCH,
        ],
        ext_modules=[
            Extension("reweight_ops._C", sources=[]),
            Extension("reweight_ops._cuda", sources=[]),
        ],
        cmdclass={"build_ext": NinjaBuild, "build_py": Modules},
    )
