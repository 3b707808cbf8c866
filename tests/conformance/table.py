"""One line of the table: a peer, its options, how far our loss and gradient are from
its own, and what that means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: A hundred roundings of fp32, in which all peers compute; a term that is missing or
#: scaled otherwise is a thousand times that.
AGREE = 1e-5


class Result(NamedTuple):
    """A loss (or values) and its gradients."""

    loss: Tensor
    grads: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """``theirs`` and ``ours`` should compute the same values. ``because`` says why they
    are known to differ.
    """

    peer: str
    options: str
    theirs: Callable[[], Result]
    ours: Callable[[], Result]
    because: str = ""


@dataclass(frozen=True)
class Line:
    peer: str
    options: str
    loss: float
    grad: float
    outcome: str
    expected: bool


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the norm; NaN where either is, unless both are in the same places."""
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def judged(case: Case) -> Line:
    """Both sides run, and compared. What a peer refuses or cannot do is a line too; an
    error of ours is none.
    """
    ours = case.ours()
    assert all(bool(g.isfinite().all()) for g in ours.grads), (
        f"{case.peer}, {case.options}: our gradient is not finite"
    )
    assert any(bool(g.any()) for g in ours.grads), (
        f"{case.peer}, {case.options}: a comparison of zeros shows nothing"
    )
    try:
        theirs = case.theirs()
    except Exception as error:
        why = (
            case.because
            or f"it raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return Line(
            case.peer,
            case.options,
            math.nan,
            math.nan,
            f"differs because {why}",
            bool(case.because),
        )
    loss = difference(ours.loss, theirs.loss)
    grad = max(difference(a, b) for a, b in zip(ours.grads, theirs.grads, strict=True))
    if loss <= AGREE and grad <= AGREE:
        known = f", though it was known to differ because {case.because}" if case.because else ""
        return Line(case.peer, case.options, loss, grad, f"agrees{known}", not case.because)
    return Line(
        case.peer,
        case.options,
        loss,
        grad,
        f"differs because {case.because or '?'}",
        bool(case.because),
    )


def lines(peers: Iterable[tuple[str, Callable[[], Iterable[Case]]]]) -> Iterator[Line]:
    """All cases of all peers; one that is not installed is a line that says so."""
    for name, cases in peers:
        try:
            found = list(cases())
        except ImportError as error:
            yield Line(name, "", math.nan, math.nan, f"absent: {error}", True)
            continue
        yield from map(judged, found)


def text(table: Sequence[Line]) -> str:
    """The table, and how many agree."""
    width = max((len(line.options) for line in table), default=0)
    names = max((len(line.peer) for line in table), default=0)
    head = f"{'peer':{names}}  {'options':{width}}  {'loss':>8}  {'gradient':>8}"
    rows = [
        f"{x.peer:{names}}  {x.options:{width}}  {x.loss:8.1e}  {x.grad:8.1e}  {x.outcome}"
        for x in table
    ]
    agree, wrong = (
        sum(test(x) for x in table)
        for test in (lambda x: x.outcome == "agrees", lambda x: not x.expected)
    )
    return "\n".join([head, *rows, f"{agree} of {len(table)} agree; {wrong} unexpected"])


def result(loss: Tensor, *leaves: Tensor) -> Result:
    """With the gradient by every leaf."""
    return Result(
        loss.detach(),
        torch.autograd.grad(loss.sum() if loss.dim() else loss, leaves, allow_unused=False),
    )
