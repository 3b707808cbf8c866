"""Appends the paper of an entry to its docstring."""

from __future__ import annotations

import inspect

_HEADING = "References:"


def with_reference(doc: str | None, paper: str, arxiv: str) -> str:
    """Return a docstring with its paper.

    A function of several entries has several papers, each once.
    """
    text = inspect.cleandoc(doc or "")
    line = (
        f"    {paper}."
        if arxiv == "unknown"
        else f"    {paper}. arXiv:{arxiv}, https://arxiv.org/abs/{arxiv}"
    )
    if line in text.splitlines():
        return text
    if _HEADING not in text.splitlines():
        return f"{text}\n\n{_HEADING}\n{line}"
    before, _, after = text.partition(f"{_HEADING}\n")
    papers, *others = after.split("\n\n", 1)
    return "\n\n".join([f"{before}{_HEADING}\n{papers}\n{line}", *others])
