"""Entries of the catalogue, and the decorator that registers a function or class as an
entry.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ...errors import InvalidCall
from ..ranges import ranged
from .arguments import with_arguments
from .references import with_reference
from .sections import with_sections
from .signatures import collected_by, written_out
from .tiers import tier_of
from .titles import TITLES

#: The kinds of entries: the namespace, and what its members are.
KINDS = {
    "policy_loss": ("rw.methods", "functions that return the spec of a loss"),
    "token_weight": ("rw.weights", "factors of a loss term, one per token"),
    "advantage": ("rw.advantages", "rewards in, advantages out"),
    "reward": ("rw.rewards", "rewards in, rewards out"),
    "objective": ("rw.objectives", "weights of several rewards or losses, with state"),
    "sample_weight": ("rw.sample_weights", "one weight or choice per sample"),
    "pair_loss": ("rw.preference", "functions that return the spec of a loss of pairs"),
    "divergence": ("rw.divergences", "a second logits tensor, or another normaliser"),
    "schedule": ("rw.schedules", "values that change from step to step"),
}

#: The kinds whose functions return a spec.
_OF_SPECS = ("policy_loss", "pair_loss")

CERTAINTIES = {
    "verified": "the paper's text or the authors' code was read",
    "secondary": "transcribed from a port or from notes on the paper",
    "derived": "no formula was found: ours, after the paper's description",
}

_Published = TypeVar("_Published", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One published method.

    ``function`` is the function or class that a user calls. Its docstring has the
    formula.
    """

    name: str
    full_name: str
    kind: str
    paper: str
    arxiv: str
    certainty: str
    function: Callable[..., Any]
    level: str | None = None
    plan: str | None = None
    #: Values for the arguments without a default, which the paper does not state. Only
    #: ``show``, ``check`` and the table use them.
    example: dict[str, Any] = field(default_factory=dict)

    @property
    def tier(self) -> str:
        """Return one of :data:`TIERS`."""
        return tier_of(self.kind, self.name, self.certainty)

    @property
    def formula(self) -> str:
        """Return the docstring: formula, equation, and differences from the paper."""
        return inspect.getdoc(self.function) or ""

    @property
    def differs(self) -> str | None:
        """Return the sentences after ``Differs from the paper:`` in the docstring."""
        found = re.search(r"Differs from the paper:\s*(.+?)(?:\n\s*\n|\Z)", self.formula, re.DOTALL)
        return None if found is None else " ".join(found[1].split())

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the defaults by parameter name.

        A required parameter has ``inspect.Parameter.empty``. Parameters that ``**``
        collects (group arguments) are not included.
        """
        collected = collected_by(self.function)
        return {
            name: p.default
            for name, p in inspect.signature(self.function).parameters.items()
            if name not in collected
        }

    @property
    def call(self) -> str:
        """Return the expression that a user writes: ``rw.methods.dapo``."""
        return f"{KINDS[self.kind][0]}.{self.function.__name__}"

    def build(self, **options: Any) -> Any:
        """Return the spec that a method returns. Arguments without a default have the
        values of the example.
        """
        return self.function(**{**self.example, **options})


#: The entries by kind and name. Importing the package fills it.
CATALOGUE: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}

#: By kind, the names that trainers have for a loss, and the call that returns it.
TRAINERS_NAMES: dict[str, dict[str, str]] = {"policy_loss": {}, "pair_loss": {}}


def _kind_of_module(module: str) -> str:
    package = __name__.split(".")[0]
    for kind, (where, _) in KINDS.items():
        if f"{module}.".startswith(f"{where.replace('rw', package, 1)}."):
            return kind
    raise InvalidCall(
        f"published: {module} has no kind of its own; the kinds are: {', '.join(KINDS)}."
    )


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _naming_its_spec(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function of a method, whose spec then has the name of its entry.

    The spec is copied, because another method, or the user's code, may hold it.
    """

    @functools.wraps(function)
    def named(*args: Any, **options: Any) -> Any:
        spec = function(*args, **options)
        return spec if spec.name == name else _with_name(spec, name)

    return named


def _with_name(spec: Any, name: str) -> Any:
    """Return a copy with this name."""
    # Older versions of torch.compile trace neither dataclasses.replace nor the copy
    # module, nor vars of a dataclass.
    kind = type(spec)
    fields = {field: getattr(spec, field) for field in kind.__dataclass_fields__ if field != "name"}
    return kind(**fields, name=name)


def published(
    full_name: str,
    *,
    arxiv: str,
    name: str | None = None,
    paper: str | None = None,
    kind: str | None = None,
    certainty: str = "verified",
    level: str | None = None,
    plan: str | None = None,
    example: dict[str, Any] | None = None,
) -> Callable[[_Published], _Published]:
    """Register a function or class. Its hyper-parameters are checked by their
    annotations (:mod:`reweight_ops._core.ranges`).

    The entry's name is that of the function, or the class's in snake_case, unless
    ``name`` gives another. The spec that a method returns gets this name too.

    ``arxiv`` is the id, or ``unknown``, and never invented. ``paper`` is its title,
    unless :mod:`.titles` has it. ``level`` is token, segment, sequence, group, pair,
    ...

    ``kind`` is one of :data:`KINDS`. In the package's own modules it follows from the
    module.
    """
    if kind is not None and kind not in KINDS:
        raise InvalidCall(f"published: kind is {kind!r}; the kinds are: {', '.join(KINDS)}.")
    if certainty not in CERTAINTIES:
        raise InvalidCall(
            f"published: certainty is {certainty!r}; expected one of {', '.join(CERTAINTIES)}."
        )
    if arxiv != "unknown" and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise InvalidCall(
            f"published: arxiv is {arxiv!r}, expected an id like 2505.12929, or 'unknown'."
        )

    if (paper is None) == (arxiv not in TITLES):
        raise InvalidCall(
            f"published: the title of {arxiv} is written once: as paper=, or in "
            "_core/catalogue/titles.py."
        )
    title = TITLES[arxiv] if paper is None else paper

    def register(function: _Published) -> _Published:
        of = kind or _kind_of_module(function.__module__)
        entry_name = name or _snake_case(function.__name__)
        known = CATALOGUE[of].get(entry_name)
        if known is not None and known.function.__module__ != function.__module__:
            raise InvalidCall(
                f"the {of.replace('_', ' ')} {entry_name!r} is taken by "
                f"{known.function.__module__}."
            )
        checked: Any = ranged(function)
        if of in _OF_SPECS:
            checked = _naming_its_spec(checked, entry_name)
        if inspect.isfunction(checked):
            cast(Any, checked).__signature__ = written_out(checked)
        checked.__doc__ = with_reference(
            with_sections(checked, with_arguments(checked, f"{of}/{entry_name}"), of, entry_name),
            title,
            arxiv,
        )
        CATALOGUE[of][entry_name] = Entry(
            entry_name, full_name, of, title, arxiv, certainty, checked, level, plan, example or {}
        )
        return checked  # type: ignore[no-any-return]

    return register
