"""Recipes: everything that one paper trains with, from rewards to the loss.
:func:`recipe` finds one; ``docs/recipes.md`` lists them.
"""

from __future__ import annotations

from .._core.catalogue.lookup import recipe
from .._core.catalogue.recipes import QUANTITIES, RECIPES, STAGES, Recipe, Setting, register
from . import estimators, likelihood, off_policy, pairs, rewards, tokens

register(*tokens.ALL, *estimators.ALL, *rewards.ALL, *likelihood.ALL, *off_policy.ALL, *pairs.ALL)

__all__ = ["QUANTITIES", "RECIPES", "STAGES", "Recipe", "Setting", "recipe", "register"]
