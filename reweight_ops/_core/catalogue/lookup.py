"""A recipe by name, acronym, title or arXiv id."""

from __future__ import annotations

import difflib

from ...errors import InvalidCall
from ..ranges import ranged
from .keys import key
from .recipes import RECIPES, Recipe, recipes_of
from .search import exact


@ranged
def recipe(name: str) -> Recipe:
    """Return everything that one paper needs, in one record.

    It is found by the recipe's name, or by anything that leads to its paper.

    Args:
        name: ``"hapo"``, or an acronym, a title or an arXiv id as
            :func:`reweight_ops.find` takes them, in any case.

    Returns:
        The recipe. Its :meth:`~Recipe.to_own_loop` is a training loop.

    Raises:
        InvalidCall: nothing has this name, or the paper has several recipes. The
            message has their names.

    Example:
        >>> import reweight_ops as rw
        >>> rw.recipe("ar_lopti").spec[:40]
        'rw.schedules.lopti(eta=0.5, alpha=0.3, e'
    """
    named = [each for each in RECIPES.values() if key(each.name) == key(name)]
    found = named or recipes_of([entry for entry, _ in exact(name)])
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidCall(
            f"{found[0].paper!r} has several recipes: {', '.join(each.name for each in found)}."
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), RECIPES, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise InvalidCall(f"no recipe {name!r}. {hint}The names are: {', '.join(sorted(RECIPES))}.")
