"""The contract of a backend: six primitives on rows of logits, and a reason for every request it cannot serve.

Everything vocabulary-sized happens in these primitives; autograd, plans, ratios, reductions and metrics exist once, above them.

**Rows.** ``logits`` has shape ``R + (V,)`` with R of one or two dimensions, the last one contiguous, any other stride (see
:func:`rows_of`). ``ids`` is int64 ``[N]``, contiguous, ``N = numel(R)``. Per-row tensors are ``[N]``, contiguous, fp32 (fp64 when the
logits are fp64: only the reference takes those). ``temperature`` has 1 or N elements.

* ``ids[i] == IGNORE_INDEX`` (-100): the row is never read, its outputs are 0, its gradient row exact zeros.
* another id outside ``[0, vocab_total)``: outputs NaN, gradient row exact zeros, nothing read out of the row. Inside, but not in this
  shard ``[vocab_start, vocab_start + vocab_size)``: ``logp`` is ``-inf`` and there is no one-hot; everything else as usual.
* columns from ``vocab_size`` on (padding of the head) are not in the softmax; their gradient is exact zeros.
* ``-inf`` logits: p = 0, gradient 0 (tested on the logit, before the softcap). A row with NaN or ``+inf``, or all ``-inf``: NaN in that row.
* fp32 arithmetic for fp16, bf16 and fp32 logits, one rounding at the end; the target's gradient is formed in fp32 from ``logp``.
* The result of a row depends, bitwise, only on the row, V and the dtype; ``token_stats`` and ``token_loss_grad`` of one backend give
  bitwise the same ``logp`` (so an on-policy ratio is exactly 1).

**Two logits tensors** (divergences). p is the softmax of ``logits``, q that of ``other``; each has its own temperature and soft cap, both have
``vocab_size`` columns. Of the ids only whether they are :data:`IGNORE_INDEX` matters. Only ``logits`` gets a gradient.

* ``-inf`` logits are probabilities of 0: ``0·log(0/x) = 0``; KL(q‖p) is ``inf`` iff a column has p = 0 and q > 0, KL(p‖q) iff one has q = 0
  and p > 0. A row in which either tensor has no finite logit, or a NaN or ``+inf``: NaN.

**Packed rows** (sampling masks): rows of any length, elements ``bounds[0, i]`` to ``bounds[1, i]`` of a vector; an id is a place in its row. All else is as
for a row of logits that has no other columns, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..formula.loss_program import Program
from ..rows.primitives import RowPrimitives

#: Row statistics that ``token_stats`` can return: ``max_logp`` is ``max x - lse``, the log-prob of the likeliest token. ``lse_low`` is what
#: rounding ``lse`` lost: from one fp32 number alone probabilities would lose digits when all logits share an offset. It is about 0 in fp64, and
#: ``-inf`` in a row of nothing but ``-inf``, which one shard of a row may be.
STATS = ("logp", "entropy", "lse", "lse_low", "log_sum_p_sq", "max_logp")

#: Before the name of a statistic of the whole vocabulary, where those without it are of the sets that a sampler kept.
VOCABULARY = "vocabulary_"

#: Per-row outputs of ``token_loss_grad``, in this order: ``weighted_loss`` is the row's share of the total loss, ``loss`` the
#: same without the row weight of the reduction, ``d_logp`` and ``d_entropy`` the derivatives of the total by logp and entropy.
LOSS_ROWS = ("logp", "entropy", "weighted_loss", "loss", "d_logp", "d_entropy")

#: Coefficients of ``token_grad``: derivatives of the loss by these row statistics.
DERIVATIVES = ("logp", "entropy", "lse", "log_sum_p_sq")

#: Row statistics of two logits tensors, in the order of ``divergence_stats``; ``_low`` as in :data:`STATS`.
DIVERGENCE_STATS = ("forward_kl", "reverse_kl", "entropy", "other_entropy", "lse", "lse_low", "other_lse", "other_lse_low")

#: Those that have a gradient, in the order of coefficients: KL(q‖p), KL(p‖q), H(p).
DIVERGENCE_DERIVATIVES = ("forward_kl", "reverse_kl", "entropy")

Primitive = Literal[
    "token_stats", "token_grad", "token_loss_grad", "divergence_stats", "divergence_grad", "divergence_loss_grad", "packed_stats", "packed_grad"
]  # fmt: skip


class SoftmaxParams(NamedTuple):
    """How a row of logits becomes a distribution: ``x = cap*tanh(z/cap)/T`` over ``vocab_size`` columns. Off is ``inf``."""

    vocab_size: int
    softcap: float = float("inf")
    vocab_start: int = 0
    vocab_total: int = 0  # 0: not sharded, the same as vocab_size

    def total(self) -> int:
        return self.vocab_total or self.vocab_size


class RowAddresses(NamedTuple):
    """Where the rows of a logits tensor are, in elements: row ``i`` starts at ``(i // per_batch) * batch_stride + (i % per_batch) * row_stride``."""

    per_batch: int
    batch_stride: int
    row_stride: int


def rows_of(logits: Tensor) -> RowAddresses:
    """The addresses, relative to ``data_ptr()``, of the rows of logits with one or two leading dimensions."""
    if logits.dim() == 2:
        return RowAddresses(max(logits.size(0), 1), 0, logits.stride(0))
    return RowAddresses(max(logits.size(1), 1), logits.stride(0), logits.stride(1))


class RowInputs(NamedTuple):
    """Per-row inputs of ``token_loss_grad``. ``old_logp=None``: on-policy, ``old_logp = logp`` without gradient."""

    weights: Tensor  # [K, N]: row weight of each term; dimension 0 may be expanded (stride 0)
    old_logp: Tensor | None = None
    adv: Tensor | None = None
    ref_logp: Tensor | None = None
    sampling_logp: Tensor | None = None

    def stored(self) -> dict[str, Tensor]:
        """What the call was given besides the weights, by the names of a formula's leaves."""
        return {name: t for name, t in zip(self._fields[1:], self[1:], strict=True) if t is not None}


class DivergenceInputs(NamedTuple):
    """The two tensors of a call and how each becomes distributions. ``temperature``: 1 or N elements."""

    logits: Tensor
    other: Tensor
    ids: Tensor
    temperature: Tensor
    other_temperature: Tensor
    softmax: SoftmaxParams
    other_softmax: SoftmaxParams


class PackedRows(NamedTuple):
    """Rows of different lengths: ``values`` ``[M]`` contiguous, ``bounds`` int64 ``[2, N]`` contiguous. ``ids``: the place of each row's id
    in it. IGNORE_INDEX, or another negative number for NaN: then neither its bounds nor its values are read."""

    values: Tensor
    bounds: Tensor
    ids: Tensor
    temperature: Tensor
    softcap: float


class Request(NamedTuple):
    """What a call asks of a backend: enough to say no before any memory is touched."""

    primitive: Primitive
    device: torch.device
    dtype: torch.dtype
    program: Program | None = None
    other_dtype: torch.dtype | None = None  # of a second logits tensor


def gpu_unsupported_reason(device: torch.device) -> str | None:
    """Why PyTorch has no such GPU: on a login node there is no driver, and asking for a GPU's properties would raise."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is False)"
    count = torch.cuda.device_count()
    return f"PyTorch sees {count} GPU{'s' * (count > 1)}, and no {device}" if 0 < count <= (device.index or 0) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """Six primitives and the reason why not. ``unsupported_reason`` never raises for a well-formed request and never guesses.

    * ``token_stats(logits, ids, temperature, softmax, stats) -> Tensor [len(stats), N]``: the named statistics, a subset of :data:`STATS`.
    * ``top_stats(logits, ids, temperature, softmax, stats, top) -> (Tensor [len(stats), N], Tensor [N, top])``: ``token_stats``, and of the same read the int64
      ids of the ``top`` largest logits, at most ``most_top`` and ``vocab_size``: largest first, NaN before all, of equal ones the lowest id; IGNORE_INDEX in
      ignored rows. None: a caller takes :func:`.picked.top_ids`.
    * ``token_grad(logits, ids, temperature, softmax, stats, derivatives, out) -> None``: writes ``dL/dlogits`` to ``out`` (shape of logits, own strides; may be
      ``logits`` itself). ``stats`` maps ``logp`` and ``lse`` always, ``entropy`` and ``log_sum_p_sq`` when their coefficient is given, to ``[N]``;
      without ``lse_low`` (0 then) probabilities are only as exact as an fp32 number of the size of ``lse``; with it they are exact to fp32 while
      ``|lse| < 2^24``, and at any size where T is 1. The target's own element comes from ``logp``;
      ``derivatives`` maps names of :data:`DERIVATIVES` to ``[N]`` or None (zero). A row whose coefficients are all 0 is not read.
    * ``token_loss_grad(logits, ids, temperature, softmax, inputs, program, params, out) -> Tensor [len(LOSS_ROWS), N]``, and writes ``out``.
    * ``scale(grad, factor) -> None``: ``grad *= factor``, a 0-d tensor, in at least fp32 with one rounding, for a gradient that the backend has made (of
      logits, or of what a head is made of). A kernel reads the factor on the device, and returns at once if it is exactly 1. None: torch does it.
    * ``evaluate_rows(program, params, leaves, row_weights, outputs, keep) -> Tensor [len(outputs), N]``: a program on stored rows, without logits,
      all in fp32 or all in fp64. ``leaves`` maps the leaves that the outputs depend on to ``[N]``; with ``log_ratio`` among them the program
      does not form it from ``logp - old_logp``. ``row_weights`` is ``[K, N]``; ``outputs`` names those of
      :class:`~reweight_ops._core.formula.loss_program.LossGraph`; rows where ``keep`` (bool ``[N]``, or None) is False are 0. None: the backend has none.

    The gradient of a row, with ``x`` the capped and scaled logit, ``p = exp(x - lse - lse_low)`` and ``c_*`` the coefficients::

        1/T * (1 - (capped/cap)^2) * [ c_logp*(1[v=y] - p) - c_ent*p*(log p + H) + c_lse*p + 2*c_p2*p*(p/exp(log_sum_p_sq) - 1) ]

    * ``divergence_stats(inputs) -> Tensor [len(DIVERGENCE_STATS), N]``, 0 in ignored rows.
    * ``divergence_grad(inputs, table, derivatives [3, N], out) -> None``: writes, per row and column, with ``c`` the coefficients in the order of
      :data:`DIVERGENCE_DERIVATIVES`, ``1/T · slope · [c_0·(p - q) + p·(c_1·(log p - log q - KL(p‖q)) - c_2·(log p + H(p)))]``; 0 on ``-inf`` logits,
      in ignored rows and in rows whose coefficients are all 0 (which are not read); NaN in a row with ``c_1 ≠ 0`` and an infinite
      KL(p‖q). ``out`` may be ``logits`` itself.
    * ``divergence_loss_grad(inputs, constants [3], weights [N], out) -> Tensor [len(DIVERGENCE_STATS), N]``: both at once, with
      ``c_k = weights·constants_k``.
    * ``packed_stats(rows, stats) -> Tensor [len(stats), N]`` and ``packed_grad(rows, stats, derivatives, out) -> None``: ``token_stats`` and ``token_grad``
      of packed rows. ``out`` is like ``values``; what is in no row, or in one that is not read, is not written. None: the backend has none.
    """

    name: str
    unsupported_reason: Callable[[Request], str | None]
    token_stats: Callable[[Tensor, Tensor, Tensor, SoftmaxParams, tuple[str, ...]], Tensor]
    token_grad: Callable[[Tensor, Tensor, Tensor, SoftmaxParams, dict[str, Tensor], dict[str, Tensor | None], Tensor], None]
    token_loss_grad: Callable[[Tensor, Tensor, Tensor, SoftmaxParams, RowInputs, Program, Tensor, Tensor], Tensor]
    divergence_stats: Callable[[DivergenceInputs], Tensor]
    divergence_grad: Callable[[DivergenceInputs, Tensor, Tensor, Tensor], None]
    divergence_loss_grad: Callable[[DivergenceInputs, Tensor, Tensor, Tensor], Tensor]
    top_stats: Callable[[Tensor, Tensor, Tensor, SoftmaxParams, tuple[str, ...], int], tuple[Tensor, Tensor]] | None = None
    most_top: int = 0
    packed_stats: Callable[[PackedRows, tuple[str, ...]], Tensor] | None = None
    packed_grad: Callable[[PackedRows, dict[str, Tensor], dict[str, Tensor | None], Tensor], None] | None = None
    scale: Callable[[Tensor, Tensor], None] | None = None
    evaluate_rows: Callable[[Program, Tensor, dict[str, Tensor], Tensor, tuple[str, ...], Tensor | None], Tensor] | None = None
    #: What it does with rows in one launch each, if it has kernels for that.
    rows: RowPrimitives | None = None
    #: Which of several kernels token_loss_grad takes, and why (logits, vocab_size, device).
    kernel_of: Callable[[Tensor, int, torch.device], str] | None = None
    #: One-pass losses that are called again and again; see :mod:`.prepared`, which has the type.
    prepare: Callable[[Any, Any], Any] | None = None
    #: It serves everything, slowly: ``auto`` prefers a faster backend's two passes to its one.
    is_fallback: bool = False
