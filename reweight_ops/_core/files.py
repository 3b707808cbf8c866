"""Files that other processes may read at the same time."""

from __future__ import annotations

import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Other processes see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        file.write(text)
    temporary.chmod(0o644)
    temporary.replace(path)
