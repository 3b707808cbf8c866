"""What mypy's stubtest says of the stubs that the package ships."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: pybind11 gives its classes a metaclass and a marker. ``test_stubs.py`` compares their
#: methods with pybind11's docstrings.
OF_PYBIND11 = r"is inconsistent, metaclass differs|__pybind11_module_local_\w+ is not present"


@pytest.mark.slow
def test_the_stubs_are_those_of_the_modules():
    """Errors of modules without a stub are about attributes that a decorator sets."""
    modules = ["reweight_ops.methods"]
    if importlib.util.find_spec("reweight_ops._C") is not None:
        modules.append("reweight_ops._C")
    command = [sys.executable, "-m", "mypy.stubtest", *modules]
    out = subprocess.run(
        [*command, "--mypy-config-file", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert re.search(r"checked \d+ modules", out), out
    found = [text for text in out.split("error: ")[1:] if re.search(r"file \S+\.pyi\b", text)]
    assert not [text for text in found if not re.search(OF_PYBIND11, text)]
