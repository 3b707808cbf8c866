"""A vocabulary in shards: rank by rank in a group, each rank with its own columns of every row. How the shards' statistics become a row's.

Every backend's statistics of a shard serve, for they merge: with l_w the log-sum-exp of shard w and L that of the row, the shard's probability is
``m_w = exp(l_w - L)``, and ::

    logp = logp_w + log m_w  of the shard with the target        H = Σ_w m_w·(H_w - log m_w)        Σp² = Σ_w m_w²·(Σp²)_w

L is taken relative to the largest shard, by ``log1p`` of what the others have: a sure token keeps the digits of its log-prob. All of it is in fp64, on
``[W, N]`` numbers, in the order of ranks: every rank finds the same bits, and they depend on the shards' own statistics alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from ..rows.ranks import gathered, size_and_rank
from .base import DIVERGENCE_STATS, VOCABULARY, SoftmaxParams
from .log_p_moments import MEAN_OVER_P_SQ, VARIANCE
from .logp_low import LOGP_LOW
from .mean_logit import MEAN_LOGIT
from .reference_token import LARGEST_LSE

#: What is always among the statistics of a shard, for the others merge by it.
MERGED_BY = ("lse", "lse_low")


@dataclass(frozen=True)
class VocabShards:
    """The columns of every rank that are in the softmax, in the order of ranks; ``total`` of all."""

    op: str
    group: Any
    columns: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.columns)

    def params(self, softcap: float) -> SoftmaxParams:
        """The softmax of this rank's columns."""
        _, rank = size_and_rank(self.group)
        return SoftmaxParams(self.columns[rank], softcap, sum(self.columns[:rank]), self.total)

    def gathered(self, table: Tensor) -> Tensor:
        """``[W, S, N]``: the states of all shards, of this one's ``[S, N]``. One collective of ``4·S·N`` bytes a rank (8 in fp64)."""
        return gathered(self.op, self.group, table)

    def merged(self, states: Tensor, names: tuple[str, ...], ids: Tensor) -> Tensor:
        """The statistics of whole rows from the ``states`` ``[W, S, N]`` of all shards, of which ``names`` are the rows; of a row's kept set and of its
        whole vocabulary each by their own. All but :data:`LOGP_LOW`, which is one of a log-prob's parts."""
        dtype, found = states.dtype, dict[str, Tensor]()
        for prefix in ("", VOCABULARY):
            own = {
                name.removeprefix(prefix): states[:, k].double()
                for k, name in enumerate(names)
                if name.startswith(VOCABULARY) == bool(prefix)
            }
            if own:
                share = _Shares(own["lse"], own["lse_low"])
                found |= {prefix + name: self._statistic(name, own, share, dtype) for name in own if name != LOGP_LOW}
        rows = torch.stack([found[name] for name in names if name != LOGP_LOW]).to(dtype)
        return torch.where(ids == IGNORE_INDEX, 0, rows)

    def _statistic(self, name: str, s: dict[str, Tensor], share: _Shares, dtype: torch.dtype) -> Tensor:
        if name in MERGED_BY:
            lse = share.lse.to(dtype)
            return lse if name == "lse" else share.lse_beyond(lse)
        own = torch.where(share.empty, -math.inf, s[name])
        if name == "logp":
            return (own + s.get(LOGP_LOW, 0) + share.log).amax(0).clamp(max=0)
        if name == "max_logp":
            # Where the target is the likeliest token, this is its log-prob, to the bit.
            own = torch.where((s["logp"] == s[name]) & ~share.empty, own + s[LOGP_LOW], own)
            return (own + share.log).amax(0).clamp(max=0)
        if name == "log_sum_p_sq":
            return _log_sum_exp(own + 2 * share.log).clamp(max=0)
        if name == "entropy":
            return share.mean(s[name] - share.log)
        if name == VARIANCE:
            mean = share.mean(s["entropy"] - share.log)
            return share.mean(s[name] + (mean - s["entropy"] + share.log) ** 2)
        if name == MEAN_OVER_P_SQ:
            by = torch.where(share.empty, -math.inf, s["log_sum_p_sq"]) + 2 * share.log
            part = (by - _log_sum_exp(by)).exp()
            return torch.where(part == 0, 0, part * (s[name] + share.log)).sum(0)
        assert name == MEAN_LOGIT
        weights = own.new_tensor(self.columns)[:, None] / self.total
        return torch.where(weights == 0, 0, weights * own).sum(0) + 0 * share.lse

    def merged_divergences(self, states: Tensor, ids: Tensor) -> Tensor:
        """The same of the statistics of two logits tensors, ``[W, len(DIVERGENCE_STATS), N]``."""
        dtype, s = states.dtype, dict(zip(DIVERGENCE_STATS, states.double().unbind(1), strict=True))
        p, q = _Shares(s["lse"], s["lse_low"]), _Shares(s["other_lse"], s["other_lse_low"])
        found = {
            "forward_kl": q.mean(s["forward_kl"] + q.log - p.log, infinite=~q.empty & s["forward_kl"].isposinf()).clamp(min=0),
            "reverse_kl": p.mean(s["reverse_kl"] + p.log - q.log, infinite=~p.empty & s["reverse_kl"].isposinf()).clamp(min=0),
            "entropy": p.mean(s["entropy"] - p.log),
            "other_entropy": q.mean(s["other_entropy"] - q.log),
        }
        for prefix, share in (("", p), ("other_", q)):
            lse = share.lse.to(dtype)
            found |= {f"{prefix}lse": lse.double(), f"{prefix}lse_low": share.lse_beyond(lse)}
        is_nan = p.lse.isnan() | q.lse.isnan()  # where one of them is no distribution, nothing is known
        if dtype != torch.float64:  # beyond it kernels measure from what is in their own shard
            is_nan |= (p.lse.abs() > LARGEST_LSE) | (q.lse.abs() > LARGEST_LSE)
        rows = torch.stack([torch.where(is_nan, math.nan, found[name]) for name in DIVERGENCE_STATS]).to(dtype)
        return torch.where(ids == IGNORE_INDEX, 0, rows)


def with_empty_shards(table: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """A shard's divergences where it holds nothing but -inf of one tensor, from ``(lse, lse_low, entropy)`` of each."""
    no_p, no_q = p[1] == -math.inf, q[1] == -math.inf
    zero = torch.zeros_like(p[0])
    alone = torch.stack([
        torch.where(no_p & ~no_q, math.inf, zero), torch.where(no_q & ~no_p, math.inf, zero), p[2], q[2], p[0], p[1], q[0], q[1],
    ])  # fmt: skip
    return torch.where(no_p | no_q, alone, table)


class _Shares:
    """How much of every row each shard has: ``log`` is log m_w, ``[W, N]``; ``empty`` marks shards that hold nothing but -inf."""

    def __init__(self, lse: Tensor, low: Tensor) -> None:
        self.empty = low == -math.inf
        lse, low = torch.where(self.empty, -math.inf, lse), torch.where(self.empty, 0, low)
        top = lse.argmax(0, keepdim=True)  # of a NaN, if there is one
        largest, beyond = lse.gather(0, top), low.gather(0, top)
        # The numbers first and what rounding lost after: at a shared offset of any size their difference has all its digits.
        above = (lse - largest) + (low - beyond)
        log_total = torch.log1p(above.exp().scatter(0, top, 0).sum(0))
        self._largest, self._rest = largest[0], beyond[0] + log_total
        self.log = above - log_total
        self.share = self.log.exp()
        self.lse = self._largest + self._rest + 0 * above.gather(0, top)[0]  # NaN where no shard has a distribution

    def lse_beyond(self, lse: Tensor) -> Tensor:
        """What ``lse``, rounded, lacks."""
        return (self._largest - lse.double()) + self._rest

    def mean(self, x: Tensor, infinite: Tensor | None = None) -> Tensor:
        """``Σ_w m_w·x_w``; a shard without probability has no part in it, whatever its ``x`` is. ``inf`` where a shard is ``infinite``."""
        total = torch.where(self.share == 0, 0, self.share * x).sum(0)
        return total if infinite is None else torch.where(infinite.any(0) & ~total.isnan(), math.inf, total)


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over shards, relative to the largest: a sure row's others keep their digits."""
    top = x.argmax(0, keepdim=True)
    largest = x.gather(0, top)
    return largest[0] + torch.log1p((x - largest).exp().scatter(0, top, 0).sum(0))


def columns_of(sizes: tuple[int, ...], vocab_size: int | None) -> tuple[int, ...]:
    """Of shards of these sizes, one after the other, the columns below ``vocab_size``: what lies beyond is padding."""
    if vocab_size is None:
        return sizes
    return tuple(min(max(vocab_size - start, 0), size) for start, size in zip(accumulate((0, *sizes)), sizes, strict=False))


def empty_shard(stats: tuple[str, ...], n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The statistics of a shard without columns: those of one that holds nothing but -inf."""
    rows = torch.full((len(stats), n), math.nan, dtype=dtype, device=device)
    for k, name in enumerate(stats):
        if name.endswith("lse_low"):
            rows[k] = -math.inf
        elif name == LOGP_LOW:
            rows[k] = 0
    return rows
