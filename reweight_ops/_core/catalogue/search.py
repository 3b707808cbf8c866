"""Search the catalogue: by name, by an acronym as its paper prints it, by title, by
arXiv id, or by words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidCall
from ..ranges import ranged
from .keys import key, names, words
from .left_out import LEFT_OUT
from .recipes import RECIPES, recipes_of
from .registry import CATALOGUE, KINDS, TRAINERS_NAMES, Entry

#: A shorter word must match a whole word: "ar" is in every other title.
_LEAST_PREFIX = 4

#: The keys of an entry that a text may match, the surest first.
_RANKS = (
    ("name",),
    ("arXiv id", "title", "full name", "acronym", "another name"),
    ("initials",),
)


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    ``call`` is the expression to write, empty for a method that the package leaves out.
    ``why`` tells what has matched.
    """

    call: str
    full_name: str
    paper: str
    arxiv: str
    why: str

    def __repr__(self) -> str:
        source = f"{self.paper}, arXiv:{self.arxiv}" if self.arxiv != "unknown" else self.paper
        return f"{self.call or 'left out'}: {self.full_name}. {source}. [{self.why}]"


def entries(kind: str | None = None) -> list[Entry]:
    """Return all entries, or those of a kind, in the catalogue's order."""
    if kind is not None and kind not in KINDS:
        raise InvalidCall(f"find: kind is {kind!r}; the kinds are: {', '.join(KINDS)}.")
    return [entry for k in (KINDS if kind is None else (kind,)) for entry in CATALOGUE[k].values()]


def exact(text: str, kind: str | None = None) -> list[tuple[Entry, str]]:
    """Return the entries that a text names exactly, with the kind of the match.

    These are the entries with that name, if any. Otherwise they are those with that id,
    title or acronym, then those with these initials, then those with that class name.
    """
    wanted = key(text)
    matches = [
        (entry, why) for entry in entries(kind) for name, why in names(entry) if name == wanted
    ]
    if not matches:
        return [
            (entry, "class") for entry in entries(kind) if key(entry.function.__name__) == wanted
        ]
    surest = next((rank for rank in _RANKS if any(why in rank for _, why in matches)), ())
    return list(
        {entry.call: (entry, why) for entry, why in reversed(matches) if why in surest}.values()
    )[::-1]


@ranged
def find(text: str, kind: str | None = None) -> list[Hit]:
    """Find entries of the catalogue, the surest first.

    Names, acronyms, titles and arXiv ids come first, then words, then spelling.

    Args:
        text: ``"AR"``, ``"GRPO-λ"``, ``"2505.12929"``, the title of a paper, or a few
            words of it, in any case.
        kind: only entries of this kind: ``"policy_loss"``, ``"token_weight"``,
            ``"advantage"``, ``"reward"``, ``"objective"``, ``"sample_weight"``,
            ``"pair_loss"``, ``"divergence"`` or ``"schedule"``.

    Returns:
        Hits. ``hit.call`` is the expression to write, and ``hit.why`` tells what has
            matched. After an entry that was found by its paper come the other entries
            of that paper, and then its recipes. A recipe that alone has the name is the
            first hit. A method that the package leaves out is a hit without a call, and
            its ``full_name`` says why; it is the first if no entry has that name. If
            nothing matches, the hits are the nearest spellings, or none.

    Raises:
        InvalidCall: the text has no letters or digits, or there is no such kind.

    Example:
        >>> import reweight_ops as rw
        >>> [hit.call for hit in rw.find("AR", "token_weight")]
        ['rw.weights.AdvantageReweighting']
        >>> [hit.call for hit in rw.find("AAPO")]
        ['rw.advantages.aapo', "rw.recipe('aapo')"]
        >>> rw.find("2506.12542")[0].why
        'arXiv id'
    """
    if not key(text):
        raise InvalidCall(
            f"find: {text!r} has nothing to search for; give a name, an acronym, a title, an "
            "arXiv id or words."
        )
    found = exact(text, kind)
    named = [r for r in RECIPES.values() if kind is None and key(r.name) == key(text)]
    recipe_first = bool(named) and not found
    papers = {entry.paper for entry, _ in found} | {r.paper for r in named}
    found += [(entry, "the same paper") for entry in entries(kind) if entry.paper in papers]
    of_papers = [entry for entry, _ in found]
    found += _by_words(text, kind)
    hits = _hits(found)
    if kind is None:
        of_recipes = [
            Hit(
                f"rw.recipe({r.name!r})",
                "everything that the paper trains with",
                r.paper,
                r.arxiv,
                "a recipe",
            )
            for r in {r.name: r for r in [*named, *recipes_of(of_papers)]}.values()
        ]
        hits = of_recipes + hits if recipe_first else hits + of_recipes
        left_out = _left_out(text)
        first = [] if of_papers else [hit for hit in left_out if hit.why == "name"]
        hits = first + hits + [hit for hit in left_out if hit not in first]
    return hits or _hits(_by_spelling(text, kind))


def entry_of(name: str, kind: str) -> Entry:
    """Return the entry of that kind and name. If there is none, the error says what was
    probably meant.
    """
    if name in CATALOGUE[kind]:
        return CATALOGUE[kind][name]
    raise InvalidCall(
        f"no {kind.replace('_', ' ')} {name!r}. {_hint(name, kind, lambda entry: entry.name)} "
        f"The names are: {', '.join(sorted(CATALOGUE[kind]))}."
    )


def published_names(kind: str) -> Callable[[str], Any]:
    """Return a namespace's ``__getattr__``.

    Everything that the catalogue lists under the namespace, classes too, is an
    attribute by that name. The error for another name says what was probably meant.
    """
    where = KINDS[kind][0]

    def attribute(name: str) -> Any:
        if name in CATALOGUE[kind]:
            return CATALOGUE[kind][name].function
        private = name.startswith("_")  # Python asks for these, no user
        hint = "" if private else f". {_hint(name, kind, lambda entry: entry.function.__name__)}"
        raise AttributeError(f"{where} has no attribute {name!r}{hint}")

    return attribute


def _hint(name: str, kind: str, shown: Callable[[Entry], str]) -> str:
    """What was probably meant by a name that no entry of that kind has."""
    elsewhere = [entry for entry, _ in exact(name)] if key(name) else []
    near = [
        entry for entry, _ in exact(name, kind) or ([] if elsewhere else _by_spelling(name, kind))
    ]
    if name in TRAINERS_NAMES.get(kind, {}):
        return f"That is a trainer's name: write {TRAINERS_NAMES[kind][name]}."
    if near:
        return f"Did you mean {shown(near[0])!r}?"
    if elsewhere and elsewhere[0].kind == "token_weight":
        return (
            f"{elsewhere[0].call} is a weight: add it to a loss, "
            f"spec=rw.methods.grpo().with_weight({elsewhere[0].call}(...))."
        )
    if elsewhere:
        return (
            f"{elsewhere[0].call} is {_a(elsewhere[0].kind.replace('_', ' '))}: "
            f"{KINDS[elsewhere[0].kind][1]}."
        )
    return f"rw.find({name!r}) searches papers and docstrings."


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _hits(found: Iterable[tuple[Entry, str]]) -> list[Hit]:
    first: dict[str, Hit] = {}
    for entry, why in found:
        first.setdefault(
            entry.call, Hit(entry.call, entry.full_name, entry.paper, entry.arxiv, why)
        )
    return list(first.values())


def _has(wanted: Iterable[str], text: str) -> bool:
    there = set(words(text))
    return all(
        word in there or (len(word) >= _LEAST_PREFIX and any(w.startswith(word) for w in there))
        for word in wanted
    )


def _by_words(text: str, kind: str | None) -> list[tuple[Entry, str]]:
    wanted = words(text)
    titles = [
        (e, "words") for e in entries(kind) if _has(wanted, f"{e.name} {e.full_name} {e.paper}")
    ]
    return titles + [
        (e, "mentioned in its docstring") for e in entries(kind) if _has(wanted, e.formula)
    ]


def _by_spelling(text: str, kind: str | None) -> list[tuple[Entry, str]]:
    # An entry with that name comes before entries whose paper's title has it.
    called = {
        name: entry
        for which in ("acronym", "name")
        for entry in reversed(entries(kind))
        for name, why in names(entry)
        if why == which
    }
    return [
        (called[name], "the nearest spelling")
        for name in difflib.get_close_matches(key(text), called, n=3, cutoff=0.75)
    ]


def _left_out(text: str) -> list[Hit]:
    """Return the methods without an entry. A line of them names several."""
    wanted, named = words(text), key(text)
    return [
        Hit("", reason, title, "unknown", "name" if named in _parts(title) else "words")
        for title, reason in LEFT_OUT.items()
        if _has(wanted, title)
    ]


def _parts(title: str) -> tuple[str, ...]:
    return tuple(key(part) for part in re.split("[,;:()]", title))
