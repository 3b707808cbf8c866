"""A vocabulary in shards: how the statistics of the shards become those of a row.

Each rank of a group has its own columns of every row. The shard statistics of every
backend can be merged. With l_w the log-sum-exp of shard w and L that of the row, the
shard's probability is ``m_w = exp(l_w - L)``, and ::

    logp = logp_w + log m_w  of the shard with the target
    H = Σ_w m_w·(H_w - log m_w)
    Σp² = Σ_w m_w²·(Σp²)_w

L is relative to the largest shard, by ``log1p`` of the other shards, so that the
log-prob of a sure token keeps its digits. All of it is in fp64, on ``[W, N]`` numbers,
in the order of ranks. Every rank therefore finds the same bits, and they depend only on
the statistics of the shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..rows.constants import parameter_vector
from ..rows.groups import IGNORE_INDEX
from ..rows.ranks import gathered, size_and_rank, summed_
from ..rows.traced import gathered_over, summed_over
from .base import DIVERGENCE_STATS, VOCABULARY, SoftmaxParams
from .log_p_moments import MEAN_OVER_P_SQ, VARIANCE
from .logp_low import LOGP_LOW
from .mean_logit import MEAN_LOGIT
from .reference_token import LARGEST_LSE

#: The statistics that a shard always has, because the others merge by them.
MERGED_BY = ("lse", "lse_low")


@dataclass(frozen=True)
class VocabShards:
    """The columns of every rank that are in the softmax, in the order of ranks, and
    ``total``, their number.
    """

    op: str
    group: Any
    columns: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.columns)

    def params(self, softcap: float) -> SoftmaxParams:
        """Return the softmax parameters of this rank's columns."""
        _, rank = size_and_rank(self.group)
        return SoftmaxParams(self.columns[rank], softcap, sum(self.columns[:rank]), self.total)

    def gathered(self, table: Tensor) -> Tensor:
        """``[W, S, N]``: the states of all shards, of this one's ``[S, N]``. One
        collective of ``4·S·N`` bytes a rank (8 in fp64).
        """
        if torch.compiler.is_compiling():
            whole: Tensor = gathered_over(
                table.detach(), self.op, self.group.group_name, len(self.columns)
            )
            return whole
        return gathered(self.op, self.group, table)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``; it may overwrite ``x``."""
        if torch.compiler.is_compiling():
            total: Tensor = summed_over(x, self.op, self.group.group_name)
            return total
        return summed_(self.op, self.group, x)

    def merged(self, states: Tensor, names: tuple[str, ...], ids: Tensor) -> Tensor:
        """The statistics of whole rows from the ``states`` ``[W, S, N]`` of all shards,
        of which ``names`` are the rows; of a row's kept set and of its
        whole vocabulary each by their own. All but :data:`LOGP_LOW`, which is one of a
        log-prob's parts.
        """
        dtype = states.dtype
        found: dict[str, Tensor] = {}
        for prefix in ("", VOCABULARY):
            own = {
                name.removeprefix(prefix): states[:, k].double()
                for k, name in enumerate(names)
                if name.startswith(VOCABULARY) == bool(prefix)
            }
            if own:
                share = _Shares(own["lse"], own["lse_low"])
                found |= {
                    prefix + name: self._statistic(name, own, share, dtype)
                    for name in own
                    if name != LOGP_LOW
                }
        rows = torch.stack([found[name] for name in names if name != LOGP_LOW]).to(dtype)
        return torch.where(ids == IGNORE_INDEX, 0, rows)

    def _statistic(
        self, name: str, s: dict[str, Tensor], share: _Shares, dtype: torch.dtype
    ) -> Tensor:
        if name in MERGED_BY:
            lse = share.lse.to(dtype)
            return lse if name == "lse" else share.lse_beyond(lse)
        own = torch.where(share.empty, -math.inf, s[name])
        if name == "logp":
            return (own + s.get(LOGP_LOW, 0) + share.log).amax(0).clamp(max=0)
        if name == "max_logp":
            # If the target is the likeliest token, this is its log-prob to the bit.
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
        columns = parameter_vector(tuple(map(float, self.columns)), own.dtype, own.device)
        weights = columns[:, None] / self.total
        return torch.where(weights == 0, 0, weights * own).sum(0) + 0 * share.lse

    def merged_divergences(self, states: Tensor, ids: Tensor) -> Tensor:
        """Merge the statistics of two logits tensors,
        ``[len(DIVERGENCE_STATS), N]``."""
        dtype, s = states.dtype, dict(zip(DIVERGENCE_STATS, states.double().unbind(1), strict=True))
        p, q = _Shares(s["lse"], s["lse_low"]), _Shares(s["other_lse"], s["other_lse_low"])
        found = {
            "forward_kl": q.mean(
                s["forward_kl"] + q.log - p.log, infinite=~q.empty & s["forward_kl"].isposinf()
            ).clamp(min=0),
            "reverse_kl": p.mean(
                s["reverse_kl"] + p.log - q.log, infinite=~p.empty & s["reverse_kl"].isposinf()
            ).clamp(min=0),
            "entropy": p.mean(s["entropy"] - p.log),
            "other_entropy": q.mean(s["other_entropy"] - q.log),
        }
        for prefix, share in (("", p), ("other_", q)):
            lse = share.lse.to(dtype)
            found |= {f"{prefix}lse": lse.double(), f"{prefix}lse_low": share.lse_beyond(lse)}
        # unknown where one of them is not a distribution
        is_nan = p.lse.isnan() | q.lse.isnan()
        # beyond it a kernel measures from the values in its own shard
        if dtype != torch.float64:
            is_nan |= (p.lse.abs() > LARGEST_LSE) | (q.lse.abs() > LARGEST_LSE)
        rows = torch.stack(
            [torch.where(is_nan, math.nan, found[name]) for name in DIVERGENCE_STATS]
        ).to(dtype)
        return torch.where(ids == IGNORE_INDEX, 0, rows)


def with_empty_shards(table: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return a shard's divergences where all its logits of one tensor are -inf, from
    ``(lse, lse_low, entropy)`` of each tensor.
    """
    no_p, no_q = p[1] == -math.inf, q[1] == -math.inf
    zero = torch.zeros_like(p[0])
    alone = torch.stack(
        [
            torch.where(no_p & ~no_q, math.inf, zero),
            torch.where(no_q & ~no_p, math.inf, zero),
            p[2],
            q[2],
            p[0],
            p[1],
            q[0],
            q[1],
        ]
    )
    return torch.where(no_p | no_q, alone, table)


class _Shares:
    """How much of every row each shard has.

    ``log`` ``[W, N]`` is log m_w. ``empty`` marks shards whose logits are all -inf.
    """

    def __init__(self, lse: Tensor, low: Tensor) -> None:
        self.empty = low == -math.inf
        lse, low = torch.where(self.empty, -math.inf, lse), torch.where(self.empty, 0, low)
        top = lse.argmax(0, keepdim=True)  # the index of a NaN, if there is one
        largest, beyond = lse.gather(0, top), low.gather(0, top)
        # Subtract the numbers first and their rounding errors after. At a shared offset
        # of any size the difference then keeps all its digits.
        above = (lse - largest) + (low - beyond)
        log_total = torch.log1p(above.exp().scatter(0, top, 0).sum(0))
        self._largest, self._rest = largest[0], beyond[0] + log_total
        self.log = above - log_total
        self.share = self.log.exp()
        # NaN where no shard has a distribution
        self.lse = self._largest + self._rest + 0 * above.gather(0, top)[0]

    def lse_beyond(self, lse: Tensor) -> Tensor:
        """Return the rounding error of ``lse``."""
        return (self._largest - lse.double()) + self._rest

    def mean(self, x: Tensor, infinite: Tensor | None = None) -> Tensor:
        """Return ``Σ_w m_w·x_w``. It is ``inf`` where a shard is ``infinite``.

        A shard without probability does not contribute, whatever its ``x`` is.
        """
        total = torch.where(self.share == 0, 0, self.share * x).sum(0)
        return (
            total
            if infinite is None
            else torch.where(infinite.any(0) & ~total.isnan(), math.inf, total)
        )


def _log_sum_exp(x: Tensor) -> Tensor:
    """Return the log-sum-exp over shards, relative to the largest, so that the other
    shards of a sure row keep their digits.
    """
    top = x.argmax(0, keepdim=True)
    largest = x.gather(0, top)
    return largest[0] + torch.log1p((x - largest).exp().scatter(0, top, 0).sum(0))


def columns_of(sizes: tuple[int, ...], vocab_size: int | None) -> tuple[int, ...]:
    """Return how many columns of consecutive shards of these sizes are below
    ``vocab_size``.

    Columns beyond it are padding.
    """
    if vocab_size is None:
        return sizes
    return tuple(
        min(max(vocab_size - start, 0), size)
        for start, size in zip(accumulate((0, *sizes)), sizes, strict=False)
    )


def empty_shard(stats: tuple[str, ...], n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the statistics of a shard without columns. They are those of a shard whose
    logits are all -inf.
    """
    rows = torch.full((len(stats), n), math.nan, dtype=dtype, device=device)
    for k, name in enumerate(stats):
        if name.endswith("lse_low"):
            rows[k] = -math.inf
        elif name == LOGP_LOW:
            rows[k] = 0
    return rows
