"""What setup.py remembers of a part that it did not build: pip keeps that to itself. Imports nothing of the package: setup.py reads this file too."""

from __future__ import annotations

import json
from pathlib import Path

_NAME = "_build.json"
_PACKAGE = Path(__file__).resolve().parents[2]


def remember(package: Path, missing: dict[str, str]) -> None:
    """Beside the modules of ``package``: the names of those that were not built, and why."""
    package.mkdir(parents=True, exist_ok=True)
    (package / _NAME).write_text(json.dumps(missing, indent=1) + "\n")


def why_missing(module: str, error: ImportError) -> str:
    """Why a module of the package cannot be imported: what was remembered at its build, else the import's own words."""
    try:
        missing: dict[str, str] = json.loads((_PACKAGE / _NAME).read_text())
    except (OSError, ValueError):
        missing = {}
    return f"not built: {missing[module]}" if module in missing else str(error)
