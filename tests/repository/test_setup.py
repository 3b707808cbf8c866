"""What setup.py builds, by request, PyTorch, compilers and GPUs; and that it records
what it left out.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from reweight_ops._core.backends import built

pytest.importorskip("setuptools")


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.delenv("REWEIGHT_OPS_CUDA_ARCHS", raising=False)
    spec = importlib.util.spec_from_file_location("reweight_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(folder, name, *lines):
    """A program of that name that says these lines, the first on the PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def torch_of(folder, cuda):
    """A PyTorch that fails if it is imported: its version file is what may be read."""
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    (package / "version.py").write_text(f"__version__ = '9.9'\ncuda = {cuda!r}\n")
    return str(folder)


def test_what_is_asked_for_by_name_is_not_second_guessed(setup, monkeypatch):
    monkeypatch.setattr(setup, "installed_torch", lambda: pytest.fail("torch does not matter"))
    assert [setup.why_left_out(m, "cuda") for m in ("_C", "_cuda")] == [None, None]
    assert setup.why_left_out("_C", "cpu") is None and setup.why_left_out("_C", "auto") is None
    assert setup.why_left_out("_cuda", "cpu") == "REWEIGHT_OPS_BUILD was cpu"
    assert {setup.why_left_out(m, "none") for m in ("_C", "_cuda")} == {
        "REWEIGHT_OPS_BUILD was none"
    }


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "PyTorch 9.9 is not built for CUDA"), ("12.8", None)]
)
def test_auto_makes_cuda_kernels_for_a_pytorch_of_cuda(setup, monkeypatch, tmp_path, cuda, said):
    monkeypatch.setenv("PYTHONPATH", torch_of(tmp_path, cuda))
    assert setup.why_left_out("_cuda", "auto") == said


def test_the_pytorch_that_pip_hides_from_a_build_is_found(setup, monkeypatch, tmp_path):
    """Like pip: a separate build environment, by a sitecustomize that removes the
    interpreter's packages from the path.
    """
    real = setup.installed_torch()
    assert real is not None and "cuda" in real
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hidden = subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch'))"],
        capture_output=True,
        text=True,
    )
    assert hidden.stdout.strip() == "None"
    assert setup.installed_torch() == real
    monkeypatch.setattr(setup.sys, "executable", tool(tmp_path, "python", "exit 0"))
    assert "no PyTorch was found" in setup.why_left_out("_cuda", "auto")


NVCC = (
    "case $1 in --version) echo 'release 12.9, V12.9.1';; *) printf 'sm_80\\nsm_90\\nsm_120\\n';; esac",
)


@pytest.mark.parametrize(
    ("smi", "archs"),
    [
        ("printf '9.0\\n9.0\\n'", ["90"]),
        ("printf '12.0\\n8.0\\n'", ["80", "120"]),
        ("printf '7.5\\n9.0\\n'", ["90"]),  # nothing here runs on it
        ("printf '7.5\\n'", ["80", "90", "100", "120"]),
        # newer than this nvcc: it runs the last one's PTX
        ("printf '13.0\\n9.0\\n'", ["80", "90", "100", "120"]),
        (
            "echo 'NVIDIA-SMI has failed: driver 9.0 is not running'; exit 9",
            ["80", "90", "100", "120"],
        ),
    ],
)
def test_the_targets_are_the_gpus_that_are_there(setup, monkeypatch, tmp_path, smi, archs):
    nvcc = tool(tmp_path, "nvcc", *NVCC)
    tool(tmp_path, "nvidia-smi", smi)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert setup.cuda_archs(nvcc) == archs
    monkeypatch.setenv("REWEIGHT_OPS_CUDA_ARCHS", "all")
    assert setup.cuda_archs(nvcc) == ["80", "90", "100", "120"]
    monkeypatch.setenv("REWEIGHT_OPS_CUDA_ARCHS", "86;90")
    assert setup.cuda_archs(nvcc) == ["86", "90"]


def build(tmp_path, **environment):
    """``setup.py build_ext`` into a folder, without a C++ compiler, so that nothing
    takes long: log, and what it remembers.
    """
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    remembered = tmp_path / "lib/reweight_ops/_build.json"
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(remembered.read_text()) if remembered.exists() else None,
    )


def test_beside_a_pytorch_of_the_cpu_nvcc_is_never_run(tmp_path):
    called = tmp_path / "called"
    tool(tmp_path / "bin", "nvcc", f"touch {called}", "exit 1")
    more = {
        "CUDA_HOME": "",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CXX": "/nowhere/c++",
        "REWEIGHT_OPS_BUILD": "auto",
    }
    (tmp_path / "cpu").mkdir()
    code, log, missing = build(tmp_path, PYTHONPATH=torch_of(tmp_path / "cpu", None), **more)
    assert code == 0 and not called.exists(), log
    assert (
        missing["_cuda"] == "PyTorch 9.9 is not built for CUDA" and "/nowhere/c++" in missing["_C"]
    )
    assert (
        "REWEIGHT_OPS_BUILD is auto (of auto, cpu, cuda, none)" in log and missing["_cuda"] in log
    )
    (tmp_path / "cuda").mkdir()
    code, log, missing = build(tmp_path, PYTHONPATH=torch_of(tmp_path / "cuda", "12.8"), **more)
    assert code == 0 and called.exists() and "nvcc" in missing["_cuda"], log
    code, log, _ = build(tmp_path, **{**more, "REWEIGHT_OPS_BUILD": "cuda"})
    assert code != 0, "asked for by name"


def test_what_the_compiler_said_is_remembered(tmp_path):
    """The message says more than that a command failed: in pip's output it is all that
    a user sees.
    """
    cxx = tool(
        tmp_path,
        "g++",
        "case \"$*\" in *-E*) exit 0;; *) echo 'kernels.cpp:7: fatal error: no such header' >&2; exit 1;; esac",
    )
    code, log, missing = build(tmp_path, CXX=str(cxx), REWEIGHT_OPS_BUILD="auto")
    assert code == 0 and missing["_C"] == "kernels.cpp:7: fatal error: no such header", log


def test_why_a_module_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(built, "_PACKAGE", tmp_path / "package")
    error = ImportError("libcudart is missing")
    assert built.why_missing("_cuda", error) == "libcudart is missing", "nothing was remembered"
    built.remember(tmp_path / "package", {"_C": "no compiler"})
    assert built.why_missing("_C", error) == "not built: no compiler"
    assert built.why_missing("_cuda", error) == "libcudart is missing", (
        "it was built, and does not load"
    )
