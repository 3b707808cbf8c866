"""A program's Triton function.

It is printed once, kept as a module in a cache folder (Triton compiles from source
files), and imported once. The folder is ``REWEIGHT_OPS_CACHE``, or else
``reweight_ops`` in the platform's cache folder. The name of a file is the hash of its
text. Files are written atomically and never changed, so any number of processes may
share the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import write_atomically
from ..formula.loss_program import ONE_PASS, Program
from ..formula.monitor import Monitor
from ..formula.triton import monitor_py, program_py


def cache_folder() -> Path:
    if named := os.environ.get("REWEIGHT_OPS_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "reweight_ops"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/reweight_ops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reweight_ops"


def load_source(text: str, folder: Path) -> ModuleType:
    """Return the module with this text, from ``folder/programs/<hash>.py``."""
    name = f"reweight_ops_program_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    path = folder / "programs" / f"{name}.py"
    # A file that a crash or a full disk left short would fail forever. The text is
    # compared, and the name is not trusted.
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # the loader would trust bytecode that a crash left short
    exec(compile(text, str(path), "exec"), module.__dict__)
    sys.modules[name] = module
    return module


_functions: dict[Any, Any] = {}


def program_function(
    program: Program, given_ratio: bool = False, outputs: tuple[str, ...] = ONE_PASS
) -> Any:
    """Return the ``@triton.jit`` function of a program."""
    what = (program, given_ratio, outputs)
    if what not in _functions:
        _functions[what] = load_source(program_py(*what), cache_folder()).program
    return _functions[what]


def monitor_function(monitor: Monitor) -> Any:
    """Return the ``@triton.jit`` function that evaluates a row's metrics."""
    if monitor not in _functions:
        _functions[monitor] = load_source(monitor_py(monitor), cache_folder()).program
    return _functions[monitor]
