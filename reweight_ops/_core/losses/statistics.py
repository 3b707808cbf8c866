"""The public ops that compute row statistics from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...errors import InvalidCall
from ..backends.mean_logit import MEAN_LOGIT
from ..calls.keywords import SoftmaxKeywords, SoftmaxOptions, check_flag, parse
from ..calls.logits import resolve_logits
from ..calls.picked import check_top, resolve_ids
from ..engine.output import TokenStats
from ..engine.picks import PICKED, PICKED_IDS, Picks
from ..engine.run import Call
from ..engine.source import Source
from ..engine.sources import LogitsSource
from ..engine.statistics import StatisticsObjective
from ..ranges import Count
from ..rows.numerics import log1mexp_or_inf
from ..rows.rows import Rows
from .explain import public_op

#: Maps a public statistic to the row statistics from which it is made.
_STATS = {
    "logps": ("logp",),
    "entropies": ("entropy",),
    "lse": ("lse",),
    "log_sum_p_sq": ("log_sum_p_sq",),
    "max_logp": ("max_logp",),
    "is_top1": ("logp", "max_logp"),
    "log1m_p": ("logp",),
    "mean_logits": (MEAN_LOGIT,),
    "selected_logps": (PICKED,),
    "topk_logps": (PICKED,),
    "topk_ids": (PICKED_IDS,),
}

#: Maps an argument to the statistics that read it.
_PICKING = {"selected_ids": ("selected_logps",), "top_k": ("topk_logps", "topk_ids")}


def logps_call(source: Source, return_entropy: bool) -> Call[Tensor | tuple[Tensor, Tensor]]:
    """Return the call of an op that returns log-probs, or ``(logps, entropies)``."""
    unflatten = source.rows.unflatten
    if return_entropy:
        return Call(
            source,
            StatisticsObjective(
                ("logp", "entropy"), lambda s: (unflatten(s["logp"]), unflatten(s["entropy"]))
            ),
        )
    return Call(source, StatisticsObjective(("logp",), lambda s: unflatten(s["logp"])))


@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: Literal[False] = False,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor: ...


@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: Literal[True],
    **keywords: Unpack[SoftmaxKeywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...


@public_op
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    return_entropy: bool = False,
    **keywords: Unpack[SoftmaxKeywords],
) -> Call[Tensor | tuple[Tensor, Tensor]]:
    """Log-probs of the given ids, and optionally the entropies, all differentiable.

    They are ``log_softmax(x)[id]`` and ``-Σ p log p`` with ``x = cap·tanh(z/cap)/T``.

    This is the primitive for a trainer that keeps its own loss.

    Args:
        logits: ``R + (V,)``, fp16, bf16, fp32 or fp64; any batch and row stride, the
            last dimension contiguous. The op never shifts.
        completion_ids: R, int32 or int64. ``-100`` marks an ignored row.
        completion_mask: R, any dtype; 0 marks an ignored row. Ignored rows are never
            read. Their results are 0, and their gradient is exactly 0.
        return_entropy: also return the entropies.
        temperature: T, a positive number, a 0-d tensor, or one number per row (or
            sequence). A tensor that requires grad gets its gradient in two passes. That
            of the entropy takes one more read of the logits.
        softcap: the cap of a tanh soft cap on the raw logits. None disables it.
        vocab_size: columns of the softmax if the head is padded beyond them. The
            gradient of the others is exactly 0.
        drop_last: logits have one more position than ids (the last is unread, its
            gradient is 0). This layout needs no copy in backward.
        consume_logits: write the gradient over the logits in backward; saves one tensor
            of their size. Using them afterwards is an error.
        sampling_mask: the ids that the sampler kept of each row, a
            :class:`SamplingMask` or a bool mask ``R + (V,)``. Log-probs and everything
            else are those of the distribution renormalised over these ids. Only their
            logits are read, and the gradient of all others is exactly 0.
        entropy_over: with a mask, the entropy of the ``"kept"`` ids or of the whole
            ``"vocabulary"``. The latter is then read too, and its gradient is
            everywhere.
        backend: ``"auto"``, or ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``,
            which then never falls back.

    Returns:
        ``logps`` of shape R in fp32 (fp64 for fp64 logits), or ``(logps, entropies)``.

    Raises:
        InvalidCall: a shape, dtype or id that does not fit, or an id that is not kept
            (on a GPU a bad id gives NaN in its row, without a synchronisation).
        UnsupportedRequest, BackendUnavailable: no backend, or not the named one, can
            run this.

    >>> import torch, reweight_ops as rw
    >>> rw.token_logps(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    op = "token_logps"
    check_flag(op, "return_entropy", return_entropy)
    (options,) = parse(
        op, dict(keywords), SoftmaxOptions, own=("completion_mask", "return_entropy")
    )
    resolved = resolve_logits(
        op, logits, completion_ids, options, {"completion_mask": completion_mask}
    )
    return logps_call(LogitsSource(resolved), return_entropy)


@public_op
def token_stats(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    stats: Sequence[str] = ("logps", "entropies"),
    selected_ids: Tensor | None = None,
    top_k: Count[int] | None = None,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Call[TokenStats]:
    """Statistics of every row from one read of the logits.

    :class:`TokenStats` has the names, and :func:`token_logps` the arguments.

    ``logps``, ``entropies`` and ``lse`` are differentiable; ``log_sum_p_sq``,
    ``max_logp``, ``is_top1``, ``log1m_p`` and ``mean_logits`` are not. ``mean_logits``
    has no kernel and takes one more read, in PyTorch. So do the ids of ``topk_ids`` on
    the ``reference``, and with a ``top_k`` above 128. :func:`explain` says which.

    Args:
        selected_ids: the ids of ``selected_logps``, int32 or int64, ``R + (K,)``, or
            ``[K]`` for all rows. ``-100`` is padding: 0, without a gradient.
        top_k: the number of likeliest ids in ``topk_logps`` and ``topk_ids``, likeliest
            first.

    ``selected_logps`` and ``topk_logps`` are differentiable: with g_k the derivatives
    by them, the gradient is ``1/T · (Σ_k g_k·1[v = id_k] - p_v·Σ_k g_k)``. They come
    from the log-sum-exp of the same read and K logits; the gradient is one write for
    all of the statistics.

    Raises:
        InvalidCall: an id outside of the vocabulary (on a GPU a log-prob of NaN,
            without a gradient); an argument without its statistic, or the reverse.

    >>> import torch, reweight_ops as rw
    >>> logits, ids = torch.zeros(1, 4), torch.tensor([2])
    >>> rw.token_stats(logits, ids, stats=("log_sum_p_sq",)).log_sum_p_sq
    tensor([-1.3863])
    """
    op = "token_stats"
    (options,) = parse(
        op,
        dict(keywords),
        SoftmaxOptions,
        own=("completion_mask", "stats", "selected_ids", "top_k"),
    )
    check_stats(op, stats, selected_ids=selected_ids, top_k=top_k)
    named = {"completion_mask": completion_mask, "selected_ids": selected_ids}
    resolved = resolve_logits(op, logits, completion_ids, options, named)
    picks = resolve_picks(resolved.rows, selected_ids, top_k, resolved.softmax.total())
    return stats_call(LogitsSource(resolved, picks), stats, picks)


def check_stats(op: str, stats: Sequence[str], **picking: Any) -> None:
    """Raise for names that :class:`TokenStats` does not have, and if an argument in
    ``picking`` and its statistics are not both given.
    """
    if (
        not isinstance(stats, (tuple, list))
        or not stats
        or any(not isinstance(n, str) or n not in _STATS for n in stats)
    ):
        raise InvalidCall(f"{op}: stats is {stats!r}; expected some of {', '.join(_STATS)}.")
    for argument, names in _PICKING.items():
        wanted, given = [name for name in names if name in stats], picking[argument] is not None
        if given and not wanted:
            raise InvalidCall(
                f"{op}: {argument} would have no effect: put {' or '.join(map(repr, names))} "
                "into stats."
            )
        if wanted and not given:
            raise InvalidCall(f"{op}: the statistic {wanted[0]!r} needs {argument}.")


def resolve_picks(rows: Rows, selected_ids: Any, top_k: Any, vocab_size: int) -> Picks | None:
    """Return the ids whose log-probs are wanted, or None."""
    if selected_ids is None and top_k is None:
        return None
    given = (
        None
        if selected_ids is None
        else resolve_ids(rows, "selected_ids", selected_ids, vocab_size)
    )
    return Picks(given, 0 if top_k is None else check_top(rows, "top_k", top_k, vocab_size))


def stats_call(
    source: Source, stats: Sequence[str], picks: Picks | None = None
) -> Call[TokenStats]:
    """Return the call of an op that returns the named statistics. ``picks`` are those
    of the source.
    """
    rows = source.rows
    given = 0 if picks is None or picks.given is None else picks.given.size(-1)

    def finish(found: dict[str, Tensor]) -> TokenStats:
        values = {
            "logps": found["logp"],
            "lse": found["lse"],
            "entropies": found.get("entropy"),
            "max_logp": found.get("max_logp"),
        }
        values["log_sum_p_sq"] = found["log_sum_p_sq"].detach() if "log_sum_p_sq" in found else None
        logp = found["logp"].detach()
        values["mean_logits"] = found.get(MEAN_LOGIT)
        values["is_top1"] = (logp >= found["max_logp"]) & rows.keep if "is_top1" in stats else None
        values["log1m_p"] = (
            torch.where(rows.keep, log1mexp_or_inf(logp), 0) if "log1m_p" in stats else None
        )
        if picks is not None:
            values |= {
                "selected_logps": found[PICKED][:, :given],
                "topk_logps": found[PICKED][:, given:],
                "topk_ids": found[PICKED_IDS][:, given:],
            }
        return TokenStats(
            **{
                name: v.reshape(*rows.shape, *v.shape[1:])
                for name, v in values.items()
                if name in stats and v is not None
            }
        )

    reads = dict.fromkeys(part for name in stats for part in _STATS[name])
    return Call(source, StatisticsObjective(tuple(reads), finish))
