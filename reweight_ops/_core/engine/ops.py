"""The package's custom ops.

They are the primitives of a backend as ``torch.ops.reweight_ops.*``, with fakes, so
that torch.compile can trace them.

Every op takes logits of shape ``R + (V,)`` (with ``drop_last`` one more position), flat
``[N]`` rows, and a backend's name. A mutating op writes the gradient over the logits
and bumps the version counter. An earlier autograd user of the logits then raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import Library, infer_schema

from ..backends.base import (
    DERIVATIVES,
    DIVERGENCE_STATS,
    LOSS_ROWS,
    DivergenceInputs,
    RowInputs,
    SoftmaxParams,
)
from ..backends.log_p_moments import MEAN_OVER_P_SQ, VARIANCE, log_p_moment
from ..backends.logp_low import LOGP_LOW, logp_low
from ..backends.mean_logit import MEAN_LOGIT, mean_logit
from ..backends.scale import scale_in_torch
from ..backends.select import load
from ..backends.shards import empty_shard
from ..compiler import never_compiled
from ..formula.loss_program import Program
from ..rows.groups import IGNORE_INDEX
from ..transforms import is_wrapped
from .memory import empty

_library = Library("reweight_ops", "DEF")  # type: ignore[no-untyped-call]

#: Maps an op to the function that it runs. For a meta tensor that is its fake. A test
#: that counts what a device runs looks the function up here.
BODIES: dict[Any, Callable[..., Any]] = {}


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op for every device.

    ``torch.library.custom_op`` is not used. Its layers for autograd (ours is in
    :mod:`.autograd`) and for default arguments are Python too, and cost as much as
    everything else that a call does.
    """
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    # A compiled graph that calls the op must not be traced any further.
    _library.impl(name, never_compiled(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"reweight_ops::{name}", fake, lib=_library)
    defined = getattr(torch.ops.reweight_ops, name).default
    BODIES[defined] = function
    return defined


def op(
    fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that defines the function as an op of its name."""
    return lambda function: _define(
        function.__name__, infer_schema(function, mutates_args=mutates), function, fake
    )


def gradient_ops(
    name: str, write: Callable[..., Any], fake_rows: Callable[..., Tensor] | None = None
) -> tuple[Any, Any]:
    """Define the ops ``name`` and ``name_`` from ``write(out, logits, ...)``, which
    writes a gradient to ``out``.

    ``name`` returns a new tensor. ``name_`` writes over the logits. If ``write`` also
    returns rows, of the shape of ``fake_rows(logits, ...)``, they come first.
    """
    arguments = (
        infer_schema(write, mutates_args=())
        .removeprefix("(Tensor out, Tensor logits, ")
        .rpartition(" -> ")[0]
    )

    def out_of_place(logits: Tensor, *rest: Any) -> Any:
        out = empty(logits.shape, logits.dtype, logits.device)
        rows = write(out, logits, *rest)
        return out if rows is None else (rows, out)

    def in_place(logits: Tensor, *rest: Any) -> Any:
        if not logits.is_inference():
            increment_version(logits)
        return write(logits, logits, *rest)

    def fake_out_of_place(logits: Tensor, *rest: Any) -> Any:
        out = logits.new_empty(logits.shape)
        return out if fake_rows is None else (fake_rows(logits, *rest), out)

    def fake_in_place(logits: Tensor, *rest: Any) -> Any:
        return None if fake_rows is None else fake_rows(logits, *rest)

    return (
        _define(
            name,
            f"(Tensor logits, {arguments} -> "
            f"{'Tensor' if fake_rows is None else '(Tensor, Tensor)'}",
            out_of_place,
            fake_out_of_place,
        ),
        _define(
            f"{name}_",
            f"(Tensor(a!) logits, {arguments} -> {'()' if fake_rows is None else 'Tensor'}",
            in_place,
            fake_in_place,
        ),
    )


def called(defined: Any, *arguments: Any) -> Any:
    """What the op gives. Its body is called at once where nobody watches operations and
    the first tensor is a plain one with elements: on the way
    through PyTorch's dispatcher there is nothing to do then, and for few rows it takes
    longer than the body.
    """
    first = arguments[0]
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )
    if watched or type(first) is not Tensor or first.is_meta or is_wrapped(first):
        return defined(*arguments)
    return BODIES.get(defined, defined)(*arguments)


def without_last_position(t: Tensor, drop_last: bool) -> Tensor:
    """Return the positions of logits that have an id."""
    return t[..., :-1, :] if drop_last else t


def clear_last(out: Tensor, drop_last: bool) -> None:
    """Clear the gradient of the position without an id."""
    if drop_last:
        out[..., -1, :].zero_()


def row_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of row arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def fake_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    stats: str,
    backend: str,
) -> Tensor:
    """The table of :func:`token_stats`, empty."""
    return logits.new_empty((len(stats.split(",")), ids.numel()), dtype=row_dtype(logits))


#: Statistics without a kernel in any backend.
_UNFUSED: dict[str, Callable[[Tensor, Tensor, SoftmaxParams], Tensor]] = {
    MEAN_LOGIT: mean_logit,
    VARIANCE: functools.partial(log_p_moment, VARIANCE),
    MEAN_OVER_P_SQ: functools.partial(log_p_moment, MEAN_OVER_P_SQ),
}


@op(fake_stats)
def token_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    stats: str,
    backend: str,
) -> Tensor:
    softmax, z = (
        SoftmaxParams(vocab_size, softcap, vocab_start, vocab_total),
        without_last_position(logits, drop_last),
    )
    return stats_of(
        z,
        ids,
        temperature,
        softmax,
        stats,
        functools.partial(load(backend).token_stats, z, ids, temperature, softmax),
    )


def stats_of(
    z: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    stats: str,
    read: Callable[[tuple[str, ...]], Tensor],
) -> Tensor:
    """``[S, N]``: the statistics named in ``stats``, of which ``read`` gives those that
    a backend has.
    """
    names = stats.split(",")
    if not softmax.vocab_size:
        return empty_shard(tuple(names), ids.numel(), row_dtype(z), z.device)
    kernel = tuple([name for name in names if name not in (*_UNFUSED, LOGP_LOW)])
    found = read(kernel)
    if len(kernel) == len(names):
        return found
    rows = dict(zip(kernel, found.unbind(), strict=True))
    for name in names:
        if name in _UNFUSED:
            # As with every statistic, it is 0 in an ignored row and NaN in a row
            # without a distribution.
            value = torch.where(
                rows["lse"].isnan(), math.nan, _UNFUSED[name](z, temperature, softmax)
            )
            rows[name] = torch.where(ids == IGNORE_INDEX, 0, value)
    if LOGP_LOW in names:
        rows[LOGP_LOW] = logp_low(z, ids, temperature, softmax, rows)
    return torch.stack([rows[name] for name in names])


def _write_token_grad(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    entropy: Tensor | None,
    log_sum_p_sq: Tensor | None,
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    d_log_sum_p_sq: Tensor | None,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    backend: str,
) -> None:
    if not vocab_size:  # a shard without columns, or with padding only
        out.zero_()
        return
    known = {
        "logp": logp,
        "lse": lse,
        "lse_low": lse_low,
        "entropy": entropy,
        "log_sum_p_sq": log_sum_p_sq,
    }
    stats = {name: t for name, t in known.items() if t is not None}
    derivatives = dict(zip(DERIVATIVES, (d_logp, d_entropy, d_lse, d_log_sum_p_sq), strict=True))
    softmax = SoftmaxParams(vocab_size, softcap, vocab_start, vocab_total)
    load(backend).token_grad(
        without_last_position(logits, drop_last),
        ids,
        temperature,
        softmax,
        stats,
        derivatives,
        without_last_position(out, drop_last),
    )
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
    softmax, inputs = (
        SoftmaxParams(vocab_size, softcap),
        RowInputs(weights, old_logp, adv, ref_logp, sampling_logp),
    )
    primitive = load(backend).token_loss_grad
    rows = primitive(
        without_last_position(logits, drop_last),
        ids,
        temperature,
        softmax,
        inputs,
        Program.decode(program),
        params,
        without_last_position(out, drop_last),
    )
    clear_last(out, drop_last)
    return rows


token_loss_grad, token_loss_grad_ = gradient_ops(
    "token_loss_grad", _write_token_loss_grad, _fake_loss_rows
)


# ---- two logits tensors


def _two(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
) -> DivergenceInputs:
    return DivergenceInputs(
        without_last_position(logits, drop),
        other,
        ids,
        t,
        t_other,
        SoftmaxParams(vocab, cap),
        SoftmaxParams(vocab, other_cap),
    )


def _fake_table(logits: Tensor, other: Tensor, ids: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(DIVERGENCE_STATS), ids.numel()), dtype=row_dtype(logits))


@op(_fake_table)
def divergence_stats(
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
    backend: str,
) -> Tensor:
    if not vocab:
        return empty_shard(DIVERGENCE_STATS, ids.numel(), row_dtype(logits), logits.device)
    return load(backend).divergence_stats(
        _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop)
    )


def _write_divergence_grad(
    out: Tensor,
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    table: Tensor,
    derivatives: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
    backend: str,
) -> None:
    if not vocab:
        out.zero_()
        return
    load(backend).divergence_grad(
        _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop),
        table,
        derivatives,
        without_last_position(out, drop),
    )
    clear_last(out, drop)


divergence_grad, divergence_grad_ = gradient_ops("divergence_grad", _write_divergence_grad)


def _write_divergence_loss_grad(
    out: Tensor,
    logits: Tensor,
    other: Tensor,
    ids: Tensor,
    t: Tensor,
    t_other: Tensor,
    constants: Tensor,
    weights: Tensor,
    vocab: int,
    cap: float,
    other_cap: float,
    drop: bool,
    backend: str,
) -> Tensor:
    two = _two(logits, other, ids, t, t_other, vocab, cap, other_cap, drop)
    table = load(backend).divergence_loss_grad(
        two, constants, weights, without_last_position(out, drop)
    )
    clear_last(out, drop)
    return table


divergence_loss_grad, divergence_loss_grad_ = gradient_ops(
    "divergence_loss_grad", _write_divergence_loss_grad, _fake_table
)


# ---- what backward does with a finished gradient


def may_overwrite(consume: bool) -> bool:
    """Whether backward may write a gradient over logits: never in a compiled graph.

    There a write becomes a copy with the strides that the logits had when the graph was
    traced. Inductor may have saved them with other strides, because it pads rows on
    GPUs (and may save what backward was to recompute). The copy then takes wrong
    elements, which silently gives a wrong gradient (PyTorch 2.11 and 2.13). Therefore
    the op that a compiled backward calls returns a new tensor. A write in forward is
    over a tensor of the same graph, whose strides are kept.
    """
    return consume and not torch.compiler.is_compiling()


@op(lambda grad, factor, backend: None, mutates=("grad",))
def scale_(grad: Tensor, factor: Tensor, backend: str) -> None:
    if not grad.is_inference():
        increment_version(grad)
    (load(backend).scale or scale_in_torch)(grad, factor)


def scaled(grad: Tensor, factor: Tensor, backend: str) -> Tensor:
    """``grad * factor`` for a gradient that backward hands out and its 0-d upstream
    gradient: in place, one launch on a GPU; a new tensor in a
    compiled graph (see :func:`may_overwrite`), where it is arithmetic that the compiler
    fuses with what comes next.
    """
    if torch.compiler.is_compiling():
        return (grad.to(row_dtype(grad)) * factor).to(grad.dtype)
    # on the CPU the factor is known here, so most calls do not reach the op
    if grad.device.type != "cpu" or factor.item() != 1:
        called(scale_, grad, factor, backend)
    return grad
