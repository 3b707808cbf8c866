"""What an entry's docstring says before its arguments, as Markdown: formulas and names
are code, which the site draws as formulas.
"""

from __future__ import annotations

import re
from typing import Any

from .registry import Entry

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(?:[\w.]*\.)?(\w+)`")
_AFTER = ("Ranges:", "Args:", "Returns:", "Raises:", "References:", "Example", ">>>")


def entry_text(entry: Entry) -> str:
    """One item of a list; a loss that has no formula of its own says that
    of its parts."""
    text = prose(entry.formula)
    if entry.kind == "policy_loss" and not _has_formula(text[0]):
        text[0] += " " + " ".join(_part(part) for part in _parts(entry.build()))
    return (
        f'- <a id="{anchor(entry)}"></a>**`{entry.call}`** (*{entry.paper}*): '
        + "\n\n    ".join(text)
    )


def anchor(entry: Entry) -> str:
    """Of the item, on the page."""
    return entry.call.removeprefix("rw.")


def prose(docstring: str) -> list[str]:
    """The paragraphs, each on one line, without examples."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if paragraph.startswith(_AFTER):
            break
        if not paragraph.startswith("    ") and not paragraph.rstrip().endswith("::"):
            paragraphs.append(_ROLE.sub(r"`\1`", " ".join(paragraph.split())).replace("``", "`"))
    return paragraphs


def _has_formula(text: str) -> bool:
    return any(re.search(r"[·^²]| [-+<>=] |^-", code) for code in re.findall(r"`([^`]+)`", text))


def _parts(spec: Any) -> list[tuple[str, Any]]:
    """The surrogate, and what multiplies it."""
    return [("Surrogate", spec.surrogate), *(("Weight", weight) for weight in spec.weights)]


def _part(part: tuple[str, Any]) -> str:
    role, value = part
    return (
        f"{role} `{type(value).__name__}`: {prose(type(value).__doc__ or '')[0].removesuffix('.')}."
    )
