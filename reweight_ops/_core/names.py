"""Suggestions for the name of a hyper-parameter that a method, rule or weight does not
have.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

#: Other libraries' names of a hyper-parameter, and its names here.
_CLIP = ("epsilon_low", "epsilon_high")
ALIASES = {
    "epsilon": _CLIP,
    "eps": _CLIP,
    "clip_eps": _CLIP,
    "eps_clip": _CLIP,
    "clip_range": _CLIP,
    "cliprange": _CLIP,
    "clip_ratio": _CLIP,
    "clip_ratio_low": ("epsilon_low",),
    "eps_low": ("epsilon_low",),
    "clip_ratio_high": ("epsilon_high",),
    "eps_high": ("epsilon_high",),
    "kl_coef": ("beta",),
    "kl_beta": ("beta",),
    "kl_loss_coef": ("beta",),
    "entropy_coeff": ("entropy_coef",),
    "ent_coef": ("entropy_coef",),
    "head": ("softmax",),
    "coefs": ("derivatives",),
    "weights": ("row_weights",),
    "tau": ("temperature", "tau_pos"),
    "max_completion_length": ("horizon",),
    "top_entropy_quantile": ("fraction",),
}


def unexpected(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """Return the error for an unknown keyword. It has the keyword's name here, or the
    nearest name, or all names.
    """
    known = tuple(known)
    here = [alias for alias in ALIASES.get(name, ()) if alias in known]
    near = difflib.get_close_matches(name, known, n=1)
    if here:
        hint = f"Here it is {' and '.join(here)}."
    elif near:
        hint = f"Did you mean {near[0]}?"
    else:
        hint = f"It takes {', '.join(known)}." if known else "It takes none."
    return TypeError(f"{owner}() got an unexpected keyword argument {name!r}. {hint}")


def with_own_keywords(function: T) -> T:
    """The function, with the error of :func:`unexpected` for a keyword that it does not
    have.
    """
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if not known.issuperset(keywords):
            owner = function.__qualname__.removesuffix(".__new__")
            raise unexpected(owner, min(keywords.keys() - known), known - {"_cls"})
        return function(*args, **keywords)

    return checked  # type: ignore[return-value]


#: Attributes of results.
_ATTRIBUTES = {"why_not_one_pass": "one_pass_unsupported_reason"}


def renamed_attribute(owner: Any, name: str) -> Any:
    """What ``__getattr__`` of a result returns: the attribute that had this name, with
    a warning.
    """
    if name not in _ATTRIBUTES:
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")
    warnings.warn(
        f"{type(owner).__name__}.{name} is called {_ATTRIBUTES[name]} now.",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(owner, _ATTRIBUTES[name])


def renamed(module: str, new_names: dict[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an old name is the new one, with a warning."""

    def attribute(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is called {module}.{new_names[name]} now.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[module], new_names[name])

    return attribute
