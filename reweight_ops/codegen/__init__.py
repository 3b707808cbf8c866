"""Writes the generated files: ``docs/methods.md`` from the catalogue's registry, ``docs/recipes.md`` from the recipes'.

``python -m reweight_ops.codegen``; with ``--check`` it writes nothing and exits 1 if one is stale.
"""

from __future__ import annotations

from pathlib import Path

from .._core.catalogue.recipe_page import recipes_markdown
from .._core.catalogue.table import markdown

ROOT = Path(__file__).resolve().parents[2]


def generated_files() -> dict[Path, str]:
    """Path (relative to the repository) and text of each generated file."""
    return {Path("docs/methods.md"): markdown(), Path("docs/recipes.md"): recipes_markdown()}


def stale_files(root: Path = ROOT) -> list[Path]:
    """The generated files below ``root`` that differ from what the rules say now."""
    return [path for path, text in generated_files().items() if not (root / path).is_file() or (root / path).read_text() != text]
