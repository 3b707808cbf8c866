"""The names of an entry of the catalogue: its name, the acronyms that its paper prints,
its title and its arXiv id.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Protocol

from .other_names import OTHER_NAMES

_SPELT = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "λ": "lambda",
    "μ": "mu",
    "ξ": "xi",
    "τ": "tau",
    "*": "star",
}
#: A beginning of a title (up to its colon) with more words than this is not an acronym.
_MOST_WORDS = 3


class Named(Protocol):
    """The fields of an entry by which the registry is searched."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def full_name(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def arxiv(self) -> str: ...


def key(text: str) -> str:
    """Return the letters and digits of a text in lower case, with Greek letters and the
    star spelt out.

    ``GRPO-λ`` is ``grpolambda``, ``A*-PO`` is ``astarpo``, and ``Vc-PPO`` is ``vcppo``.

    >>> key("GRPO-λ"), key("arXiv:2505.12929")
    ('grpolambda', '250512929')
    """
    text = re.sub(r"^(https?://)?(www\.)?arxiv(\.org/(abs|pdf)/|:)", "", text.strip().casefold())
    return "".join(_SPELT.get(c, c) for c in text if c.isalnum() or c in _SPELT)


@functools.lru_cache(maxsize=4096)  # a search splits the docstring of every entry
def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, as keys.

    >>> words("Low-probability tokens, GRPO-λ")
    ('low', 'probability', 'tokens', 'grpo', 'lambda')
    """
    return tuple(key(word) for word in re.findall(r"\w+", text.replace("_", " ")))


def _head(text: str) -> str:
    """Return a title up to its colon, comma, bracket or dash."""
    return re.split(r"[:(,]| - ", text)[0].strip()


def _acronyms(entry: Named) -> Iterator[str]:
    """Yield acronyms as papers print them, in brackets or before a colon."""
    for bracket in re.findall(r"\(([^)]*)\)", entry.full_name):
        yield from re.split(r"[,;]", bracket)
    yield from (
        head
        for head in (_head(entry.full_name), _head(entry.paper))
        if len(words(head)) <= _MOST_WORDS
    )


def _initials(entry: Named) -> Iterator[str]:
    """Yield initials of spelt-out names, and of the capitalised words with which a
    title begins: Robust Mean Teacher for ... is RMT.
    """
    for text in (entry.full_name, entry.paper):
        parts = re.findall(r"\w+", _head(text))
        capitals = list(itertools.takewhile(lambda part: part[0].isupper(), parts))
        yield from (
            "".join(part[0] for part in some) for some in (parts, capitals) if len(some) > 1
        )


def names(entry: Named) -> Iterator[tuple[str, str]]:
    """Yield every key of an entry with its kind, the surest first."""
    yield key(entry.name), "name"
    if entry.arxiv != "unknown":
        yield key(entry.arxiv), "arXiv id"
    yield key(entry.paper), "title"
    yield key(entry.full_name), "full name"
    yield from ((key(acronym), "acronym") for acronym in _acronyms(entry) if key(acronym))
    others = OTHER_NAMES.get((entry.kind, entry.name), ())
    yield from ((key(other), "another name") for other in others)
    yield from ((key(initials), "initials") for initials in _initials(entry))
