"""Statistics and gradients of kept sets (sampling masks) as custom ops.

A call's kept logits become packed rows, and their gradient goes back to its place.

Every op takes, after the logits: ``position`` (the place of each row's id in its set),
``token_ids``, ``row`` and ``bounds`` of
:class:`~reweight_ops._core.calls.sampling_mask.KeptSets`. A statistic named
``vocabulary_<name>`` is of the whole row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import DERIVATIVES, LOSS_ROWS, VOCABULARY, PackedRows, RowInputs, SoftmaxParams
from ..backends.log_p_moments import MEAN_OVER_P_SQ, VARIANCE, log_p_moment
from ..backends.logp_low import LOGP_LOW
from ..backends.reference_packed import filled
from ..backends.select import load
from ..backends.shards import empty_shard
from ..formula.loss_program import ONE_PASS, STATISTICS, Program, loss_graph
from ..formula.program import evaluate_rows
from ..rows.groups import IGNORE_INDEX
from .kept_shards import ShardRows
from .ops import BODIES, clear_last, gradient_ops, op, row_dtype, token_stats, without_last_position

#: Statistics of packed rows without a kernel.
_MOMENTS = (VARIANCE, MEAN_OVER_P_SQ)
#: Devices where the first and the last entry of a few rows can be read without waiting.
_READABLE = ("cpu",)
#: The statistics that a row's gradient by its entropy reads.
OF_ENTROPY = ("logp", "lse", "lse_low", "entropy")


class _Kept:
    """The entries of a call's sets in the logits ``z`` ``R + (V,)`` of its rows.

    If it takes no wait, they are only the entries that may belong to these rows.
    """

    def __init__(
        self, z: Tensor, position: Tensor, token_ids: Tensor, row: Tensor, bounds: Tensor
    ) -> None:
        count = position.numel()
        if z.device.type in _READABLE and count and token_ids.numel():
            first, last = int(bounds[0].min()), int(bounds[1].max())
            token_ids, row, bounds = token_ids[first:last], row[first:last], bounds - first
        self.position, self.bounds = position, bounds.contiguous()
        self.inside = (row >= 0) & (row < count)
        flat = row.clamp(0, max(count - 1, 0))
        self.where = (
            (flat, token_ids) if z.dim() == 2 else (flat // z.size(1), flat % z.size(1), token_ids)
        )

    def gather(
        self, z: Tensor, temperature: Tensor, softcap: float, wide: bool = False
    ) -> PackedRows:
        """Return the packed rows. With ``wide`` they are in the dtype of row
        arithmetic.

        Entries of other rows are numbers that are never read.
        """
        values = z[self.where] if self.position.numel() else z.new_zeros(0)
        return PackedRows(
            values.to(row_dtype(z)) if wide else values,
            self.bounds,
            self.position,
            temperature,
            softcap,
        )

    def scatter(self, values: Tensor, out: Tensor, add: bool) -> None:
        """Write the entries of the rows to ``out``, or add them to it.

        Their number is not known. Entries of other rows act as the first entry of these
        rows.
        """
        if not self.position.numel() or not values.numel():
            return
        values = (out[self.where].to(values.dtype) + values if add else values).to(out.dtype)
        # without any entry, one of another row, whose value is 0
        first = self.inside.long().argmax().view(1)
        place = tuple(torch.where(self.inside, at, at[first]) for at in self.where)
        out[place] = torch.where(self.inside, values, values[first])


def _statistics(
    z: Tensor,
    kept: _Kept,
    temperature: Tensor,
    softmax: SoftmaxParams,
    names: list[str],
    backend: str,
) -> dict[str, Tensor]:
    own = [name for name in names if not name.startswith(VOCABULARY)]
    shard = ShardRows(kept.gather(z, temperature, softmax.softcap), softmax)
    kernel = tuple(name for name in own if name not in (*_MOMENTS, LOGP_LOW))
    primitive = load(backend).packed_stats
    assert primitive is not None, "the backend was chosen for it"
    found = dict(zip(kernel, primitive(shard.rows, kernel).unbind(), strict=True)) if kernel else {}
    for name in own:
        if name in _MOMENTS:
            padded, _ = filled(shard.rows)
            moment = log_p_moment(
                name, padded, temperature, SoftmaxParams(padded.size(1), softmax.softcap)
            )
            found[name] = torch.where(
                shard.rows.ids == IGNORE_INDEX,
                0,
                torch.where(shard.rows.ids < 0, torch.nan, moment),
            )
    found = shard.statistics(found)
    whole = [name.removeprefix(VOCABULARY) for name in names if name.startswith(VOCABULARY)]
    if whole:
        asked = list(dict.fromkeys(("lse", *whole)))
        table = BODIES[token_stats](
            z, shard.ids, temperature, *shard.softmax, False, ",".join(asked), backend
        )
        found |= {VOCABULARY + name: t for name, t in zip(asked, table.unbind(), strict=True)}
    return found


def _gradient(
    out: Tensor,
    z: Tensor,
    kept: _Kept,
    temperature: Tensor,
    softmax: SoftmaxParams,
    known: dict[str, Tensor],
    by: dict[str, Tensor | None],
    backend: str,
) -> None:
    """Write the gradient of the rows of logits ``z`` to ``out``, which may be ``z``."""
    by_whole = by.get(VOCABULARY + "entropy")
    shard = ShardRows(
        kept.gather(z, temperature, softmax.softcap, wide=by_whole is not None), softmax
    )
    found, primitive = torch.zeros_like(shard.rows.values), load(backend).packed_grad
    assert primitive is not None, "the backend was chosen for it"
    stats = {name: t for name, t in known.items() if not name.startswith(VOCABULARY)}
    primitive(
        shard.rows, *shard.derivatives(stats, {name: by.get(name) for name in DERIVATIVES}), found
    )
    if by_whole is None:
        out.zero_()
    else:
        whole = {name: known[VOCABULARY + name] for name in OF_ENTROPY}
        load(backend).token_grad(
            z, shard.ids, temperature, shard.softmax, whole, {"entropy": by_whole}, out
        )
    kept.scatter(found, out, add=by_whole is not None)


def _fake_stats(
    logits: Tensor,
    position: Tensor,
    token_ids: Tensor,
    row: Tensor,
    bounds: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    stats: str,
    backend: str,
) -> Tensor:
    return logits.new_empty((len(stats.split(",")), position.numel()), dtype=row_dtype(logits))


@op(_fake_stats)
def kept_stats(
    logits: Tensor,
    position: Tensor,
    token_ids: Tensor,
    row: Tensor,
    bounds: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    stats: str,
    backend: str,
) -> Tensor:
    z, names = without_last_position(logits, drop_last), stats.split(",")
    if not vocab_size:
        return empty_shard(tuple(names), position.numel(), row_dtype(logits), logits.device)
    kept, softmax = (
        _Kept(z, position, token_ids, row, bounds),
        SoftmaxParams(vocab_size, softcap, vocab_start, vocab_total),
    )
    found = _statistics(z, kept, temperature, softmax, names, backend)
    return torch.stack([found[name] for name in names])


def stacked(
    known: dict[str, Tensor], by: dict[str, Tensor | None]
) -> tuple[Tensor, str, Tensor, str]:
    """Return statistics, and derivatives by them, as :data:`kept_grad` takes them. At
    least one of ``by`` is given.
    """
    given = {name: g for name, g in by.items() if g is not None}
    return (
        torch.stack([*known.values()]),
        ",".join(known),
        torch.stack([*given.values()]),
        ",".join(given),
    )


def _write_kept_grad(
    out: Tensor,
    logits: Tensor,
    position: Tensor,
    token_ids: Tensor,
    row: Tensor,
    bounds: Tensor,
    temperature: Tensor,
    table: Tensor,
    names: str,
    d_rows: Tensor,
    by: str,
    vocab_size: int,
    softcap: float,
    vocab_start: int,
    vocab_total: int,
    drop_last: bool,
    backend: str,
) -> None:
    """Write the gradient. ``table`` ``[K, N]`` has the statistics ``names``, and
    ``d_rows`` the derivatives of the loss by those named in ``by``.
    """
    if not vocab_size:
        out.zero_()
        return
    softmax = SoftmaxParams(vocab_size, softcap, vocab_start, vocab_total)
    z, kept = (
        without_last_position(logits, drop_last),
        _Kept(without_last_position(logits, drop_last), position, token_ids, row, bounds),
    )
    known = dict(zip(names.split(","), table.unbind(), strict=True))
    derivatives: dict[str, Tensor | None] = dict(zip(by.split(","), d_rows.unbind(), strict=True))
    _gradient(
        without_last_position(out, drop_last),
        z,
        kept,
        temperature,
        softmax,
        known,
        derivatives,
        backend,
    )
    clear_last(out, drop_last)


kept_grad, kept_grad_ = gradient_ops("kept_grad", _write_kept_grad)


def _fake_loss_rows(logits: Tensor, position: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((len(LOSS_ROWS), position.numel()), dtype=row_dtype(logits))


def _write_kept_loss_grad(
    out: Tensor,
    logits: Tensor,
    position: Tensor,
    token_ids: Tensor,
    row: Tensor,
    bounds: Tensor,
    temperature: Tensor,
    weights: Tensor,
    old_logp: Tensor | None,
    adv: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    params: Tensor,
    program: str,
    over_vocabulary: bool,
    vocab_size: int,
    softcap: float,
    drop_last: bool,
    backend: str,
) -> Tensor:
    softmax, z = SoftmaxParams(vocab_size, softcap), without_last_position(logits, drop_last)
    kept, inputs = (
        _Kept(z, position, token_ids, row, bounds),
        RowInputs(weights, old_logp, adv, ref_logp, sampling_logp),
    )
    own = ("logp", "entropy", "lse", "lse_low", "log_sum_p_sq")
    whole = [VOCABULARY + name for name in OF_ENTROPY] if over_vocabulary else []
    known = _statistics(z, kept, temperature, softmax, [*own, *whole], backend)
    entropy = VOCABULARY + "entropy" if over_vocabulary else "entropy"
    leaves = {
        "old_logp": known["logp"],
        "logp": known["logp"],
        "entropy": known[entropy],
        "log_sum_p_sq": known["log_sum_p_sq"],
    }
    evaluate = load(backend).evaluate_rows or evaluate_rows
    leaves |= inputs.stored()
    weighted, loss, *by = evaluate(
        Program.decode(program),
        params,
        leaves,
        inputs.row_weights,
        ONE_PASS,
        position != IGNORE_INDEX,
    )
    graph = loss_graph(Program.decode(program))
    names = {"logp": "logp", "entropy": entropy, "log_sum_p_sq": "log_sum_p_sq"}
    derivatives: dict[str, Tensor | None] = {
        names[x]: d for x, d in zip(STATISTICS, by, strict=True) if graph.moves(x)
    }
    _gradient(
        without_last_position(out, drop_last),
        z,
        kept,
        temperature,
        softmax,
        known,
        derivatives,
        backend,
    )
    clear_last(out, drop_last)
    rows = torch.stack([known["logp"], known[entropy], weighted, loss, *by[:2]])
    return torch.where((position < 0) & (position != IGNORE_INDEX), torch.nan, rows)


kept_loss_grad, kept_loss_grad_ = gradient_ops(
    "kept_loss_grad", _write_kept_loss_grad, _fake_loss_rows
)
