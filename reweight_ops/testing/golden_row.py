"""What a golden row is, and numbers that many of them have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

LN2, LN3 = log(2), log(3)


@dataclass(frozen=True)
class Golden:
    """One call of an entry and its result.

    In the arguments a list stands for a tensor. The tensor has floats if the list holds
    one, else ints or bools. Anything else stands for itself.

    ``expected`` has every number of the result in order, nested as is easiest to read.

    ``updates`` are for an entry whose call returns an object with an ``update``. Each
    is given to one call of ``update``, one after the other, from the state
    ``init(*init)``. The result is what each call returns beside the state.

    ``tokens`` of a weight are one sequence of tokens, by what formulas read (``logp``,
    ``old_logp``, ``adv``, ``entropy``, ...; ``completion_mask``). ``tokens`` of a loss
    of pairs are arguments of ``preference_loss_from_logps``. The result is then the
    loss and its slope by every token's log-prob.
    """

    kind: str
    name: str
    arguments: dict[str, Any]
    expected: Any
    updates: tuple[Any, ...] = ()
    init: tuple[Any, ...] = ()
    tokens: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """An argument that another function of the package makes."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def old(*probabilities: float) -> dict[str, list[float]]:
    return {"old_logp": [log(p) for p in probabilities]}
