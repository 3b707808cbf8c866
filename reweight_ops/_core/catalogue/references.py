"""The paper of an entry at the end of its docstring, from the one place that says which it is."""

from __future__ import annotations

import inspect

_HEADING = "References:"


def with_reference(doc: str | None, paper: str, arxiv: str) -> str:
    """A docstring and its paper. A function of several entries has several papers, each once."""
    text = inspect.cleandoc(doc or "")
    line = f"    {paper}." if arxiv == "unknown" else f"    {paper}. arXiv:{arxiv}, https://arxiv.org/abs/{arxiv}"
    if line in text.splitlines():
        return text
    return f"{text}\n{line}" if _HEADING in text.splitlines() else f"{text}\n\n{_HEADING}\n{line}"
