"""Writes the generated file: the catalogue ``docs/methods.md`` from its registry.

``python -m reweight_ops.codegen``; with ``--check`` it writes nothing and exits 1 if it is stale.
"""

from __future__ import annotations

from pathlib import Path

from .._core.catalogue.table import markdown

ROOT = Path(__file__).resolve().parents[2]


def generated_files() -> dict[Path, str]:
    """Path (relative to the repository) and text of each generated file."""
    return {Path("docs/methods.md"): markdown()}


def stale_files(root: Path = ROOT) -> list[Path]:
    """The generated files below ``root`` that differ from what the rules say now."""
    return [path for path, text in generated_files().items() if not (root / path).is_file() or (root / path).read_text() != text]
