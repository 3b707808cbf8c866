"""Statistics and the likeliest ids of every row, as one custom op: in the same read
where the backend has that, and otherwise in two.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.base import Backend, SoftmaxParams
from ..backends.picked import top_ids
from ..backends.select import load
from .again import TORCH
from .ops import fake_stats, op, stats_of, without_last_position


def _serves(backend: Backend, top: int) -> bool:
    return backend.top_stats is not None and top <= backend.most_top


def search_of(name: str, top: int) -> str | None:
    """How a call on this backend finds the ``top`` likeliest ids, in words; None if
    there are none to find.
    """
    if not top:
        return None
    if name == TORCH:
        return "by torch.topk, one more read of the logits"
    backend = load(name)
    if _serves(backend, top):
        return "in the read of the statistics"
    limit = (
        "it has no search beside its statistics"
        if backend.top_stats is None
        else f"its own search finds up to {backend.most_top}"
    )
    return f"by torch.topk, one more read of the logits: {limit}"


def _fake_both(
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
    top: int,
) -> tuple[Tensor, Tensor]:
    softmax = (vocab_size, softcap, vocab_start, vocab_total)
    return fake_stats(logits, ids, temperature, *softmax, drop_last, stats, backend), ids.new_empty(
        (ids.numel(), min(top, vocab_size))
    )


@op(_fake_both)
def top_stats(
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
    top: int,
) -> tuple[Tensor, Tensor]:
    """The table of ``token_stats``, and the ids ``[N, min(top, vocab_size)]``; see
    :func:`~reweight_ops._core.backends.picked.top_ids`.
    """
    softmax, z = (
        SoftmaxParams(vocab_size, softcap, vocab_start, vocab_total),
        without_last_position(logits, drop_last),
    )
    top, own, chosen = min(top, vocab_size), load(backend), ids.new_empty(ids.numel(), 0)

    def read(names: tuple[str, ...]) -> Tensor:
        nonlocal chosen
        if own.top_stats is None or not _serves(own, top):
            chosen = top_ids(z, ids, top, softmax)
            return own.token_stats(z, ids, temperature, softmax, names)
        table, chosen = own.top_stats(z, ids, temperature, softmax, names, top)
        return table

    return stats_of(z, ids, temperature, softmax, stats, read), chosen
