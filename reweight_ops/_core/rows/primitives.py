"""What a backend may do with a call's rows in one launch each, where PyTorch launches one kernel for every operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def is_traced(t: Tensor) -> bool:
    """Whether a call on ``t`` is being recorded rather than run: a kernel that is no op would find no elements, or be left out of the graph."""
    if torch.compiler.is_compiling() or isinstance(t, torch._subclasses.FakeTensor):
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


class Masked(NamedTuple):
    """``ids`` ``[N]`` int64, IGNORE_INDEX where a row is out; ``keep`` and ``counted`` (in denominators) bool ``[N]``; ``lengths`` int32 ``[2, S]``, how many
    rows of each sequence are the one and the other. Rows without sequences count in runs. ``bounds``: the least and the largest id of the rows that
    are in, from a backend that knows them on the host."""

    ids: Tensor
    keep: Tensor
    counted: Tensor
    lengths: Tensor
    bounds: tuple[int, int] | None = None


class Weighing(NamedTuple):
    """A row weight: ``keep / divisor / (the sequence's counted rows if per_length) / horizon``.

    ``divisor``: a number, a 0-d tensor, all counted rows, all sequences that have one, or None; each count is at least 1.
    """

    divisor: float | Tensor | Literal["rows", "sequences"] | None = None
    per_length: bool = False
    horizon: float | None = None


#: What :attr:`RowPrimitives.metrics` can find, in this order: means over rows; sums and extrema; means over sequences of the shares of their rows.
METRICS = (
    "entropy", "kl", "low", "high", "region", "ratio", "approx_kl", "weight", "skipped", "largest ratio", "tokens", "sequences", "low_min",
    "high_max", "sequence low", "sequence high", "sequence region",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RowPrimitives:
    """* ``mask(ids, mask, denominator, run)``: ids and masks of shape ``[N]`` or ``[S, run]``, any strides.
    * ``weigh(masked, run, weighing, scale, factor, terms) -> [terms, N]``: times ``scale`` (a number or a 0-d tensor), and in term 0 times ``factor``.
    * ``ratio(masked, run, logp, old_logp, params, normalize) -> (log_ratio [N], means [S])``: each sequence's mean of ``logp - old_logp`` (0 where
      that is None; the sum without ``normalize``) in all of its rows, between ``params[0]`` and ``params[1]``.
    * ``adjoint(masked, run, d_ratio, d_logp, params, means, normalize, shared)``: adds to ``d_logp`` what ``d_ratio`` is through it; each row's own
      without ``shared``.
    * ``metrics(masked, run, monitor, params, leaves, names) -> (sums [M, 2], values [M])``: those of :data:`METRICS` that are named. ``monitor`` is a
      :class:`~reweight_ops._core.formula.monitor.Monitor`; ``leaves`` are a formula's, and ``d_logp``, ``d_entropy`` and ``factor``; without
      ``log_ratio`` it is formed in the row, as a loss program forms it.

    Where one of the last three is None, PyTorch does it; ``ratio`` and ``adjoint`` go together.
    """

    mask: Callable[[Tensor, Tensor | None, Tensor | None, int], Masked]
    weigh: Callable[[Masked, int, Weighing, Any, Tensor | None, int], Tensor]
    ratio: Callable[[Masked, int, Tensor, Tensor | None, Tensor, bool], tuple[Tensor, Tensor]] | None = None
    adjoint: Callable[[Masked, int, Tensor, Tensor, Tensor, Tensor, bool, bool], None] | None = None
    metrics: Callable[[Masked, int, Any, Tensor, dict[str, Tensor], tuple[str, ...]], tuple[Tensor, Tensor]] | None = None
