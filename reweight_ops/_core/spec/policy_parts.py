"""The parts of a policy loss's spec, for the modules that check them and that find what
follows from them. The spec imports these modules.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..formula.base import Rule, TokenWeight
from .ratio import Ratio
from .reduction import Reduction


class SpecParts(Protocol):
    """The parts of a policy loss's spec; see ``PolicyLossSpec``."""

    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def penalties(self) -> tuple[Any, ...]: ...
    @property
    def weights(self) -> tuple[TokenWeight, ...]: ...
    @property
    def weights_of_reductions(self) -> tuple[TokenWeight, ...]: ...
    @property
    def all_weights(self) -> tuple[TokenWeight, ...]: ...
    @property
    def ratio(self) -> Ratio: ...
    @property
    def reduction(self) -> Reduction: ...
    @property
    def reductions(self) -> tuple[Reduction, ...]: ...
