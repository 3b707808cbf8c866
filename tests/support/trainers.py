"""Imports trainers that are not in the test environment from build/trainers (``make
trainers``).

Stand-ins replace the packages that a trainer only names. A stand-in exists only during
the trainer's import, so that no other library takes it for installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from paths import ROOT

FOLDER = Path(os.environ.get("REWEIGHT_OPS_TRAINERS", ROOT / "build" / "trainers"))


class _StandIn(types.ModuleType):
    """A module in which every attribute exists."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the named packages, and everything below them, as stand-ins. It comes last,
    so that an installed package is found first.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name, path, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] in self.names
            else None
        )

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    finder = _Finder(names)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [
            n
            for n, module in sys.modules.items()
            if isinstance(module, _StandIn) and n.split(".")[0] in names
        ]:
            del sys.modules[name]


def on_path() -> None:
    """Make the trainers of build/trainers importable, after everything that is
    installed.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def trainer(package: str, *modules: str, missing: tuple[str, ...] = ()) -> list[types.ModuleType]:
    """Import the named modules of a trainer; skip the test module, with the reason, if
    the package is missing.
    """
    on_path()
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            f"{package} is not installed: make trainers puts it into build/trainers",
            allow_module_level=True,
        )
    with stand_ins(*missing):
        return [importlib.import_module(name) for name in modules]
