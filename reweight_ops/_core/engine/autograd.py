"""The autograd Functions on logits: statistics (two_pass) and the one-pass loss, of one
tensor and of two.

They call only registered custom ops, so torch.compile traces through them. They save
tensors by ``save_for_backward``. The version counters then catch a tensor that was
changed in between, and nothing is kept alive (or cloned) longer than autograd needs it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ReweightOpsError, UnsupportedRequest
from ..backends.base import DERIVATIVES, DIVERGENCE_STATS, VOCABULARY, SoftmaxParams
from ..backends.log_p_moments import MEAN_OVER_P_SQ, VARIANCE
from ..backends.logp_low import LOGP_LOW
from ..backends.mean_logit import MEAN_LOGIT
from ..backends.picked import Picked
from ..backends.shards import VocabShards, with_empty_shards
from ..calls.sampling_mask import KeptSets
from ..rows.groups import IGNORE_INDEX
from . import again, kept_ops, picked_ops
from . import ops as library
from .kept_ops import OF_ENTROPY
from .picks import PICKED, PICKED_IDS, Picks


class OpOptions(NamedTuple):
    """The options of every op of a call, apart from tensors and softmaxes."""

    drop_last: bool
    backend: str
    consume: bool
    shards: VocabShards | None = None


def forbid_second_backward(ctx: Any, op: str) -> None:
    """Raise at a second backward through a one-pass loss, and where autograd wants a
    graph of the gradient.

    The first backward scaled the gradient in place and gave it away. There is no graph
    of the gradient. A derivative through it would silently be 0.
    """
    if torch.compiler.is_compiling():
        return
    if again.wants_graph():
        raise UnsupportedRequest(
            f"{op}: create_graph=True asks a one-pass loss for second derivatives, but its "
            'gradient was computed in forward. plan="two_pass" has them.'
        )
    if getattr(ctx, "gradient_released", False):
        raise ReweightOpsError(
            f"{op}: a second backward through a one-pass loss. Its gradient was handed out by "
            "the first; "
            'plan="two_pass" computes it in backward and supports retain_graph=True.'
        )
    ctx.gradient_released = True


#: Statistics without a gradient.
FIXED = ("max_logp", MEAN_LOGIT, VARIANCE, MEAN_OVER_P_SQ, VOCABULARY + VARIANCE)

#: A statistic that the gradient kernel reads, but no caller.
LSE_LOW = "lse_low"


def asked_for(stats: str, needs_grad: bool, shards: VocabShards | None = None) -> str:
    """Return the names of the statistics to compute for a caller who wants ``stats``.

    For a shard they include those by which shards are merged.
    """
    if not needs_grad and shards is None:
        return stats
    names = [*stats.split(","), LSE_LOW]
    if VOCABULARY in stats:
        names += [VOCABULARY + name for name in OF_ENTROPY if VOCABULARY + name not in names]
    return ",".join(names if shards is None else [*names, LOGP_LOW])


def stats_table(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    sets: KeptSets | None,
    softmax: SoftmaxParams,
    options: OpOptions,
    wanted: str,
    picks: Picks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``[S, N]``: the statistics named in ``wanted``, over the vocabulary or over kept
    sets. Beside it the likeliest ids of ``picks``, of these columns.
    """
    rest, likeliest = (options.drop_last, wanted, options.backend), None
    if sets is not None:
        table = library.called(
            kept_ops.kept_stats, logits, ids, *sets[:3], temperature, *softmax, *rest
        )
    elif picks is not None and picks.top:
        table, likeliest = library.called(
            picked_ops.top_stats, logits, ids, temperature, *softmax, *rest, picks.top
        )
    else:
        table = library.called(library.token_stats, logits, ids, temperature, *softmax, *rest)
    return table, likeliest


def whole_rows(
    table: Tensor,
    names: str,
    ids: Tensor,
    shards: VocabShards | None,
    picks: Picks | None = None,
    picked: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return a table of the named statistics.

    A shard's is merged over all shards, and without the statistics that only serve the
    merge.
    knows of them (``picked``), the logits and ids of the whole row's."""
    if shards is None:
        return table, None
    states = shards.gathered(table if picked is None else torch.cat([table, picked.t()]))
    return merged_rows(states, names, ids, shards, picks)


def merged_rows(
    states: Tensor, names: str, ids: Tensor, shards: VocabShards, picks: Picks | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The same from the states ``[W, S, N]`` of all shards."""
    known = tuple(names.split(","))
    table = shards.merged(states[:, : len(known)], known, ids)
    return table, None if picks is None else picks.merged(
        states[:, len(known) :].transpose(1, 2), ids, shards.columns
    )


def forbid_graph(shards: VocabShards | None) -> None:
    """Raise, in backward, if autograd wants a graph of a gradient that one rank cannot
    form.
    """
    if shards is not None and again.wants_graph():
        raise UnsupportedRequest(
            f"{shards.op}: create_graph=True needs the whole vocabulary on one rank, and "
            "process_group shards it."
        )


def written_gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    known: dict[str, Tensor],
    by: dict[str, Tensor | None],
    options: OpOptions,
    over: bool,
    sets: KeptSets | None = None,
) -> Tensor | None:
    """Return the gradient by logits from derivatives ``by`` statistics ``known``, or
    None if it was written ``over`` them.

    Log-probs of picked ids are one derivative by lse in every column. The elements of
    those ids are written over.
    """
    if sets is not None:
        table = (
            *sets[:3],
            temperature,
            *kept_ops.stacked(known, by),
            *softmax,
            options.drop_last,
            options.backend,
        )
        found = library.called(
            kept_ops.kept_grad_ if over else kept_ops.kept_grad, logits, ids, *table
        )
        return None if over else found
    d_picked, picked = by.get(PICKED), None
    if d_picked is not None and softmax.vocab_size:
        z = library.without_last_position(logits, options.drop_last)
        picked = Picked(z, ids, known[PICKED_IDS], temperature, softmax)
        d_picked = picked.masked(d_picked)
        d_lse = by.get("lse")
        by = {**by, "lse": -d_picked.sum(-1) if d_lse is None else d_lse - d_picked.sum(-1)}
    arguments = (
        logits,
        ids,
        temperature,
        known["logp"],
        known["lse"],
        known[LSE_LOW],
        known.get("entropy"),
        known.get("log_sum_p_sq"),
        by.get("logp"),
        by.get("entropy"),
        by.get("lse"),
        by.get("log_sum_p_sq"),
        *softmax,
        options.drop_last,
        options.backend,
    )
    found = library.called(library.token_grad_ if over else library.token_grad, *arguments)
    if picked is not None and d_picked is not None:
        picked.write_gradient(
            library.without_last_position(logits if over else found, options.drop_last),
            ids,
            d_picked,
            known,
            by,
        )
    return None if over else found


class RowStatistics(torch.autograd.Function):
    """``(logp, entropy, lse, log_sum_p_sq)`` of every row, differentiable with respect
    to the logits.

    With picks there are also their log-probs and ids ``[N, K]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        sets: KeptSets | None,
        softmax: SoftmaxParams,
        options: OpOptions,
        stats: str,
        picks: Picks | None = None,
    ) -> tuple[Tensor, ...]:
        wanted = asked_for(stats, ctx.needs_input_grad[0] or picks is not None, options.shards)
        z, shards = library.without_last_position(logits, options.drop_last), options.shards
        table, likeliest = stats_table(
            logits, ids, temperature, sets, softmax, options, wanted, picks
        )
        own = (
            None
            if picks is None or shards is None
            else picks.states(z, ids, temperature, softmax, table.dtype, likeliest)
        )
        rows, picked = whole_rows(table, wanted, ids, shards, picks, own)
        if shards is not None:
            wanted = wanted.removesuffix(f",{LOGP_LOW}")
        ctx.set_materialize_grads(False)
        ctx.sets, ctx.softmax, ctx.options, ctx.names, ctx.wanted = (
            sets,
            softmax,
            options,
            stats.split(","),
            wanted.split(","),
        )
        known = rows.unbind()
        outputs = known[: len(ctx.names)]
        fixed = [t for name, t in zip(ctx.names, outputs, strict=True) if name in FIXED]
        if picks is not None:
            values, chosen = (None, picks.joined(likeliest)) if picked is None else picked
            by_name = dict(zip(ctx.wanted, known, strict=True))
            logps = Picked(z, ids, chosen, temperature, softmax, values).logps(
                by_name["lse"], by_name[LSE_LOW]
            )
            outputs, known = (*outputs, logps, chosen), (*known, chosen)
            ctx.names, fixed = [*ctx.names, PICKED, PICKED_IDS], [*fixed, chosen]
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(logits, ids, temperature, *known)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ids, temperature, *stats = ctx.saved_tensors
        options: OpOptions = ctx.options
        forbid_graph(options.shards)
        known = dict(zip((*ctx.wanted, PICKED_IDS), stats, strict=False))
        if again.wants_graph():
            softmax, all_names, sets, chosen = (
                ctx.softmax,
                ctx.names,
                ctx.sets,
                known.get(PICKED_IDS),
            )

            def formula(z: Tensor) -> tuple[Tensor, ...]:
                return again.token_stats(
                    again.rows(z, options.drop_last),
                    ids,
                    temperature,
                    softmax,
                    all_names,
                    chosen,
                    sets,
                )

            return again.gradient(formula, (logits,), grads)[0], *(None,) * 7
        by = {
            name: None if g is None else g.contiguous()
            for name, g in zip(ctx.names, grads, strict=True)
        }
        if all(by.get(name) is None for name in (*DERIVATIVES, PICKED, f"{VOCABULARY}entropy")):
            return (None,) * 8
        found = written_gradient(
            logits,
            ids,
            temperature,
            ctx.softmax,
            known,
            by,
            options,
            library.may_overwrite(options.consume),
            ctx.sets,
        )
        return logits if found is None else found, *(None,) * 7


class OnePassLoss(torch.autograd.Function):
    """``(loss, rows)``. Forward computes the gradient for upstream 1.

    Backward returns it, scaled on the device if necessary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        sets: KeptSets | None,
        inputs: tuple[Tensor | None, ...],
        params: Tensor,
        program: str,
        softmax: SoftmaxParams,
        options: OpOptions,
    ) -> tuple[Tensor, Tensor]:
        rest = (*softmax[:2], options.drop_last, options.backend)
        if sets is None:
            primitive, in_place = library.token_loss_grad, library.token_loss_grad_
            arguments: tuple[Any, ...] = (logits, ids, temperature, *inputs, params, program, *rest)
        else:
            primitive, in_place = kept_ops.kept_loss_grad, kept_ops.kept_loss_grad_
            arguments = (
                logits,
                ids,
                *sets[:3],
                temperature,
                *inputs,
                params,
                program,
                sets.over_vocabulary,
                *rest,
            )
        if options.consume:
            rows, grad = library.called(in_place, *arguments), logits
        else:
            rows, grad = library.called(primitive, *arguments)
        ctx.set_materialize_grads(False)
        ctx.backend = options.backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rows)
        return rows[2].sum(), rows

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, _rows: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        forbid_second_backward(ctx, "policy_loss")
        (grad,) = ctx.saved_tensors
        return library.scaled(grad, upstream, ctx.backend), *(None,) * 8


class FinishedLoss(torch.autograd.Function):
    """The loss of a ``table`` of ``token_loss_grad`` whose gradient for upstream 1
    exists already.

    Backward returns it like :class:`OnePassLoss`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, grad: Tensor, table: Tensor, backend: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.save_for_backward(grad)
        return table[2].sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return OnePassLoss.backward(ctx, upstream, None)[:4]


#: The softmaxes as they cross the boundary of an op on two tensors: the columns of
#: both, and their soft caps.
Softmaxes = tuple[int, float, float]


def with_empty(
    table: Tensor, two: tuple[Tensor, ...], softmaxes: Softmaxes, backend: str
) -> Tensor:
    """Return the divergences of a shard whose logits of one tensor may all be -inf.

    The kernel has no divergences of such rows. Where they are possible, the statistics
    of each tensor are read too. On a GPU and in a graph this is always so, because
    nothing waits to see whether it is necessary.
    """
    logits, other, ids, t, t_other = two
    vocab_size, cap, other_cap = softmaxes
    looked = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if not vocab_size or (looked and not bool(table[DIVERGENCE_STATS.index("lse")].isnan().any())):
        return table
    inside, names = torch.where(ids == IGNORE_INDEX, IGNORE_INDEX, 0), "lse,lse_low,entropy"
    of = ((logits, t, cap), (other, t_other, other_cap))
    p, q = (
        library.called(
            library.token_stats,
            z,
            inside,
            heat,
            vocab_size,
            c,
            0,
            vocab_size,
            False,
            names,
            backend,
        )
        for z, heat, c in of
    )
    return with_empty_shards(table, p, q)


def divergence_table(
    tensors: tuple[Tensor, ...], softmaxes: Softmaxes, options: OpOptions
) -> Tensor:
    """``[len(DIVERGENCE_STATS), N]``; of a shard's logits those of whole rows."""
    table: Tensor = library.called(
        library.divergence_stats, *tensors, *softmaxes, options.drop_last, options.backend
    )
    if options.shards is None:
        return table
    z, *rest = tensors
    table = with_empty(
        table,
        (library.without_last_position(z, options.drop_last), *rest),
        softmaxes,
        options.backend,
    )
    return options.shards.merged_divergences(options.shards.gathered(table), rest[1])


class DivergenceStatistics(torch.autograd.Function):
    """``(KL(q‖p), KL(p‖q), H(p), H(q))`` of every row, ``[N]`` each; the first three
    are differentiable with respect to the logits of p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        other: Tensor,
        ids: Tensor,
        t: Tensor,
        t_other: Tensor,
        softmaxes: Softmaxes,
        options: OpOptions,
    ) -> tuple[Tensor, ...]:
        table = divergence_table((logits, other, ids, t, t_other), softmaxes, options)
        ctx.set_materialize_grads(False)
        ctx.softmaxes, ctx.options = softmaxes, options
        outputs = tuple(row.clone() for row in table[:4])
        ctx.mark_non_differentiable(outputs[3])
        ctx.save_for_backward(logits, other, ids, t, t_other, table)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads[:3]):
            return (None,) * 7
        *tensors, table = ctx.saved_tensors
        options: OpOptions = ctx.options
        forbid_graph(options.shards)
        if again.wants_graph():
            logits, *rest = tensors

            def formula(z: Tensor) -> tuple[Tensor, ...]:
                return again.divergence_stats((z, *rest), ctx.softmaxes, options.drop_last)

            (grad,) = again.gradient(formula, (logits,), (*grads[:3], None))
            # an infinite KL(p‖q) has a gradient of NaN
            if grad is not None and grads[1] is not None:
                is_nan = (table[1].isinf() & (grads[1] != 0)).view(*tensors[1].shape[:-1], 1)
                grad = torch.where(
                    F.pad(is_nan, (0, 0, 0, 1)) if options.drop_last else is_nan, math.nan, grad
                )
            return grad, *(None,) * 6
        derivatives = torch.stack(
            [torch.zeros_like(table[0]) if g is None else g for g in grads[:3]]
        )
        arguments = (
            *tensors,
            table,
            derivatives,
            *ctx.softmaxes,
            options.drop_last,
            options.backend,
        )
        if library.may_overwrite(options.consume):
            library.called(library.divergence_grad_, *arguments)
            return tensors[0], *(None,) * 6
        return library.called(library.divergence_grad, *arguments), *(None,) * 6


class OnePassDivergence(torch.autograd.Function):
    """``(Σ weights·Σ_k constants_k·stat_k, table)``. Forward computes the gradient for
    upstream 1, and backward returns it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        other: Tensor,
        ids: Tensor,
        t: Tensor,
        t_other: Tensor,
        constants: Tensor,
        weights: Tensor,
        softmaxes: Softmaxes,
        options: OpOptions,
    ) -> tuple[Tensor, Tensor]:
        arguments = (
            logits,
            other,
            ids,
            t,
            t_other,
            constants,
            weights,
            *softmaxes,
            options.drop_last,
            options.backend,
        )
        if options.consume:
            table, grad = library.called(library.divergence_loss_grad_, *arguments), logits
        else:
            table, grad = library.called(library.divergence_loss_grad, *arguments)
        ctx.backend = options.backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(table)
        return weighted_sum(table, constants, weights), table

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_backward(ctx, "distillation_loss")
        (grad,) = ctx.saved_tensors
        return library.scaled(grad, upstream, ctx.backend), *(None,) * 8


def weighted_sum(table: Tensor, constants: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_i w_i·Σ_k c_k·table[k, i]``. A factor of 0 selects 0, even beside an
    infinite divergence.
    """
    terms = torch.where(constants[:, None] == 0, 0, constants[:, None] * table[:3]).sum(0)
    return torch.where(weights == 0, 0, weights * terms).sum()
