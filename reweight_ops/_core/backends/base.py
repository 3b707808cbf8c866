"""The contract of a backend: six primitives on rows of logits, and a reason for every
request it cannot serve.

Everything vocabulary-sized happens in these primitives. Autograd, plans, ratios,
reductions and metrics exist once, above them.

**Rows.** ``logits`` has shape ``R + (V,)`` with R of one or two dimensions, the last
one contiguous, any other stride (see
:func:`rows_of`). ``ids`` is int64 ``[N]``, contiguous, ``N = numel(R)``. Per-row
tensors are ``[N]``, contiguous, fp32 (fp64 when the logits are fp64: only the reference
takes those). ``temperature`` has 1 or N elements.

* ``ids[i] == IGNORE_INDEX`` (-100): the row is never read. Its outputs are 0, and its
  gradient row is exactly 0.
* Another id outside ``[0, vocab_total)``: the outputs are NaN, the gradient row is
  exactly 0, and nothing outside of the row is read. An id inside that is not in this
  shard ``[vocab_start, vocab_start + vocab_size)``: ``logp`` is ``-inf`` and there is
  no one-hot. Everything else is as usual.
* Columns from ``vocab_size`` on (padding of the head) are not in the softmax. Their
  gradient is exactly 0.
* ``-inf`` logits: p = 0 and the gradient is 0 (tested on the logit, before the
  softcap). A row with NaN or ``+inf``, or with ``-inf`` only, is NaN.
* fp32 arithmetic for fp16, bf16 and fp32 logits, with one rounding at the end. The
  target's gradient is formed in fp32 from ``logp``.
* The result of a row depends, bitwise, only on the row, V and the dtype.
  ``token_stats`` and ``token_loss_grad`` of one backend give bitwise the same ``logp``,
  so an on-policy ratio is exactly 1.

**Two logits tensors** (divergences). p is the softmax of ``logits``, and q that of
``other``. Each has its own temperature and soft cap, and both have ``vocab_size``
columns. The ids only tell which rows are :data:`IGNORE_INDEX`. Only ``logits`` gets a
gradient.

* ``-inf`` logits are probabilities of 0: ``0·log(0/x) = 0``. KL(q‖p) is ``inf`` iff a
  column has p = 0 and q > 0, and KL(p‖q) iff a column has q = 0 and p > 0. A row is NaN
  if either tensor has no finite logit in it, or a NaN or ``+inf``.

**Packed rows** (sampling masks) are rows of any length: elements ``bounds[0, i]`` to
``bounds[1, i]`` of a vector. An id is a place in its row. All else is bit for bit as
for a row of logits that has no other columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..formula.loss_program import Program
from ..names import with_own_keywords
from ..rows.primitives import RowPrimitives

#: Row statistics that ``token_stats`` can return. ``max_logp`` is ``max x - lse``, the
#: log-prob of the likeliest token. ``lse_low`` is the part of ``lse`` that rounding
#: lost. With one fp32 number alone, probabilities would lose digits when all logits
#: share an offset. It is about 0 in fp64. It is ``-inf`` in a row that has only
#: ``-inf``, as one shard of a row may have.
STATS = ("logp", "entropy", "lse", "lse_low", "log_sum_p_sq", "max_logp")

#: Before the name of a statistic of the whole vocabulary, where those without it are of
#: the sets that a sampler kept.
VOCABULARY = "vocabulary_"

#: Per-row outputs of ``token_loss_grad``, in this order. ``weighted_loss`` is the row's
#: share of the total loss, and ``loss`` is the same without the row weight of the
#: reduction. ``d_logp`` and ``d_entropy`` are the derivatives of the total by logp and
#: entropy.
#: reduction. ``d_logp`` and ``d_entropy`` are the derivatives of the total by logp and
#: entropy.
LOSS_ROWS = ("logp", "entropy", "weighted_loss", "loss", "d_logp", "d_entropy")

#: Coefficients of ``token_grad``: derivatives of the loss by these row statistics.
DERIVATIVES = ("logp", "entropy", "lse", "log_sum_p_sq")

#: Row statistics of two logits tensors, in the order of ``divergence_stats``; ``_low``
#: as in :data:`STATS`.
DIVERGENCE_STATS = (
    "forward_kl",
    "reverse_kl",
    "entropy",
    "other_entropy",
    "lse",
    "lse_low",
    "other_lse",
    "other_lse_low",
)

#: The statistics that have a gradient, in the order of coefficients: KL(q‖p), KL(p‖q),
#: H(p).
DIVERGENCE_DERIVATIVES = ("forward_kl", "reverse_kl", "entropy")

Primitive = Literal[
    "token_stats",
    "token_grad",
    "token_loss_grad",
    "divergence_stats",
    "divergence_grad",
    "divergence_loss_grad",
    "packed_stats",
    "packed_grad",
]


class SoftmaxParams(NamedTuple):
    """How a row of logits becomes a distribution: ``x = cap*tanh(z/cap)/T`` over
    ``vocab_size`` columns. ``inf`` disables a parameter.
    """

    vocab_size: int
    softcap: float = float("inf")
    vocab_start: int = 0
    vocab_total: int = 0  # 0: not sharded, the same as vocab_size

    def total(self) -> int:
        return self.vocab_total or self.vocab_size


class RowAddresses(NamedTuple):
    """Where the rows of a logits tensor are, in elements.

    Row ``i`` starts at ``(i // per_batch) * batch_stride + (i % per_batch) *
    row_stride``.
    """

    per_batch: int
    batch_stride: int
    row_stride: int


def rows_of(logits: Tensor) -> RowAddresses:
    """Return the addresses, relative to ``data_ptr()``, of the rows of logits with one
    or two leading dimensions.
    """
    if logits.dim() == 2:
        return RowAddresses(max(logits.size(0), 1), 0, logits.stride(0))
    return RowAddresses(max(logits.size(1), 1), logits.stride(0), logits.stride(1))


class RowInputs(NamedTuple):
    """Per-row inputs of ``token_loss_grad``.

    ``old_logp=None`` means on-policy: ``old_logp = logp`` without gradient.
    """

    # [K, N]: row weight of each term; dimension 0 may be expanded (stride 0)
    row_weights: Tensor
    old_logp: Tensor | None = None
    adv: Tensor | None = None
    ref_logp: Tensor | None = None
    sampling_logp: Tensor | None = None

    def stored(self) -> dict[str, Tensor]:
        """Return the inputs of the call without the weights, by the names of a
        formula's leaves.
        """
        return {
            name: t for name, t in zip(self._fields[1:], self[1:], strict=True) if t is not None
        }


RowInputs.__new__ = with_own_keywords(RowInputs.__new__)  # type: ignore[method-assign]


class DivergenceInputs(NamedTuple):
    """The two tensors of a call, and how each becomes distributions. ``temperature``
    has 1 or N elements.
    """

    logits: Tensor
    other: Tensor
    ids: Tensor
    temperature: Tensor
    other_temperature: Tensor
    softmax: SoftmaxParams
    other_softmax: SoftmaxParams


class PackedRows(NamedTuple):
    """Rows of different lengths: ``values`` ``[M]`` contiguous, ``bounds`` int64
    ``[2, N]`` contiguous.

    ``ids`` has the place of each row's id in the row. It may also be IGNORE_INDEX, or
    another negative number for NaN. Then neither the bounds nor the values of the row
    are read.
    """

    values: Tensor
    bounds: Tensor
    ids: Tensor
    temperature: Tensor
    softcap: float


class Request(NamedTuple):
    """What a call asks of a backend. It is enough to refuse the call before any memory
    is touched.
    """

    primitive: Primitive
    device: torch.device
    dtype: torch.dtype
    program: Program | None = None
    other_dtype: torch.dtype | None = None  # dtype of a second logits tensor


def gpu_unsupported_reason(device: torch.device) -> str | None:
    """Return why PyTorch has no such GPU.

    A login node has no driver, and to ask for a GPU's properties would raise.
    """
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is False)"
    count = torch.cuda.device_count()
    return (
        f"PyTorch sees {count} GPU{'s' * (count > 1)}, and no {device}"
        if 0 < count <= (device.index or 0)
        else None
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """A backend: six primitives and a capability check.

    ``unsupported_reason`` never raises for a well-formed request and never guesses.

    * ``token_stats(logits, ids, temperature, softmax, stats) -> Tensor [len(stats),
      N]`` returns the named statistics, a subset of :data:`STATS`.
    * ``top_stats(logits, ids, temperature, softmax, stats, top) -> (Tensor [len(stats),
      N], Tensor [N, top])`` is ``token_stats``, and from the same read the int64 ids of
      the ``top`` largest logits, at most ``most_top`` and ``vocab_size``. The largest
      comes first, NaN before all, and of equal ones the lowest id. Ignored rows have
      IGNORE_INDEX. None means that callers take :func:`.picked.top_ids`.
    * ``token_grad(logits, ids, temperature, softmax, stats, derivatives, out) -> None``
      writes ``dL/dlogits`` to ``out`` (shape of logits, own strides; it may be
      ``logits`` itself). ``stats`` always maps ``logp`` and ``lse`` to ``[N]``, and
      also ``entropy`` and ``log_sum_p_sq`` if their coefficient is given. Without
      ``lse_low`` (then 0) probabilities are only as exact as an fp32 number of the size
      of ``lse``. With it they are exact to fp32 while ``|lse| < 2^24``, and at any size
      where T is 1. The target's own element comes from ``logp``. ``derivatives`` maps
      names of :data:`DERIVATIVES` to ``[N]`` or None (zero). A row whose coefficients
      are all 0 is not read.
    * ``token_loss_grad(logits, ids, temperature, softmax, inputs, program, params, out)
      -> Tensor [len(LOSS_ROWS), N]`` also writes ``out``.
    * ``scale(grad, factor) -> None`` computes ``grad *= factor``, a 0-d tensor, in at
      least fp32 with one rounding. The gradient is one that the backend has made (of
      logits, or of the parts of a head). A kernel reads the factor on the device, and
      returns at once if it is exactly 1. If it is None, torch does it.
    * ``evaluate_rows(program, params, leaves, row_weights, outputs, keep, into=None)
      -> Tensor [len(outputs), N]`` evaluates a program on stored rows, without logits,
      all in fp32 or all in fp64. ``leaves`` maps the leaves that the outputs depend on
      to ``[N]``. If ``log_ratio`` is among them, the program does not form it from
      ``logp - old_logp``. ``row_weights`` is ``[K, N]``: a row weight for each term,
      then the program's parameters of rows. ``outputs`` names those of
      :class:`~reweight_ops._core.formula.loss_program.LossGraph`. Rows where ``keep``
      (bool ``[N]``, or None) is False are 0. ``into`` is contiguous memory of the
      result, new by default. None means that the backend does not have it.

    The gradient of a row, with ``x`` the capped and scaled logit,
    ``p = exp(x - lse - lse_low)`` and ``c_*`` the coefficients::

        1/T * (1 - (capped/cap)^2) * [ c_logp*(1[v=y] - p) - c_ent*p*(log p + H)
                                       + c_lse*p + 2*c_p2*p*(p/exp(log_sum_p_sq) - 1) ]

    * ``divergence_stats(inputs) -> Tensor [len(DIVERGENCE_STATS), N]``, 0 in ignored
      rows.
    * ``divergence_grad(inputs, table, derivatives [3, N], out) -> None`` writes, per
      row and column, ``1/T · slope · [c_0·(p - q) + p·(c_1·(log p - log q - KL(p‖q)) -
      c_2·(log p + H(p)))]``, where ``c`` are the coefficients in the order of
      :data:`DIVERGENCE_DERIVATIVES`. It writes 0 on ``-inf`` logits, in ignored rows,
      and in rows whose coefficients are all 0 (which are not read). It writes NaN in a
      row with ``c_1 ≠ 0`` and an infinite KL(p‖q). ``out`` may be ``logits`` itself.
    * ``divergence_loss_grad(inputs, constants [3], weights [N], out) -> Tensor
      [len(DIVERGENCE_STATS), N]`` does both at once, with
      ``c_k = weights·constants_k``.
    * ``packed_stats(rows, stats) -> Tensor [len(stats), N]`` and
      ``packed_grad(rows, stats, derivatives, out) -> None`` are ``token_stats`` and
      ``token_grad`` of packed rows. ``out`` is like ``values``. An element that is in
      no row, or in a row that is not read, is not written. None means that the backend
      does not have them.
    """

    name: str
    unsupported_reason: Callable[[Request], str | None]
    token_stats: Callable[[Tensor, Tensor, Tensor, SoftmaxParams, tuple[str, ...]], Tensor]
    token_grad: Callable[
        [
            Tensor,
            Tensor,
            Tensor,
            SoftmaxParams,
            dict[str, Tensor],
            dict[str, Tensor | None],
            Tensor,
        ],
        None,
    ]
    token_loss_grad: Callable[
        [Tensor, Tensor, Tensor, SoftmaxParams, RowInputs, Program, Tensor, Tensor], Tensor
    ]
    divergence_stats: Callable[[DivergenceInputs], Tensor]
    divergence_grad: Callable[[DivergenceInputs, Tensor, Tensor, Tensor], None]
    divergence_loss_grad: Callable[[DivergenceInputs, Tensor, Tensor, Tensor], Tensor]
    top_stats: (
        Callable[
            [Tensor, Tensor, Tensor, SoftmaxParams, tuple[str, ...], int], tuple[Tensor, Tensor]
        ]
        | None
    ) = None
    most_top: int = 0
    packed_stats: Callable[[PackedRows, tuple[str, ...]], Tensor] | None = None
    packed_grad: (
        Callable[[PackedRows, dict[str, Tensor], dict[str, Tensor | None], Tensor], None] | None
    ) = None
    scale: Callable[[Tensor, Tensor], None] | None = None
    evaluate_rows: Callable[..., Tensor] | None = None
    #: The operations on rows that take one launch each, if the backend has kernels for
    #: them.
    rows: RowPrimitives | None = None
    #: Returns which of several kernels token_loss_grad takes, and why (logits,
    #: vocab_size, device).
    kernel_of: Callable[[Tensor, int, torch.device], str] | None = None
    #: The same for the primitives on two logits tensors. (logits, other logits,
    #: vocab_size, device).
    divergence_kernel_of: Callable[[Tensor, Tensor, int, torch.device], str] | None = None
    #: Prepares one-pass losses that are called repeatedly; :mod:`.prepared` has the
    #: type.
    prepare: Callable[[Any, Any], Any] | None = None
    #: True for a backend that serves everything slowly. ``auto`` prefers two passes of
    #: a faster backend to its one.
    is_fallback: bool = False
