"""Suggestions for the name of a hyper-parameter that a method, rule or weight does not
have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Other libraries' names of a hyper-parameter, and its names here.
_CLIP = ("epsilon_low", "epsilon_high")
ALIASES = {
    "epsilon": _CLIP, "eps": _CLIP, "clip_eps": _CLIP, "eps_clip": _CLIP, "clip_range": _CLIP, "cliprange": _CLIP, "clip_ratio": _CLIP,
    "clip_ratio_low": ("epsilon_low",), "eps_low": ("epsilon_low",), "clip_ratio_high": ("epsilon_high",), "eps_high": ("epsilon_high",),
    "kl_coef": ("beta",), "kl_beta": ("beta",), "kl_loss_coef": ("beta",), "entropy_coeff": ("entropy_coef",), "ent_coef": ("entropy_coef",),
    "tau": ("temperature", "tau_pos"), "max_completion_length": ("horizon",), "top_entropy_quantile": ("fraction",),
}  # fmt: skip


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
