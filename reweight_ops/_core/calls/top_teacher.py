"""Resolution of a teacher with a few stored log-probs per row, against the rows of a
call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from ..rows.rows import Rows
from ..rows.structure import is_readable
from .keywords import TopKLogps
from .picked import resolve_ids
from .two_hidden import OtherOptions

TAILS = ("bucket", "renormalize", "ignore")


class TopTeacher(NamedTuple):
    """``ids`` and ``logps`` are ``[N, K]``. An id of IGNORE_INDEX is padding."""

    ids: Tensor
    logps: Tensor
    tail: str


def resolve_top_teacher(
    rows: Rows, given: TopKLogps, of_other: OtherOptions, vocab_size: int
) -> TopTeacher:
    """Check a teacher's ids and log-probs."""
    name = of_other.name
    for option, value in (("temperature", of_other.temperature), ("softcap", of_other.softcap)):
        if value is not None:
            raise rows.error(
                f"{name}_{option} would have no effect: stored log-probs are of the teacher's "
                "own softmax."
            )
    if given.tail not in TAILS:
        raise rows.error(f"{name}.tail is {given.tail!r}, expected one of {', '.join(TAILS)}.")
    ids, logps = resolve_ids(rows, f"{name}.token_ids", given.token_ids, vocab_size), given.logps
    _check_logps(rows, f"{name}.logps", logps, (*rows.shape, ids.size(-1)))
    flat = logps.reshape(rows.count, -1).to(rows.dtype)
    if is_readable(flat) and bool(
        ((flat > 1e-3) & (ids != IGNORE_INDEX) & rows.keep[:, None]).any()
    ):
        raise rows.error(
            f"{name}.logps has numbers above 0, so they are not log-probs: pass their logarithm."
        )
    listed = torch.where(flat == -torch.inf, IGNORE_INDEX, ids)
    if is_readable(listed):
        _check_repeats(rows, f"{name}.token_ids", listed)
    return TopTeacher(listed, flat, given.tail)


def _check_repeats(rows: Rows, name: str, listed: Tensor) -> None:
    """Raise if a row lists an id twice: both sums would count its probability twice."""
    ordered = listed.sort(dim=-1).values
    repeated = (
        (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != IGNORE_INDEX) & rows.keep[:, None]
    )
    for row, place in repeated.nonzero()[:1].tolist():
        raise rows.error(
            f"{name} has {int(ordered[row, place])} twice in row {row} (flat): list each id once."
        )


def _check_logps(rows: Rows, name: str, logps: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(logps, Tensor) or logps.dtype not in (torch.float32, torch.float64):
        raise rows.error(
            f"{name} is {logps.dtype if isinstance(logps, Tensor) else type(logps).__name__}, "
            "expected fp32 or fp64 log-probs."
        )
    if tuple(logps.shape) != shape or logps.device != rows.device:
        raise rows.error(
            f"{name} has shape {tuple(logps.shape)} on {logps.device}, expected {shape} on "
            f"{rows.device}."
        )
    if logps.requires_grad and torch.is_grad_enabled():
        raise rows.error(f"{name} requires grad, but no gradient flows to it: pass it detached.")
