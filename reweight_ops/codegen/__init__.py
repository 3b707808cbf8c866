"""One definition, every backend: trace a formula, differentiate it, compose a loss, interpret it or print it.

``python -m reweight_ops.codegen`` rewrites ``csrc/common/rules.inc`` from the package's rules and weights; with ``--check`` it
writes nothing and exits 1 if it is stale.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def generated_files() -> dict[Path, str]:
    """Path (relative to the repository) and text of each generated file."""
    from .cpp import rules_inc

    return {Path("csrc/common/rules.inc"): rules_inc()}


def stale_files(root: Path = ROOT) -> list[Path]:
    """The generated files below ``root`` that differ from what the rules say now."""
    return [path for path, text in generated_files().items() if not (root / path).is_file() or (root / path).read_text() != text]


def write_atomically(path: Path, text: str) -> None:
    """Other processes see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        file.write(text)
    temporary.chmod(0o644)
    temporary.replace(path)
