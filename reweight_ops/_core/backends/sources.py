"""Tells whether a compiled extension was built from the sources beside the package.

This module imports nothing of the package, because setup.py reads this file too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parents[3] / "csrc"


def source_hash(part: str, csrc: Path = CSRC) -> str | None:
    """Hash all C++ and CUDA sources of ``part`` (``cpu`` or ``cuda``), by name and
    text.

    Return None in an installation without sources.
    """
    if not (csrc / part).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(
        [*csrc.glob("bindings.*"), *(csrc / "common").iterdir(), *(csrc / part).iterdir()]
    ):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
