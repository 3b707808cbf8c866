"""The signature that ``inspect.signature`` and ``help`` show of a function with
``**keywords: Unpack[SomeKeywords]``.

It has every keyword with its type and default.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

#: The defaults of all records of keywords. The modules of the records fill it.
DEFAULTS: dict[str, Any] = {}


def written_out(function: Callable[..., Any]) -> inspect.Signature:
    """Return the function's signature with the keywords of its ``TypedDict`` in place
    of ``**keywords``.
    """
    signature = inspect.signature(function)
    found: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        match = (
            re.search(r"Unpack\[(\w+)\]", str(parameter.annotation))
            if parameter.kind is parameter.VAR_KEYWORD
            else None
        )
        if match is None:
            found.append(parameter)
            continue
        keywords = vars(sys.modules[function.__module__])[match[1]]
        for name, kind in keywords.__annotations__.items():
            annotation = getattr(kind, "__forward_arg__", kind)
            found.append(
                inspect.Parameter(
                    name, parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=annotation
                )
            )
    return signature.replace(parameters=found)


def collected_by(function: Callable[..., Any]) -> frozenset[str]:
    """Return the keywords that :func:`written_out` shows and that are not the
    function's own parameters.
    """
    original = inspect.unwrap(function)
    if not inspect.isfunction(original):
        return frozenset()
    code = original.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return frozenset(inspect.signature(function).parameters) - frozenset(own)
