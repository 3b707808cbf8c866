"""The build: a wheel's contents, builds without a compiler, rebuilds after a changed
header, and kernels under sanitizers.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

SOURCES = ("pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "LICENSE", "README.md")
SOURCES += ("csrc", "reweight_ops", "triton_kernels", "bench")
#: Other files that the tests read.
MORE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    ".ci",
    ".clang-format",
    "docs",
    "examples",
    "tests",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without build outputs."""
    to = tmp_path_factory.mktemp("tree")
    copy(SOURCES, to)
    return to


def copy(names, to):
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                to / name,
                ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"),
            )
        else:
            shutil.copy(ROOT / name, to)


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def wheel(tree, to, **environment):
    code, log = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        to,
        tree,
        cwd=tree,
        **environment,
    )
    shutil.rmtree(tree / "build", ignore_errors=True)
    return code, log, next(iter(to.glob("*.whl")), None)


def imported(site, code):
    """Run ``code`` against the unpacked wheel alone: an editable install of this
    checkout must not answer for what the wheel lacks.
    """
    script = f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n{code}"
    return run(sys.executable, "-c", script, cwd=site)


def test_wheel_with_kernels(tree, tmp_path):
    code, log, path = wheel(tree, tmp_path, REWEIGHT_OPS_BUILD="cpu")
    assert code == 0, log
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as z:
        assert not [n for n in z.namelist() if n.startswith("triton_kernels")], (
            "triton_kernels is a top-level name"
        )
        z.extractall(site)
    code, log = imported(
        site,
        "import reweight_ops, reweight_ops._C as c, reweight_ops.triton_kernels as t\n"
        "assert reweight_ops.__file__.startswith(sys.path[0]) and c.__file__.startswith(sys.path[0]) and t.__file__.startswith(sys.path[0])\n"
        "print(c.build_info()['levels'], c.level())",
    )
    assert code == 0, log
    assert (site / "reweight_ops/bench/cases.py").exists()
    assert not [
        p
        for name in ("gpu", "gpu_kernels", "page", "scaling", "test_bench")
        for p in site.rglob(f"bench/{name}.py")
    ], "for a checkout only"
    arguments = [
        "bench",
        "--tiny",
        "--only",
        "loss",
        "float32",
        "--rounds",
        "1",
        "--providers",
        "none",
        "--no-memory",
        "--no-plot",
        "--quiet",
        "1",
    ]
    code, log = imported(
        site, f"from reweight_ops.cli import main\nsys.argv[1:] = {arguments}\nmain()"
    )
    assert code == 0 and "cpu in place" in log and list((site / "bench_output").glob("*.json")), log


def test_without_a_compiler(tree, tmp_path):
    code, log, path = wheel(tree, tmp_path, CXX="/nowhere/c++", REWEIGHT_OPS_BUILD="auto")
    assert (
        code == 0
        and log.count("installing without C++ kernels")
        == log.count("installing without CUDA kernels")
        == 1
    ), log
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as z:
        assert not [n for n in z.namelist() if n.endswith(".so")]
        z.extractall(site)
    code, log = imported(
        site,
        "import torch, reweight_ops as rw\n"
        "z = torch.randn(2, 3, 50, requires_grad=True)\n"
        "out = rw.policy_loss(z, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), spec='ppo')\n"
        "out.loss.backward(); assert out.backend == 'reference', out.backend\n"
        "try: rw.token_logps(z, torch.zeros(2, 3, dtype=torch.long), backend='cpu')\n"
        "except rw.BackendUnavailable as e: assert 'REWEIGHT_OPS_BUILD' in str(e) and '/nowhere/c++' in str(e), e\n"
        "else: raise AssertionError('no error')\n"
        "said = rw.explain(rw.token_logps, z, torch.zeros(2, 3, dtype=torch.long))\n"
        "assert '/nowhere/c++' in said.backends['cpu'], said",
    )
    assert code == 0, log


def hook(tree, name, to, **environment):
    """Call the build backend like an installer; return the path of its output."""
    code, log = run(
        sys.executable,
        "-c",
        f"import build_backend as b; b.{name}({str(to)!r})",
        cwd=tree,
        **environment,
    )
    assert code == 0, log
    (made,) = (path for path in to.iterdir() if path.suffix in (".whl", ".gz"))
    return made


def test_the_tests_run_from_the_sdist(tmp_path):
    """It holds every file of a checkout, and there all tests are found and those of the
    documents pass.
    """
    whole, made = tmp_path / "whole", tmp_path / "made"
    whole.mkdir()
    made.mkdir()
    copy(SOURCES + MORE, whole)
    want = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    with tarfile.open(hook(whole, "build_sdist", made)) as archive:
        archive.extractall(tmp_path, filter="data")
    (sdist,) = tmp_path.glob("reweight_ops-*")
    got = {p.relative_to(sdist) for p in sdist.rglob("*") if p.is_file()}
    assert want <= got and all(
        p.name in ("PKG-INFO", "setup.cfg") or "egg-info" in p.parts[0] for p in got - want
    ), (
        want - got,
        got - want,
    )
    for built in (ROOT / "reweight_ops").glob("_C.*.so"):  # from the same sources
        shutil.copy(built, sdist / "reweight_ops")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    code, log = run(*tests, "--collect-only", "-m", "slow or not slow", cwd=sdist)
    assert code == 0, log[-3000:]
    some = [
        "tests/repository/test_docs.py",
        "tests/repository/test_bench_results.py",
        "tests/backends/cpu/test_cpu_accuracy.py",
    ]
    code, log = run(*tests, *some, "-k", "not doctests and not peaked", cwd=sdist)
    assert code == 0, log[-3000:]


def test_type_checkers_find_an_editable_installation(tree, tmp_path):
    """By a path in a file: they run no import hook. What is imported is the checkout's,
    the folders that lie elsewhere too.
    """
    environment = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)[0] == 0
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(
        hook(tree, "build_editable", tmp_path, REWEIGHT_OPS_BUILD="none")
    ) as wheel:
        wheel.extractall(site)
        (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
        listed = {
            line.split(",")[0]: line.split(",")[1]
            for line in wheel.read(record).decode().splitlines()
        }
        assert set(listed) == set(wheel.namelist())
        for name, digest in listed.items():
            sha = (
                base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest())
                .decode()
                .rstrip("=")
            )
            assert name == record or digest == f"sha256={sha}", name
    code, log = run(
        sys.executable,
        "-c",
        "import sys, site; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "for name in [m for m in sys.modules if m.startswith('__editable__')]: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
        "import pathlib, reweight_ops as rw, reweight_ops.triton_kernels as t, reweight_ops.bench as b\n"
        "print(*(pathlib.Path(m.__file__).resolve().parent for m in (rw, t, b)))",
        cwd=tmp_path,
    )
    assert code == 0 and log.split() == [
        str(tree / name) for name in ("reweight_ops", "triton_kernels", "bench")
    ], log
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text("import reweight_ops as rw\nx: int = rw.__version__\n")
    checker = [
        sys.executable,
        "-m",
        "mypy",
        "--cache-dir",
        tmp_path / "cache",
        "--follow-imports",
        "silent",
        "--ignore-missing-imports",
    ]
    code, log = run(
        *checker, "--python-executable", environment / "bin/python", "user.py", cwd=tmp_path
    )
    assert (
        code == 1 and 'has type "str", variable has type "int"' in log and log.count("error:") == 1
    ), log


def test_a_part_asked_for_by_name_must_build(tree, tmp_path):
    for environment in (
        {"REWEIGHT_OPS_BUILD": "cpu", "CXX": "/nowhere/c++"},
        {"REWEIGHT_OPS_BUILD": "gpu"},
    ):
        code, log = run(
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            tmp_path,
            cwd=tree,
            **environment,
        )
        assert code != 0, log
    code, log = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path,
        cwd=tree,
        REWEIGHT_OPS_BUILD="none",
    )
    assert code == 0 and not list(tmp_path.rglob("*.so")), log


def test_headers_rebuild_what_includes_them(tree):
    def build():
        code, log = run(
            sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, REWEIGHT_OPS_BUILD="cpu"
        )
        assert code == 0, log
        return log.count("CXX ")

    assert build() > 0
    assert build() == 0, "nothing changed"
    (tree / "csrc/cpu/sweeps.h").touch()
    levels = build()
    assert levels >= 1, "the kernels include sweeps.h"
    (tree / "csrc/common/program_table.h").touch()
    assert build() > levels, "the bindings include the table too"


def test_sanitizers(tree):
    """The edge cases and a part of the accuracy tests with address and
    undefined-behaviour sanitizers in the extension.
    """
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no address sanitizer here")
    # libstdc++ too: the sanitizer wants to know how exceptions are thrown before
    # anybody throws one
    preload = " ".join(found)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
    code, log = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        cwd=tree,
        REWEIGHT_OPS_BUILD="cpu",
        CXXFLAGS=flags,
        LDFLAGS="-fsanitize=address,undefined",
    )
    assert code == 0, log
    shutil.copytree(ROOT / "tests", tree / "tests", dirs_exist_ok=True)
    # detect_leaks: Python itself leaks on exit. The 2^31 case maps more than the
    # sanitizer's shadow likes; what is not served traces a program of a thousand terms,
    # Python alone, for minutes.
    code, log = run(
        sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "tests/backends/cpu/test_cpu_edges.py", "tests/backends/cpu/test_cpu_accuracy.py",
        "-k", "not beyond_two and not peaked and not shifted and not several and not does_not_serve", cwd=tree, LD_PRELOAD=preload, PYTHONPATH=str(tree),
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0", UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    assert code == 0 and "runtime error" not in log and "AddressSanitizer" not in log, (
        log[:3000] + log[-3000:]
    )
    code, log = run(
        sys.executable,
        "-c",
        "import reweight_ops._C as c; print(c.build_info()['flags'])",
        cwd=tree,
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert "-fsanitize=address" in log, log
