"""The package's custom ops: the verbs of a backend as ``torch.ops.reweight_ops.*``, with fakes, so that torch.compile sees through.

Every op takes logits of shape ``R + (V,)`` (``drop_last``: one position more), flat ``[N]`` rows, and a backend's name. The mutating ones
write the gradient over the logits and, being ops, bump the version counter: an earlier autograd user of the logits then raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .backends.base import LOSS_ROWS, Head, Program, RowInputs
from .backends.select import load

_NAMESPACE = "reweight_ops"


def _rows(logits: Tensor, drop_last: bool) -> Tensor:
    return logits[..., :-1, :] if drop_last else logits


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _clear_last(out: Tensor, drop_last: bool) -> None:
    if drop_last:
        out[..., -1, :].zero_()


@custom_op(f"{_NAMESPACE}::token_stats", mutates_args=())
def token_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    head = Head(vocab_size, softcap)
    return load(backend).token_stats(_rows(logits, drop_last), ids, temperature, head, tuple(stats.split(",")))


@token_stats.register_fake
def _(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    return logits.new_empty((len(stats.split(",")), ids.numel()), dtype=_row_dtype(logits))


def _grad_into(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    head: Head,
    drop_last: bool,
    stats: list[Tensor | None],
    coefs: list[Tensor | None],
    backend: str,
) -> None:
    named = {name: t for name, t in zip(("logp", "lse", "entropy", "log_sum_p_sq"), stats, strict=True) if t is not None}
    by = dict(zip(("logp", "entropy", "lse", "log_sum_p_sq"), coefs, strict=True))
    load(backend).token_grad(_rows(logits, drop_last), ids, temperature, head, named, by, _rows(out, drop_last))
    _clear_last(out, drop_last)


@custom_op(f"{_NAMESPACE}::token_grad", mutates_args=())
def token_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    log_sum_p_sq: Tensor | None,
    by_logp: Tensor | None,
    by_entropy: Tensor | None,
    by_lse: Tensor | None,
    by_log_sum_p_sq: Tensor | None,
    vocab_size: int,
    softcap: float,
    drop_last: bool,
    backend: str,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    stats, coefs = [logp, lse, entropy, log_sum_p_sq], [by_logp, by_entropy, by_lse, by_log_sum_p_sq]
    _grad_into(out, logits, ids, temperature, Head(vocab_size, softcap), drop_last, stats, coefs, backend)
    return out


@token_grad.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@custom_op(f"{_NAMESPACE}::token_grad_", mutates_args=("logits",))
def token_grad_(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    log_sum_p_sq: Tensor | None,
    by_logp: Tensor | None,
    by_entropy: Tensor | None,
    by_lse: Tensor | None,
    by_log_sum_p_sq: Tensor | None,
    vocab_size: int,
    softcap: float,
    drop_last: bool,
    backend: str,
) -> None:
    stats, coefs = [logp, lse, entropy, log_sum_p_sq], [by_logp, by_entropy, by_lse, by_log_sum_p_sq]
    _grad_into(logits, logits, ids, temperature, Head(vocab_size, softcap), drop_last, stats, coefs, backend)


@token_grad_.register_fake
def _(*args: Any) -> None:
    return None


def _loss_grad_into(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    head: Head,
    drop_last: bool,
    inputs: RowInputs,
    program: str,
    params: Tensor,
    backend: str,
) -> Tensor:
    verb = load(backend).token_loss_grad
    rows = verb(_rows(logits, drop_last), ids, temperature, head, inputs, Program.decode(program), params, _rows(out, drop_last))
    _clear_last(out, drop_last)
    return rows


@custom_op(f"{_NAMESPACE}::token_loss_grad", mutates_args=())
def token_loss_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    weights: Tensor,
    old_logp: Tensor | None,
    adv: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    params: Tensor,
    program: str,
    vocab_size: int,
    softcap: float,
    drop_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    inputs = RowInputs(weights, old_logp, adv, ref_logp, sampling_logp)
    return _loss_grad_into(out, logits, ids, temperature, Head(vocab_size, softcap), drop_last, inputs, program, params, backend), out


@token_loss_grad.register_fake
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty((len(LOSS_ROWS), ids.numel()), dtype=_row_dtype(logits)), logits.new_empty(logits.shape)


@custom_op(f"{_NAMESPACE}::token_loss_grad_", mutates_args=("logits",))
def token_loss_grad_(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    weights: Tensor,
    old_logp: Tensor | None,
    adv: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    params: Tensor,
    program: str,
    vocab_size: int,
    softcap: float,
    drop_last: bool,
    backend: str,
) -> Tensor:
    inputs = RowInputs(weights, old_logp, adv, ref_logp, sampling_logp)
    return _loss_grad_into(logits, logits, ids, temperature, Head(vocab_size, softcap), drop_last, inputs, program, params, backend)


@token_loss_grad_.register_fake
def _(logits: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(LOSS_ROWS), ids.numel()), dtype=_row_dtype(logits))


@custom_op(f"{_NAMESPACE}::scale_", mutates_args=("grad",))
def scale_(grad: Tensor, factor: Tensor) -> None:
    """``grad *= factor`` for a scalar upstream gradient; no memory is touched when it is exactly 1."""
    if factor.device.type == "cpu":
        if factor.item() != 1:
            grad.mul_(factor)
    else:
        grad.mul_(factor)


@scale_.register_fake
def _(*args: Any) -> None:
    return None
