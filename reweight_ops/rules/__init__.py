"""The per-token maths of every loss, each formula once. Surrogates, likelihood terms, penalties, and how a user adds one: :mod:`.base`."""

from .._core.formula.base import LEAVES, RULES, WEIGHTS, Rule, TokenWeight, rule, weight
from . import likelihood as likelihood
from . import off_policy as off_policy
from . import on_policy_kl as on_policy_kl
from . import penalties as penalties
from . import surrogates as surrogates

__all__ = ["LEAVES", "RULES", "WEIGHTS", "Rule", "TokenWeight", "rule", "weight"]
