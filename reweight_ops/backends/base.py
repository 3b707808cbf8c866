"""The contract of a backend: three verbs on rows of logits, and a reason for every request it cannot serve.

Everything vocabulary-sized happens in these verbs; autograd, plans, ratios, reductions and metrics exist once, above them.

**Rows.** ``logits`` has shape ``R + (V,)`` with R of one or two dimensions, the last one contiguous, any other stride (see
:func:`rows_of`). ``ids`` is int64 ``[N]``, contiguous, ``N = numel(R)``. Per-row tensors are ``[N]``, contiguous, fp32 (fp64 when the
logits are fp64: only the reference takes those). ``temperature`` has 1 or N elements.

* ``ids[i] == OUT`` (-100): the row is never read, its outputs are 0, its gradient row exact zeros.
* another id outside ``[0, vocab_total)``: outputs NaN, gradient row exact zeros, nothing read out of the row. Inside, but not in this
  shard ``[vocab_start, vocab_start + vocab_size)``: ``logp`` is ``-inf`` and there is no one-hot; everything else as usual.
* columns from ``vocab_size`` on (padding of the head) are not in the softmax; their gradient is exact zeros.
* ``-inf`` logits: p = 0, gradient 0 (tested on the logit, before the softcap). A row with NaN or ``+inf``, or all ``-inf``: NaN in that row.
* fp32 arithmetic for fp16, bf16 and fp32 logits, one rounding at the end; the target's gradient is formed in fp32 from ``logp``.
* The result of a row depends, bitwise, only on the row, V and the dtype; ``token_stats`` and ``token_loss_grad`` of one backend give
  bitwise the same ``logp`` (so an on-policy ratio is exactly 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..codegen.loss_program import Program

#: The id of a row that is out of the loss.
OUT = -100

#: Row statistics that ``token_stats`` can return: ``max_logp`` is ``max x - lse``, the log-prob of the likeliest token.
STATS = ("logp", "entropy", "lse", "log_sum_p_sq", "max_logp")

#: Per-row outputs of ``token_loss_grad``, in this order: ``weighted_loss`` is the row's share of the total loss, ``loss`` the
#: same without the row weight of the reduction, ``coef`` and ``ent_coef`` the derivatives of the total by logp and entropy.
LOSS_ROWS = ("logp", "entropy", "weighted_loss", "loss", "coef", "ent_coef")

#: Coefficients of ``token_grad``: derivatives of the loss by these row statistics.
COEFS = ("logp", "entropy", "lse", "log_sum_p_sq")

Verb = Literal["token_stats", "token_grad", "token_loss_grad"]


class Head(NamedTuple):
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


class Request(NamedTuple):
    """What a call asks of a backend: enough to say no before any memory is touched."""

    verb: Verb
    device: torch.device
    dtype: torch.dtype
    program: Program | None = None


@dataclass(frozen=True)
class Backend:
    """Three verbs and the reason why not. ``unsupported_reason`` never raises for a well-formed request and never guesses.

    * ``token_stats(logits, ids, temperature, head, stats) -> Tensor [len(stats), N]``: the named statistics, a subset of :data:`STATS`.
    * ``token_grad(logits, ids, temperature, head, stats, coefs, out) -> None``: writes ``dL/dlogits`` to ``out`` (shape of logits, own strides; may be
      ``logits`` itself). ``stats`` maps ``logp`` and ``lse`` always, ``entropy`` and ``log_sum_p_sq`` when their coefficient is given, to ``[N]``;
      ``coefs`` maps names of :data:`COEFS` to ``[N]`` or None (zero). A row whose coefficients are all 0 is not read.
    * ``token_loss_grad(logits, ids, temperature, head, inputs, program, params, out) -> Tensor [len(LOSS_ROWS), N]``, and writes ``out``.

    * ``evaluate_rows(program, params, leaves, row_weights, outputs, keep) -> Tensor [len(outputs), N]``: a program on stored rows, without logits,
      all in fp32 or all in fp64. ``leaves`` maps the leaves that the outputs depend on to ``[N]``; with ``log_ratio`` among them the program
      does not form it from ``logp - old_logp``. ``row_weights`` is ``[K, N]``; ``outputs`` names those of
      :class:`~reweight_ops.codegen.loss_program.LossGraph`; rows where ``keep`` (bool ``[N]``, or None) is False are 0. None: the backend has none.

    The gradient of a row, with ``x`` the capped and scaled logit, ``p = exp(x - lse)`` and ``c_*`` the coefficients::

        1/T * (1 - (capped/cap)^2) * [ c_logp*(1[v=y] - p) - c_ent*p*(log p + H) + c_lse*p + 2*c_p2*p*(p/exp(log_sum_p_sq) - 1) ]
    """

    name: str
    unsupported_reason: Callable[[Request], str | None]
    token_stats: Callable[[Tensor, Tensor, Tensor, Head, tuple[str, ...]], Tensor]
    token_grad: Callable[[Tensor, Tensor, Tensor, Head, dict[str, Tensor], dict[str, Tensor | None], Tensor], None]
    token_loss_grad: Callable[[Tensor, Tensor, Tensor, Head, RowInputs, Program, Tensor, Tensor], Tensor]
    kernel_of: Callable[[Tensor, int, torch.device], str] | None = (
        None  # which of several kernels token_loss_grad takes, and why (logits, vocab_size)
    )
    evaluate_rows: Callable[[Program, Tensor, dict[str, Tensor], Tensor, tuple[str, ...], Tensor | None], Tensor] | None = None
