"""Errors for options of a method that its mode, or a trainer's chosen loss, does not
read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...errors import InvalidCall


def forbid_unused(
    op: str,
    function: Callable[..., Any],
    given: dict[str, Any],
    chosen: str,
    reads: dict[str, bool],
) -> None:
    """Raise for an option in ``given`` that ``chosen`` does not read and that differs
    from ``function``'s default.

    Callers list what is given: PyTorch 2.10 and 2.11 compile no ``locals()``.
    """
    parameters = inspect.signature(function).parameters
    for name, is_read in reads.items():
        value, default = given[name], parameters[name].default
        if not is_read and (isinstance(value, Tensor) or value != default):
            raise InvalidCall(f"{op}: {name} has no effect with {chosen}: leave it out.")
