"""The per-token formulas of every loss, each written once: surrogates, likelihood terms
and penalties.

:mod:`.base` tells how a user adds one.
"""

from .._core.formula.base import LEAVES, RULES, WEIGHTS, Rule, TokenWeight, rule, weight
from . import likelihood as likelihood
from . import off_policy as off_policy
from . import on_policy_kl as on_policy_kl
from . import penalties as penalties
from . import surrogates as surrogates

__all__ = ["LEAVES", "RULES", "WEIGHTS", "Rule", "TokenWeight", "rule", "weight"]
