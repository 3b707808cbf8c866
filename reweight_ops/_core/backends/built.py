"""setup.py's record of the parts that it did not build. pip does not show that.

This module imports nothing of the package, because setup.py reads this file too.
"""

from __future__ import annotations

import json
from pathlib import Path

_NAME = "_build.json"
_PACKAGE = Path(__file__).resolve().parents[2]


def remember(package: Path, missing: dict[str, str]) -> None:
    """Write the names of the modules that were not built, and why, beside the modules
    of ``package``.
    """
    package.mkdir(parents=True, exist_ok=True)
    (package / _NAME).write_text(json.dumps(missing, indent=1) + "\n")


def why_missing(module: str, error: ImportError) -> str:
    """Return why a module of the package cannot be imported: the reason recorded at its
    build, else the text of the import error.
    """
    try:
        missing: dict[str, str] = json.loads((_PACKAGE / _NAME).read_text())
    except (OSError, ValueError):
        missing = {}
    return f"not built: {missing[module]}" if module in missing else str(error)
