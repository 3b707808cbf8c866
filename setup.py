"""Builds the torch-free extension ``reweight_ops._C`` with ninja; all metadata is in pyproject.toml.

``REWEIGHT_OPS_BUILD`` says what to build: ``auto`` (default: whatever this machine can, never an error), ``cpu``, ``cuda`` (CPU and CUDA)
or ``none``; asked for by name, a part that cannot be built is an error. ``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are honoured.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
]  # fmt: skip
# csrc/cpu/kernels.cpp is compiled once per level; dispatch.cpp picks the best one that the processor has, at run time.
X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v4_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
# GCC 12 warns about its own AVX-512 header, and about the ABI of vectors that never leave their file.
NO_FALSE_ALARM = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]


class NinjaBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("REWEIGHT_OPS_BUILD", "auto")
        if wanted not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"REWEIGHT_OPS_BUILD is {wanted!r}, expected auto, cpu, cuda or none.")
        if wanted == "none":
            return
        try:
            self.build(self.cuda_edges(wanted))
        except (OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as error:
            if wanted != "auto":
                raise
            print(f"\nreweight_ops: installing without compiled kernels (PyTorch and Triton only), because: {error}\n", flush=True)

    def cuda_edges(self, wanted: str) -> list[str]:
        """The one place for the CUDA part: its build edges, or [] where there is no nvcc."""
        if wanted == "cuda":
            raise RuntimeError("this version has no CUDA kernels to build.")
        return []

    def build(self, extra_edges: list[str]) -> None:
        import ninja
        import pybind11

        cxx = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
        if cxx is None:
            raise RuntimeError("no C++ compiler was found (g++, clang++, c++, or CXX)")
        no_openmp = subprocess.run([*shlex.split(cxx), "-fopenmp", "-E", "-xc++", os.devnull], capture_output=True).returncode
        openmp = [] if no_openmp else ["-fopenmp"]
        levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
        flags = [*FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        defines = [f'-DRW_VERSION="{self.distribution.get_version()}"', f'-DRW_FLAGS="{" ".join(flags)}"']
        defines += [f"-DRW_HAS_{name.upper()}" for name in levels]
        includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{d}" for d in (pybind11.get_include(), sysconfig.get_paths()["include"]))]

        edges, objects = [], []

        def compile_one(source: str, obj: str, extra: list[str]) -> None:
            objects.append(obj)
            edges.append(f"build {obj}: cxx {ninja_path(ROOT / 'csrc' / source)}\n  extra = {ninja_quote([*includes, *extra])}\n")

        compile_one("bindings.cpp", "bindings.o", defines)
        compile_one("cpu/dispatch.cpp", "dispatch.o", defines)
        for name, march in levels.items():
            compile_one("cpu/kernels.cpp", f"kernels_{name}.o", [*march, f"-DRW_LEVEL={name}", *NO_FALSE_ALARM])
        target = Path(self.get_ext_fullpath("reweight_ops._C")).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        link = ["-shared", *openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
        rules = (
            f"rule cxx\n  command = {cxx} {ninja_quote(flags)} $extra -MMD -MF $out.d -c $in -o $out\n"
            "  description = CXX $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {cxx} $in {ninja_quote(link)} -o $out\n  description = LINK $out\n"
        )
        edges += [*extra_edges, f"build {ninja_path(target)}: link {' '.join(objects)}\n"]
        (folder / "build.ninja").write_text(rules + "".join(edges))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


def ninja_quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=[*find_packages(str(ROOT), include=["reweight_ops", "reweight_ops.*"]), "reweight_ops.triton_kernels"],
    ext_modules=[Extension("reweight_ops._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
