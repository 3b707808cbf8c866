"""The package's layers, read from its imports: data flows one way, and no module uses
another folder's private names.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

from reweight_ops._core.moved import MOVED

PACKAGE = ROOT / "reweight_ops"

#: The layers, lowest first. Units in one line must not import each other; a folder is
#: one unit, and so is a file at the top.
LAYERS = (
    ("_core.compiler",),
    (
        "errors",
        "_core.detached",
        "_core.files",
        "_core.moved",
        "_core.names",
        "_core.once",
        "_core.transforms",
        "triton_kernels",
    ),
    ("_core.ranges",),
    ("_core.formula", "_core.rows"),
    ("_core.spec", "_core.backends", "_core.catalogue"),
    ("_core.calls",),
    ("_core.engine",),
    ("_core.losses",),
    (
        "rules",
        "rewards",
        "sample_weights",
        "objectives",
        "advantages",
        "preference",
        "divergences",
        "kernels",
        "nn",
    ),
    ("weights",),
    ("methods",),
    ("schedules",),
    ("recipes",),
    ("",),  # reweight_ops/__init__.py
    ("testing", "integrations"),
    ("codegen",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}


class Import(NamedTuple):
    """``name`` (None: the module itself) of ``target`` in line ``line`` of ``module``;
    modules are dotted, below the package.
    """

    module: str
    line: int
    target: str
    name: str | None
    inside_a_function: bool

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}{f'.{self.name}' if self.name else ''}"


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of the package by itself, including those inside functions and under
    ``TYPE_CHECKING``.
    """
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        package = [part for part in package if part]
        inside = {
            child
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == root.name:
                        target = alias.name.partition(".")[2]
                        yield Import(module, node.lineno, target, None, node in inside)
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                base = package[: len(package) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == root.name:
                base = []
            else:
                continue
            below = (
                (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            )
            target = ".".join([*base, *(part for part in below if part)])
            for alias in node.names:
                full = f"{target}.{alias.name}".lstrip(".")
                is_module = full in known or full == "triton_kernels"
                yield Import(
                    module,
                    node.lineno,
                    full if is_module else target,
                    None if is_module else alias.name,
                    node in inside,
                )


def unit(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "_core" and len(parts) > 1 else parts[0]


def offences(root: Path) -> list[str]:
    """Every line that breaks the layers, as text."""
    known = modules(root)
    found = list(imports(root, known))
    bad = [f"no layer: {name}" for name in sorted({unit(m) for m in known} - set(RANK) - {"_core"})]
    for each in found:
        of, to = unit(each.module), unit(each.target)
        if of not in RANK or to not in RANK:
            continue
        if of != to and RANK[to] >= RANK[of]:
            bad.append(f"upwards: {each}")
        if each.inside_a_function:
            bad.append(f"inside a function: {each}")
        if (
            each.name
            and each.name.startswith("_")
            and not each.name.startswith("__")
            and folder(each.module, known) != folder(each.target, known)
        ):
            bad.append(f"private name of another folder: {each}")
    return bad + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(known, found)]


def folder(module: str, known: dict[str, Path]) -> Path:
    return known[module].parent if module in known else Path(module)


def cycles(known: dict[str, Path], found: list[Import]) -> list[list[str]]:
    """Import cycles between modules. A package's ``__init__`` only counts where it is
    imported by name.
    """
    graph: dict[str, set[str]] = {m: set() for m in known}
    for each in found:
        if each.target in known and each.target != each.module:
            graph[each.module].add(each.target)
    state: dict[str, int] = {}
    result: list[list[str]] = []

    def visit(m: str, path: list[str]) -> None:
        state[m] = 1
        for to in sorted(graph[m]):
            if state.get(to) == 1:
                result.append([*path[path.index(to) :], to])
            elif to not in state:
                visit(to, [*path, to])
        state[m] = 2

    for m in graph:
        if m not in state:
            visit(m, [m])
    return result


def test_the_package_keeps_its_layers() -> None:
    bad = offences(PACKAGE)
    assert not bad, "\n" + "\n".join(bad)


PLANTED = {
    "upwards": ("_core/rows/rows.py", "from ..engine import plan\n"),
    "inside a function": ("_core/calls/keywords.py", "def f():\n    from ..rows import rows\n"),
    "private name of another folder": (
        "_core/engine/plan.py",
        "from ..calls.keywords import _check\n",
    ),
    "cycle": ("_core/rows/groups.py", "from .rows import Rows\n"),
    "no layer": ("something.py", "x = 1\n"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_offence_is_found(kind: str, tmp_path: Path) -> None:
    """The test above can fail: a copy of the sources with one wrong line has a
    violation of its kind.
    """
    copy = tmp_path / PACKAGE.name
    for path in PACKAGE.rglob("*.py"):
        to = copy / path.relative_to(PACKAGE)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(path.read_text())
    name, line = PLANTED[kind]
    path = copy / name
    path.write_text((path.read_text() if path.exists() else "") + line)
    assert any(text.startswith(kind) for text in set(offences(copy)) - set(offences(PACKAGE)))


@pytest.mark.parametrize("old", MOVED)
def test_an_old_import_path_says_the_new_one(old: str) -> None:
    """Of a folder that is gone, the folder's new name: Python looks for it first."""
    folder = old.split(".")[0]
    with pytest.raises(
        ModuleNotFoundError, match=f"is now reweight_ops.({MOVED[old]}|{MOVED.get(folder)})"
    ):
        importlib.import_module(f"reweight_ops.{old}")
    assert importlib.util.find_spec(f"reweight_ops.{MOVED[old]}") is not None
