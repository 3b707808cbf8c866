"""The reference of the documentation site shows what ``help`` shows.

Griffe reads the source. The docstrings of ops and of the catalogue's entries are
completed when the package is imported, so this extension takes them from there. It
writes their sections as Markdown.
"""

import importlib
import inspect
import re
import sys
from typing import Any

from griffe import Extension

#: A heading, and the indented lines below it.
SECTION = re.compile(r"^([A-Z][A-Za-z ]*):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.M)
#: ``name, name (type, default value): what it is``, with names over several lines.
ITEM = re.compile(r"((?:[\w*.]+,\s+)*[\w*.]+)(?: \((.*?)\))?: +(.*)", re.S)
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.M)
ITEMS = ("Args", "Keyword Args", "Attributes", "Raises")
LINES = ("References",)


class RuntimeDocstrings(Extension):
    def on_package(self, *, pkg: Any, **_: Any) -> None:
        importlib.import_module("reweight_ops.testing")
        self.visit(pkg)

    def visit(self, found: Any) -> None:
        for member in found.members.values():
            if member.is_alias:
                continue
            if member.docstring is not None and not member.is_module:
                member.docstring.value = markdown(imported(member) or member.docstring.value)
            self.visit(member)


def imported(found: Any) -> str | None:
    """The docstring of a function or class as it is in the running package."""
    value: Any = sys.modules.get(found.module.path)
    for name in found.path.removeprefix(f"{found.module.path}.").split("."):
        value = inspect.getattr_static(value, name, None)
    if not (inspect.isclass(value) or callable(value) or isinstance(value, property)):
        return None
    return inspect.getdoc(value) if value.__doc__ else None


def markdown(doc: str) -> str:
    return DOCTEST.sub(fenced, SECTION.sub(section, inspect.cleandoc(doc)))


def fenced(match: re.Match[str]) -> str:
    return "\n".join(["```pycon", *(inspect.cleandoc(match[0]).splitlines()), "```"])


def section(match: re.Match[str]) -> str:
    title, text = match[1], inspect.cleandoc(match[2])
    if title in ITEMS:
        text = "\n".join(f"* {item(each)}" for each in entries(text))
    elif title in LINES:
        text = "\n".join(f"* {each}" for each in entries(text))
    return f"**{title}**\n\n{text}\n\n"


def entries(text: str) -> list[str]:
    """Lines at the left, each with the indented ones below it."""
    return [" ".join(each.split()) for each in re.split(r"\n(?=\S)", text) if each.strip()]


def item(text: str) -> str:
    """An argument or error: names as code, then the type, then the text."""
    match = ITEM.fullmatch(text)
    if match is None:
        return text
    names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
    kind = f" (`{match[2]}`)" if match[2] else ""
    return f"{names}{kind}: {match[3]}"
