"""The per-token formulas of every loss, each written once: surrogates, likelihood terms
and penalties.

:mod:`.base` tells how a user adds one.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .._core.formula.base import RULES, TOKEN_FIELDS, WEIGHTS, Rule, TokenWeight, rule, weight
from .._core.names import renamed as _renamed
from . import likelihood as likelihood
from . import off_policy as off_policy
from . import on_policy_kl as on_policy_kl
from . import penalties as penalties
from . import surrogates as surrogates

__all__ = ["RULES", "TOKEN_FIELDS", "WEIGHTS", "Rule", "TokenWeight", "rule", "weight"]

if not _TYPE_CHECKING:  # which would take any name for one
    __getattr__ = _renamed(__name__, {"LEAVES": "TOKEN_FIELDS"})
