"""Compare two result files: the cases that both have, and how much faster the second
is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import rows_of


def timed(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (e["name"], r["provider"]): r for e in document["cases"] for r in rows_of(e) if "ms" in r
    }


def compare(first: tuple[Path, dict[str, Any]], second: tuple[Path, dict[str, Any]]) -> list[str]:
    """One line for each provider of each case that both files have. A file is its path
    and what is in it.

    Cases of only one file are counted and never dropped silently. The ratio is the
    first file's time over the second's. Times of two machines compare those machines:
    the header names both. The share of the limit belongs to each file.
    """
    files = (first, second)
    a, b = (timed(document) for _, document in files)
    lines = [
        f"{label} {path}: {describe(document)}"
        for label, (path, document) in zip("AB", files, strict=True)
    ]
    both = [key for key in a if key in b]
    if not both:
        return [*lines, "They have no provider of a case in common."]
    case, who = (max(len(key[i]) for key in both) for i in (0, 1))
    lines.append(
        f"{'case':<{case}}  {'provider':<{who}}  {'A ms':>10} {'of limit':>8}  {'B ms':>10} "
        f"{'of limit':>8}  {'A/B':>6}"
    )
    for key in both:
        x, y = a[key], b[key]
        figures = (
            f"{x['ms']:>10.3f} {x['of_limit']:>8.2f}  {y['ms']:>10.3f} "
            f"{y['of_limit']:>8.2f}  {x['ms'] / y['ms']:>6.2f}"
        )
        lines.append(f"{key[0]:<{case}}  {key[1]:<{who}}  {figures}")
    alone = [len(set(one) - set(other)) for one, other in ((a, b), (b, a))]
    return [*lines, f"only in A: {alone[0]}, only in B: {alone[1]}"]


def describe(document: dict[str, Any]) -> str:
    m = document["machine"]
    pages = "huge pages" if m["huge_pages"] else "default pages"
    return (
        f"{m['processor']}, {m['threads']} threads, {pages}, torch {m['torch']}, commit "
        f"{m['commit']}, {m['date'][:10]}"
    )
