"""The operations that a backend may do on a call's rows in one launch each.

PyTorch launches one kernel for every operation of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .groups import Groups

_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_traced(t: Tensor) -> bool:
    """Return whether a call on ``t`` is being recorded instead of run.

    A kernel that is not a registered op would then find no elements, or be missing from
    the graph.
    """
    if torch.compiler.is_compiling() or isinstance(t, torch._subclasses.FakeTensor):
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


class Runs(NamedTuple):
    """How ``rows`` rows are cut into sequences, or into runs if they have none.

    Each has ``length`` rows, but the last may be shorter. Packed sequences have a
    ``length`` of 0. They begin at ``offsets`` ``[S + 1]``, or ``owner`` ``[N]`` tells
    the sequence of each row, and the rows of a sequence may lie anywhere.
    """

    rows: int
    sequences: int
    length: int = 0
    offsets: Tensor | None = None
    owner: Tensor | None = None


class Masked(NamedTuple):
    """The masked rows of a call.

    ``ids`` ``[N]`` int64 is IGNORE_INDEX in an ignored row. It is None for a call
    without ids. ``keep`` and ``counted`` (in denominators) are bool ``[N]``.
    ``lengths`` int32 ``[2, S]`` tells how many rows of each run are kept and counted.
    The ``owner`` of packed ``runs`` is int64 ``[N]``, and ``S`` in a row of no
    sequence. ``bounds`` is the least and the largest id of the kept rows, from a
    backend that knows them on the host. ``trust`` ``[]`` is 0, or NaN if the device
    finds offsets or indices malformed; it is None if the host has checked them.

    With ``weights`` fp32 ``[M, N]`` a kept row may count as much as one of them says,
    instead of 1. ``sums`` fp32 ``[M, S]`` are theirs over the kept rows of each run.
    ``values`` fp32 ``[N]`` are copies of those that came with the masks.
    """

    ids: Tensor | None
    keep: Tensor
    counted: Tensor
    lengths: Tensor
    runs: Runs
    bounds: tuple[int, int] | None = None
    trust: Tensor | None = None
    weights: Tensor | None = None
    sums: Tensor | None = None
    values: Tensor | None = None


class Weighing(NamedTuple):
    """A row weight: ``keep * u / divisor / (the sequence's length if per_length) /
    horizon``.

    ``divisor`` is a number, a 0-d tensor, the sum of all lengths, the number of
    sequences with a positive length, or None. ``u`` is 1, and a length counts rows.
    With ``weight`` ``u`` is that one of the rows' ``weights``, and a length is a sum of
    it. Each count and sum of all is at least 1, and a length that is not positive
    divides by 1.
    """

    divisor: float | Tensor | Literal["rows", "sequences"] | None = None
    per_length: bool = False
    horizon: float | None = None
    weight: int | None = None


#: The rows over which a ratio sums the drifts: those of its sequence, those up to its
#: own, or those of the call.
Over = Literal["sequence", "prefix", "call"]


class Averaged(NamedTuple):
    """What a ratio averages over each sequence, and how.

    A row's drift is ``logp - old_logp``, or 0 without ``old_logp``. The sequence's mean
    of it (its sum without ``normalize``) is clamped to ``params[0]`` and ``params[1]``.

    With ``adv`` ``[N]`` a drift is at most ``params[3]`` where ``adv`` is positive, and
    at least ``-params[2]`` elsewhere. A clipped row has no gradient, and one at its
    bound half of it, as autograd gives it.

    With ``shared`` the gradient flows through the mean to every row of the sequence.
    Otherwise each row gets its own, clipped or not.

    ``over="prefix"``: the sum of the sequence up to each row is clamped. Each row gets
    its own gradient, and a log-prob that is not finite none. The other options do not
    apply.

    ``over="call"``: the drift less the mean of the call's drifts is clamped, times
    ``params[2]``; with ``normalize`` over their standard deviation, which is at least
    ``params[2]``. Mean and deviation are constants for the gradient.
    """

    logp: Tensor
    old_logp: Tensor | None
    params: Tensor
    normalize: bool = True
    shared: bool = True
    adv: Tensor | None = None
    over: Over = "sequence"


class Coupling(NamedTuple):
    """What a coupled reduction makes of a term's weighted losses ``x`` ``[N]``.

    ``"hinge"`` multiplies them by ``numbers[0]·max(Σ x - numbers[1], 0)``, a constant
    for the gradient. The others compare the sequences of each of the ``prompts``, by
    scores ``-Σ x`` over the sequence, and are the reductions of
    :mod:`~reweight_ops._core.spec.coupled` with these names. ``numbers[0]`` is their
    temperature. ``numbers[1]`` divides what a contrast ``prefers`` among the positives
    of a prompt: it is the mean advantage, minus the length, or nothing. A ``hard``
    contrast takes the mean of the negatives.
    """

    kind: Literal["hinge", "contrast", "classification"]
    numbers: tuple[Any, Any]
    prompts: Groups | None = None
    prefers: str | None = None
    hard: bool = False


class CoupledTerms(NamedTuple):
    """The K terms of a loss, of which a reduction couples some.

    A term without a coupling is a sum over rows. ``numbers`` ``[1 + 3·K]`` fp32 are the
    scale of all contributions, and each term's coefficient and the numbers of its
    coupling. ``evaluated`` ``[1 + K, N]`` has the loss and each term's weighted loss,
    without its coefficient and 0 in an ignored row. ``weights`` ``[R, N]`` begin with
    the row weights of the terms. ``logp`` is given if the ratio of a row depends on
    other rows.
    """

    couplings: tuple[Coupling | None, ...]
    numbers: Tensor
    evaluated: Tensor
    weights: Tensor
    adv: Tensor | None
    logp: Tensor | None


#: What :attr:`RowPrimitives.total` finds.
Statistic = Literal["sum", "mean", "max", "min"]

#: The metrics that :attr:`RowPrimitives.metrics` can find, in this order: means over
#: rows; sums and extrema; means over sequences of the shares of their rows.
METRICS = (
    "entropy",
    "kl",
    "low",
    "high",
    "region",
    "ratio",
    "approx_kl",
    "weight",
    "skipped",
    "largest ratio",
    "tokens",
    "sequences",
    "low_min",
    "high_max",
    "sequence low",
    "sequence high",
    "sequence region",
)


class Weigh(Protocol):
    """The primitive that forms row weights: ``weigh`` of :class:`RowPrimitives`."""

    def __call__(
        self,
        masked: Masked,
        weighings: tuple[Weighing | None, ...],
        scale: Any,
        factor: Tensor | None,
        into: Tensor | None = None,
        /,
    ) -> Tensor: ...


class Total(Protocol):
    """The primitive that finds a statistic: ``total`` of :class:`RowPrimitives`."""

    def __call__(
        self,
        masked: Masked,
        values: Tensor | float,
        statistic: Statistic,
        per_sequence: bool,
        into: Tensor | None = None,
        /,
    ) -> Tensor: ...


class Along(Protocol):
    """The primitive that sums along sequences: ``along`` of :class:`RowPrimitives`."""

    def __call__(
        self,
        masked: Masked,
        values: Tensor | float,
        decay: float | Tensor,
        reverse: bool,
        into: Tensor | None = None,
        /,
    ) -> Tensor: ...


class Quantile(Protocol):
    """The primitive that finds a quantile: ``quantile`` of :class:`RowPrimitives`."""

    def __call__(
        self,
        masked: Masked,
        ordered: Tensor,
        q: float,
        nearest: bool,
        into: Tensor | None = None,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class RowPrimitives:
    """The row primitives of the backend ``name``.

    * ``mask(ids, mask, denominator, runs, device)`` takes ids and masks of shape
      ``[N]`` or ``[S, length]`` with any strides, each of which may be None. If it
      ``copies``, it also takes the ``values`` of padded rows, ``[S, length]`` with any
      strides, fp32, fp64 or in 16 bits.
    * ``weigh(masked, weighings, scale, factor, into=None) -> [terms, N]`` forms the row
      weights of one term by each of ``weighings``. It leaves alone a term without one.
      It multiplies by ``scale`` (a number or a 0-d tensor), and in term 0 also by
      ``factor``. ``into`` is the memory of the result, new by default. It is NaN in the
      kept rows if ``masked.trust`` is NaN. A term does not depend on the others.
    * ``regroup(masked, ids, count) -> (masked, index [S])`` makes one sequence of all
      sequences of a prompt. ``ids`` ``[S]`` int32 or int64 with any stride name the
      prompts, ``0`` to ``count - 1``. Any other id is ``count`` in the int64 ``index``:
      the sequence is of no prompt. A backend that checks the ids on the device adds
      NaN to ``trust`` for such an id; another one leaves ``trust`` as it is.
    * ``measure(masked, weights) -> masked`` gives the rows ``weights`` fp32 ``[M, N]``,
      contiguous, and their ``sums``. These are rounded once.
    * ``spread(masked, values) -> [N]`` gives each row of packed sequences the value of
      its sequence in fp32, 0 in a row of no sequence, and adds ``masked.trust``.
      ``values`` ``[S]`` have any stride and dtype.
    * ``ratio(masked, averaged) -> (log_ratio [N], means [S])`` gives all rows of a
      sequence its clamped mean. ``means`` are not clamped. Over a prefix they are the
      sums ``[N]`` up to each row, and over the call ``[2]``, the mean and the factor.
    * ``adjoint(masked, averaged, means, d_ratio, d_logp)`` adds to ``d_logp`` the part
      of ``d_ratio`` that flows through the ratio.
    * ``metrics(masked, monitor, params, leaves, names) -> (sums [M, 2], values [M])``
      computes the named :data:`METRICS`. ``monitor`` is a
      :class:`~reweight_ops._core.formula.monitor.Monitor`. ``leaves`` are those of a
      formula, and ``d_logp``, ``d_entropy``, ``factor``, and the ``table`` ``[R, N]``
      of the monitor's parameters of rows. A missing ``log_ratio`` is
      formed in the row, as a loss program forms it.
    * ``total(masked, values, statistic, per_sequence, into=None) -> [N]`` gives every
      row the :data:`Statistic` of the kept rows of its sequence, or of the call.
      ``values`` are fp32 ``[N]``, contiguous, or one number. ``into`` is the memory of
      the result, fp32 ``[N]``, new by default. What an ignored row holds does not
      matter, and a NaN in a kept row is the result. Without kept rows a sum and a mean
      are 0, a maximum is ``-inf`` and a minimum ``inf``. An ignored row gets what the
      others get, but 0 from the extremum of its sequence. A row of no sequence gets 0
      from every statistic of sequences.
    * ``along(masked, values, decay, reverse, into=None) -> [N]`` is ``Σ decay^d·x``
      over a row and the kept rows before it in its sequence (with ``reverse`` after
      it), ``d`` kept rows away. ``decay`` is a number or a 0-d tensor. An ignored row
      gets 0. A value of inf or NaN reaches the rows from there on, and a sum of inf
      stays inf where a power of ``decay`` is 0.
    * ``quantile(masked, ordered, q, nearest, into=None) -> [N]`` gives every row the
      quantile ``q`` of the call's kept rows, between two order statistics or the
      nearest. ``ordered`` fp32 ``[N]`` begins with their values, sorted, and goes on
      with ``inf``.
    * ``couple(masked, terms, into) -> (weights [R, N], unknown [N])`` does what
      :func:`~reweight_ops._core.engine.coupled.at_this_point` says, for at most one
      coupling of prompts. ``terms`` are :class:`CoupledTerms`.
    * ``evaluate`` is ``evaluate_rows`` of
      :class:`~reweight_ops._core.backends.base.Backend`.

    ``mask`` and ``weigh`` are always there. PyTorch computes each of the others that is
    None. ``ratio`` and ``adjoint`` are both given or both None.
    """

    name: str
    copies: bool = False
    mask: Callable[..., Masked]
    weigh: Weigh
    regroup: Callable[[Masked, Tensor, int], tuple[Masked, Tensor]] | None = None
    measure: Callable[[Masked, Tensor], Masked] | None = None
    spread: Callable[[Masked, Tensor], Tensor] | None = None
    ratio: Callable[[Masked, Averaged], tuple[Tensor, Tensor]] | None = None
    adjoint: Callable[[Masked, Averaged, Tensor, Tensor, Tensor], None] | None = None
    metrics: (
        Callable[[Masked, Any, Tensor, dict[str, Tensor], tuple[str, ...]], tuple[Tensor, Tensor]]
        | None
    ) = None
    evaluate: Callable[..., Tensor] | None = None
    total: Total | None = None
    along: Along | None = None
    quantile: Quantile | None = None
    couple: Callable[[Masked, CoupledTerms, Tensor], tuple[Tensor, Tensor]] | None = None
