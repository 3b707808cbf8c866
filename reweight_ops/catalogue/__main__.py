"""``python -m reweight_ops.catalogue [--check]``: write ``docs/methods.md``, or say that it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import reweight_ops  # noqa: F401  registers every entry

from .table import markdown

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def main(arguments: list[str]) -> int:
    text = markdown()
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'fresh' if fresh else 'stale: run python -m reweight_ops.catalogue'}")
        return 0 if fresh else 1
    if arguments:
        print(f"unknown arguments {arguments}; expected none, or --check")
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
