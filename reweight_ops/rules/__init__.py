"""The per-token maths of every loss, each formula once. Surrogates, likelihood terms, penalties, and how a user adds one: :mod:`.base`."""

from . import likelihood as likelihood
from . import penalties as penalties
from . import surrogates as surrogates
from .base import LEAVES, RULES, WEIGHTS, Rule, TokenWeight, rule, weight

__all__ = ["LEAVES", "RULES", "WEIGHTS", "Rule", "TokenWeight", "rule", "weight"]
