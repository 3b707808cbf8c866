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

from ..backends.base import COEFS, LOSS_ROWS, Head, RowInputs
from ..backends.scale import scale_in_torch
from ..backends.select import load
from ..formula.loss_program import Program
from .memory import empty

_library = Library("reweight_ops", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An op for every device. Not ``torch.library.custom_op``: its layers for autograd (ours is in :mod:`.autograd`) and for default
    arguments are Python too, and cost as much as everything else that a call does."""
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    # A compiled graph that calls the op must not be traced any further.
    _library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"reweight_ops::{name}", fake, lib=_library)
    return getattr(torch.ops.reweight_ops, name).default


def op(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """The function as an op of its name."""
    return lambda function: _define(function.__name__, infer_schema(function, mutates_args=mutates), function, fake)


def gradient_ops(name: str, write: Callable[..., Any], fake_rows: Callable[..., Tensor] | None = None) -> tuple[Any, Any]:
    """The ops ``name``, which gives a new tensor, and ``name_``, which writes over the logits, from ``write(out, logits, ...)``, which writes
    a gradient to ``out``. Rows that it returns besides, of the shape of ``fake_rows(logits, ...)``, come first."""
    arguments = infer_schema(write, mutates_args=()).removeprefix("(Tensor out, Tensor logits, ").rpartition(" -> ")[0]

    def apart(logits: Tensor, *rest: Any) -> Any:
        out = empty(logits.shape, logits.dtype, logits.device)
        rows = write(out, logits, *rest)
        return out if rows is None else (rows, out)

    def over(logits: Tensor, *rest: Any) -> Any:
        if not logits.is_inference():
            increment_version(logits)
        return write(logits, logits, *rest)

    def fake_apart(logits: Tensor, *rest: Any) -> Any:
        out = logits.new_empty(logits.shape)
        return out if fake_rows is None else (fake_rows(logits, *rest), out)

    def fake_over(logits: Tensor, *rest: Any) -> Any:
        return None if fake_rows is None else fake_rows(logits, *rest)

    return (
        _define(name, f"(Tensor logits, {arguments} -> {'Tensor' if fake_rows is None else '(Tensor, Tensor)'}", apart, fake_apart),
        _define(f"{name}_", f"(Tensor(a!) logits, {arguments} -> {'()' if fake_rows is None else 'Tensor'}", over, fake_over),
    )


def with_ids(t: Tensor, drop_last: bool) -> Tensor:
    """The positions of logits that have an id."""
    return t[..., :-1, :] if drop_last else t


def clear_last(out: Tensor, drop_last: bool) -> None:
    """The gradient of the position that has none."""
    if drop_last:
        out[..., -1, :].zero_()


def row_dtype(logits: Tensor) -> torch.dtype:
    """What row arithmetic is done in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    return logits.new_empty((len(stats.split(",")), ids.numel()), dtype=row_dtype(logits))


@op(_fake_stats)
def token_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, vocab_size: int, softcap: float, drop_last: bool, stats: str, backend: str
) -> Tensor:
    head = Head(vocab_size, softcap)
    return load(backend).token_stats(with_ids(logits, drop_last), ids, temperature, head, tuple(stats.split(",")))


def _write_token_grad(
    out: Tensor,
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
    known = {"logp": logp, "lse": lse, "entropy": entropy, "log_sum_p_sq": log_sum_p_sq}
    stats = {name: t for name, t in known.items() if t is not None}
    coefs = dict(zip(COEFS, (by_logp, by_entropy, by_lse, by_log_sum_p_sq), strict=True))
    head = Head(vocab_size, softcap)
    load(backend).token_grad(with_ids(logits, drop_last), ids, temperature, head, stats, coefs, with_ids(out, drop_last))
    clear_last(out, drop_last)


token_grad, token_grad_ = gradient_ops("token_grad", _write_token_grad)


def _fake_loss_rows(logits: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(LOSS_ROWS), ids.numel()), dtype=row_dtype(logits))


def _write_token_loss_grad(
    out: Tensor,
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
    head, inputs = Head(vocab_size, softcap), RowInputs(weights, old_logp, adv, ref_logp, sampling_logp)
    verb = load(backend).token_loss_grad
    rows = verb(with_ids(logits, drop_last), ids, temperature, head, inputs, Program.decode(program), params, with_ids(out, drop_last))
    clear_last(out, drop_last)
    return rows


token_loss_grad, token_loss_grad_ = gradient_ops("token_loss_grad", _write_token_loss_grad, _fake_loss_rows)


def may_overwrite(consume: bool) -> bool:
    """Whether backward may write a gradient over logits: never in a compiled graph.

    There a write becomes a copy, taken with the strides that the logits had when the graph was traced. Inductor may have saved them with others, for
    it pads rows on GPUs (and may save what backward was to recompute), and then the copy takes wrong elements: a wrong gradient without a word
    (PyTorch 2.11 and 2.13). What a compiled backward calls therefore gives a new tensor. A write in forward is over a tensor of the same graph,
    whose strides are kept.
    """
    return consume and not torch.compiler.is_compiling()


@op(lambda grad, factor, backend: None, mutates=("grad",))
def scale_(grad: Tensor, factor: Tensor, backend: str) -> None:
    if not grad.is_inference():
        increment_version(grad)
    (load(backend).scale or scale_in_torch)(grad, factor)


def scaled(grad: Tensor, factor: Tensor, backend: str) -> Tensor:
    """``grad * factor`` for a gradient that backward hands out and its 0-d upstream gradient: in place, one launch on a GPU; a new tensor in a
    compiled graph (see :func:`may_overwrite`), where it is arithmetic that the compiler fuses with what comes next."""
    if torch.compiler.is_compiling():
        return (grad.to(row_dtype(grad)) * factor).to(grad.dtype)
    if grad.device.type != "cpu" or factor.item() != 1:  # on the CPU it is known here, so most calls do not even reach the op
        scale_(grad, factor, backend)
    return grad
