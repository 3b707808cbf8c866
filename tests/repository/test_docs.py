"""The claims of the documents: the one-file method of CONTRIBUTING, doctests, versions,
the public surface.
"""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

import reweight_ops as rw


def test_a_new_method_is_one_file_plus_the_generated_ones(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    name, source = re.search(r"<!-- example: (\S+) -->\n```python\n(.*?)```", text, re.S).groups()
    for folder in ("reweight_ops", "csrc/common", "triton_kernels", "docs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert (tmp_path / name).read_text() == source, (
        f"{name} and the example of CONTRIBUTING are one text"
    )
    (tmp_path / name).unlink()
    # its recipe is a second step
    recipes = tmp_path / "reweight_ops/recipes/off_policy.py"
    recipes.write_text(
        re.sub(
            r'    Recipe\(\n        name="glm5",.*?\n    \),\n',
            "",
            recipes.read_text(),
            flags=re.DOTALL,
        )
    )
    run("-m", "reweight_ops.codegen")  # the package as it was without the method
    before = {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    (tmp_path / name).write_text(source)
    run("-m", "reweight_ops.codegen")
    after = {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    changed = {str(p.relative_to(tmp_path)) for p in after if before.get(p) != after[p]}
    assert changed == {
        name,
        "docs/methods.md",
        "reweight_ops/methods/__init__.pyi",
        "reweight_ops/_core/catalogue/examples.py",
    }
    script = f"""
import torch, reweight_ops as rw
from reweight_ops.testing import compare, gradcheck, make_batch
assert rw.__file__.startswith({str(tmp_path)!r})
spec = rw.methods.glm5()
assert gradcheck(spec, make_batch(spec, (4, 10), 7, dtype=torch.float64))
print(compare(spec, make_batch(spec), backend="reference", plan="one_pass").passed)
"""
    shown = run("-c", script)
    assert shown.strip() == "True"


MODULES = ["reweight_ops"] + [
    m.name
    for m in pkgutil.walk_packages(rw.__path__, "reweight_ops.")
    if not m.name.startswith(
        (
            "reweight_ops._C",
            "reweight_ops.triton_kernels",
            "reweight_ops.integrations",
            "reweight_ops.codegen.__main__",
            "reweight_ops.cli",
        )
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except rw.BackendUnavailable as error:
        pytest.skip(str(error))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


@pytest.mark.usefixtures("registry")
def test_readme_python_runs():
    """Every python block of the README that does not need a trainer or a GPU runs as it
    stands.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        if "trl" in block or 'device="cuda"' in block:
            compile(block, "README.md", "exec")
            continue
        exec(compile(block, "README.md", "exec"), namespace)


def test_version_is_stated_once_and_the_same():
    assert (
        re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
        == rw.__version__
    )
    assert f"## {rw.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_public_surface_is_sorted_and_documented():
    classes = [n for n in rw.__all__ if n[0].isupper()]
    functions = [n for n in rw.__all__ if n[0].islower()]
    assert rw.__all__ == [*sorted(classes, key=lambda n: (not n.isupper(), n)), *sorted(functions)]
    for name in rw.__all__:
        value = getattr(rw, name)
        assert not callable(value) or (
            value.__doc__ and not value.__doc__.startswith(f"{name}(")
        ), name
    for method in rw.METHODS.values():
        assert (
            method.formula and method.paper and re.fullmatch(r"\d{4}\.\d{5}|unknown", method.arxiv)
        ), method.name
        assert method.certainty in ("verified", "secondary", "derived")
    for rule in (*rw.rules.RULES.values(), *rw.rules.WEIGHTS.values()):
        assert rule.__doc__ and not rule.__doc__.startswith(f"{rule.__name__}("), rule


def test_importing_the_package_imports_no_backend_and_no_extra():
    backends = [f"reweight_ops._core.backends.{name}" for name in rw.BACKENDS]
    extras = [
        "trl",
        "transformers",
        "typer",
        "rich",
        "matplotlib",
        "hypothesis",
        "reweight_ops._C",
        "reweight_ops.triton_kernels",
        *backends,
    ]
    code = f"import sys, reweight_ops; print([m for m in {extras} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_importing_the_package_says_nothing_without_numpy():
    """PyTorch's own warning about this must not appear: the package does not need
    NumPy.
    """
    code = "import sys; sys.modules['numpy'] = None; import reweight_ops, torch; assert torch.ones(2).sum() == 2"
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_dir_shows_the_public_names_only():
    assert dir(rw) == sorted([*rw.__all__, "__version__"])
    assert all(hasattr(rw, name) for name in dir(rw))


def test_triton_kernels_is_no_top_level_module():
    code = "import importlib.util as u; print(u.find_spec('triton_kernels'), u.find_spec('reweight_ops.triton_kernels') is not None)"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.split() == [
        "None",
        "True",
    ]


def test_no_file_is_too_long():
    for pattern in (
        "reweight_ops/**/*.py",
        "csrc/**/*",
        "triton_kernels/*.py",
        "tests/**/*.py",
        "bench/**/*.py",
        "examples/**/*.py",
        "setup.py",
    ):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert len(path.read_text().splitlines()) <= 720, path
