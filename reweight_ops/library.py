"""The package's custom ops: the verbs of a backend as ``torch.ops.reweight_ops.*``, with fakes, so that torch.compile sees through.

Every op takes logits of shape ``R + (V,)`` (``drop_last``: one position more), flat ``[N]`` rows, and a backend's name. The mutating ones
write the gradient over the logits and bump the version counter: an earlier autograd user of the logits then raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import Library, infer_schema

from .backends.base import LOSS_ROWS, Head, Program, RowInputs
from .backends.select import load
from .memory import empty

_library = Library("reweight_ops", "DEF")  # type: ignore[no-untyped-call]


def _op(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Define the op of that name, for every device. Not ``torch.library.custom_op``: its layers for autograd (ours is in :mod:`.autograd`)
    and for default arguments are Python too, and cost as much as everything else that a call does."""

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        _library.define(name + infer_schema(function, mutates_args=mutates))  # type: ignore[no-untyped-call]
        # A compiled graph that calls the op must not be traced any further.
        _library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"reweight_ops::{name}", fake, lib=_library)
        return getattr(torch.ops.reweight_ops, name).default

    return register


def _changed(tensor: Tensor) -> None:
    if not tensor.is_inference():
        increment_version(tensor)


def _rows(logits: Tensor, drop_last: bool) -> Tensor:
    return logits[..., :-1, :] if drop_last else logits


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _clear_last(out: Tensor, drop_last: bool) -> None:
    if drop_last:
        out[..., -1, :].zero_()


def _fake_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    return logits.new_empty((len(stats.split(",")), ids.numel()), dtype=_row_dtype(logits))


def _fake_grad(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_rows(logits: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(LOSS_ROWS), ids.numel()), dtype=_row_dtype(logits))


def _fake_rows_and_grad(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_rows(logits, ids), _fake_grad(logits)


def _fake_nothing(*args: Any) -> None:
    return None


@_op(_fake_stats)
def token_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    head = Head(vocab_size, softcap)
    return load(backend).token_stats(_rows(logits, drop_last), ids, temperature, head, tuple(stats.split(",")))


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


@_op(_fake_grad)
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
    out = empty(logits.shape, logits.dtype, logits.device)
    stats, coefs = [logp, lse, entropy, log_sum_p_sq], [by_logp, by_entropy, by_lse, by_log_sum_p_sq]
    _grad_into(out, logits, ids, temperature, Head(vocab_size, softcap), drop_last, stats, coefs, backend)
    return out


@_op(_fake_nothing, mutates=("logits",))
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
    _changed(logits)
    stats, coefs = [logp, lse, entropy, log_sum_p_sq], [by_logp, by_entropy, by_lse, by_log_sum_p_sq]
    _grad_into(logits, logits, ids, temperature, Head(vocab_size, softcap), drop_last, stats, coefs, backend)


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


@_op(_fake_rows_and_grad)
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
    out = empty(logits.shape, logits.dtype, logits.device)
    inputs = RowInputs(weights, old_logp, adv, ref_logp, sampling_logp)
    return _loss_grad_into(out, logits, ids, temperature, Head(vocab_size, softcap), drop_last, inputs, program, params, backend), out


@_op(_fake_rows, mutates=("logits",))
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
    _changed(logits)
    inputs = RowInputs(weights, old_logp, adv, ref_logp, sampling_logp)
    return _loss_grad_into(logits, logits, ids, temperature, Head(vocab_size, softcap), drop_last, inputs, program, params, backend)


def scale(grad: Tensor, factor: Tensor) -> None:
    """``grad *= factor`` for a scalar upstream gradient; on the CPU no memory is touched when it is exactly 1."""
    if torch.compiler.is_compiling():
        scale_(grad, factor)
    elif grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor)


@_op(_fake_nothing, mutates=("grad",))
def scale_(grad: Tensor, factor: Tensor) -> None:
    scale(grad, factor)
