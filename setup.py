"""Builds the torch-free extensions ``reweight_ops._C`` and, with nvcc, ``reweight_ops._cuda`` with ninja; all metadata is in pyproject.toml.

``REWEIGHT_OPS_BUILD`` says what to build: ``auto`` (default: whatever this machine can, never an error), ``cpu``, ``cuda`` (CPU and CUDA)
or ``none``; asked for by name, a part that cannot be built is an error. ``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are honoured. nvcc is looked for in
``CUDA_HOME``, ``PATH`` and ``/usr/local/cuda``; ``REWEIGHT_OPS_CUDA_ARCHS`` (``80;90``) replaces the list of targets. A GPU is never looked for.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext

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
# csrc/cpu/kernels.cpp and divergence.cpp are compiled once per level; dispatch.cpp picks the best one that the processor has, at run time.
X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v4_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
# Kernels of csrc/cuda are compiled once per dtype. No contraction: kernels that share a sweep must round alike. A spill is an error.
CUDA_DTYPES = {"f32": "float", "bf16": "Bf16", "f16": "F16"}
CUDA_KERNELS = ("streaming", "ring", "divergence", "scale")
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]
# GCC 12 warns about its own AVX-512 header, and about the ABI of vectors that never leave their file.
NO_FALSE_ALARM = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]


class NinjaBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("REWEIGHT_OPS_BUILD", "auto")
        if wanted not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"REWEIGHT_OPS_BUILD is {wanted!r}, expected auto, cpu, cuda or none.")
        if wanted == "none":
            return
        parts = {"C++": self.cpu_part, "CUDA": self.cuda_part}
        if wanted == "cpu":
            del parts["CUDA"]
        for name, part in parts.items():
            try:
                self.build(name, *part())
            except (OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as error:
                if wanted != "auto":
                    raise
                print(f"\nreweight_ops: installing without {name} kernels, because: {error}\n", flush=True)

    def cpu_part(self) -> tuple[str, str]:
        """The module's name and its build edges."""
        openmp = [] if subprocess.run([*cxx(), "-fopenmp", "-E", "-xc++", os.devnull], capture_output=True).returncode else ["-fopenmp"]
        levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
        flags = [*FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        names = ",".join(levels)
        defines = [f'-DRW_VERSION="{self.distribution.get_version()}"', f'-DRW_FLAGS="{" ".join(flags)}"', f'-DRW_LEVEL_NAMES="{names}"']
        defines += [f"-DRW_HAS_{name.upper()}" for name in levels]
        objects = {"bindings.o": edge("bindings.o", "cxx", "bindings.cpp", [*flags, *includes(), *defines, sources("cpu")])}
        objects["dispatch.o"] = edge("dispatch.o", "cxx", "cpu/dispatch.cpp", [*flags, *includes(), *defines])
        objects["evaluate_rows.o"] = edge("evaluate_rows.o", "cxx", "cpu/evaluate_rows.cpp", [*flags, *includes()])
        objects["rows.o"] = edge("rows.o", "cxx", "cpu/rows.cpp", [*flags, *includes()])
        for name, march in levels.items():
            obj = f"kernels_{name}.o"
            objects[obj] = edge(obj, "cxx", "cpu/kernels.cpp", [*flags, *includes(), *march, f"-DRW_LEVEL={name}", *NO_FALSE_ALARM])
            obj = f"divergence_{name}.o"
            objects[obj] = edge(obj, "cxx", "cpu/divergence.cpp", [*flags, *includes(), *march, f"-DRW_LEVEL={name}", *NO_FALSE_ALARM])
        return self.link("reweight_ops._C", objects, openmp)

    def cuda_part(self) -> tuple[str, str]:
        """The one place for the CUDA part."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
        archs = cuda_archs(nvcc)
        targets = cuda_targets(archs)
        toolkit = toolkit_of(nvcc)
        flags = [
            *FLAGS,
            *shlex.split(os.environ.get("CXXFLAGS", "")),
            *includes(),
            f"-I{toolkit / 'include'}",
            f'-DRW_CUDA_ARCHS="{";".join(archs)}"',
        ]
        objects = {"cuda_bindings.o": edge("cuda_bindings.o", "cxx", "cuda/bindings.cpp", [*flags, sources("cuda")])}
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
        return "".join([rule, *objects.values(), f"build {ninja_path(target)}: link {' '.join(objects)}\n"]), module

    def build(self, name: str, edges: str, module: str) -> None:
        import ninja

        folder = Path(self.build_temp).absolute() / module
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(RULES + edges)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


def cxx() -> list[str]:
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        raise RuntimeError("no C++ compiler was found (g++, clang++, c++, or CXX)")
    return shlex.split(found)


def sources(part: str) -> str:
    """What the Python side compares with the sources beside it."""
    return f'-DRW_SOURCES="{runpy.run_path(str(ROOT / "reweight_ops/_core/backends/sources.py"))["source_hash"](part)}"'


def includes() -> list[str]:
    import pybind11

    return [f"-I{ROOT / 'csrc'}", *(f"-isystem{d}" for d in (pybind11.get_include(), sysconfig.get_paths()["include"]))]


def edge(obj: str, kind: str, source: str, words: list[str], compiler: Path | None = None) -> str:
    command = ninja_quote(cxx() if compiler is None else [str(compiler)])
    return f"build {obj}: {kind} {ninja_path(ROOT / 'csrc' / source)}\n  compiler = {command}\n  words = {ninja_quote(words)}\n"


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # named: no other will do
        return next(filter(Path.is_file, [Path(home, "bin", "nvcc")]), None)
    found = shutil.which("nvcc")
    return Path(found) if found else next(filter(Path.is_file, [Path("/usr/local/cuda/bin/nvcc")]), None)


def toolkit_of(nvcc: Path) -> Path:
    """By what nvcc itself says: on the PATH it may be a wrapper."""
    said = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", said)
    return (Path(top.group(1).strip()) if top else nvcc.parents[1]).resolve()


def cuda_libraries(toolkit: Path) -> list[str]:
    library = next((d for d in (toolkit / "lib64", toolkit / "lib") if (d / "libcudart_static.a").exists()), None)
    if library is None:
        raise RuntimeError(f"libcudart_static.a was not found in {toolkit}")
    return [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def cuda_archs(nvcc: Path) -> list[str]:
    """What this toolkit can compile for, from Ampere to the newest; a driver compiles the PTX of the last one for anything newer."""
    named = os.environ.get("REWEIGHT_OPS_CUDA_ARCHS")
    if named:
        return named.split(";")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < (11, 8):
        raise RuntimeError("CUDA 11.8 or newer is needed")
    return ["80", "90", "100", "120"] if version >= (12, 8) else ["80", "90"]


def cuda_targets(archs: list[str]) -> list[str]:
    return [*(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs), f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_edge(obj: str, kernel: str, dtype: str, targets: list[str], nvcc: Path) -> str:
    """One file of kernels for one dtype."""
    words = [*NVCC_FLAGS, "-ccbin", cxx()[0], *targets, f"-I{ROOT / 'csrc'}", f"-DRW_ELEMENT={CUDA_DTYPES[dtype]}", f"-DRW_DTYPE={dtype}"]
    return edge(obj, "nvcc", f"cuda/{kernel}.cu", words, nvcc)


def ninja_quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


#: How ninja compiles an edge.
RULES = "".join(
    f"rule {kind}\n  description = {kind.upper()} $out\n"
    "  command = $compiler $words -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
    for kind in ("cxx", "nvcc")
)


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


LICENSE = {"license_expression" if int(__version__.split(".")[0]) >= 77 else "license": "Apache-2.0"}

if __name__ == "__main__":  # bench/gpu_variants.py and tests/support/nvcc.py compile by the same flags
    setup(
        **LICENSE,
        packages=[*find_packages(str(ROOT), include=["reweight_ops", "reweight_ops.*"]), "reweight_ops.triton_kernels"],
        ext_modules=[Extension("reweight_ops._C", sources=[]), Extension("reweight_ops._cuda", sources=[])],
        cmdclass={"build_ext": NinjaBuild},
    )
