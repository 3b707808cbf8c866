"""Log-probs of several chosen ids per row: a gather beside a backend's log-sum-exp.

It is in PyTorch for every backend, and only on ``[N, K]`` numbers. An element that is
not an id (``IGNORE_INDEX``) has a log-prob of 0 and no gradient, like an ignored row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from .base import SoftmaxParams


def top_ids(logits: Tensor, ids: Tensor, k: int, softmax: SoftmaxParams) -> Tensor:
    """Return ``[N, k]``: the ids of the k largest logits of each row, largest first.

    Of equal logits any may be taken. Ignored rows have IGNORE_INDEX.
    """
    found = logits[..., : softmax.vocab_size].topk(k).indices.reshape(-1, k) + softmax.vocab_start
    return torch.where((ids == IGNORE_INDEX)[:, None], IGNORE_INDEX, found)


class Picked:
    """The logits of chosen ids. They are read before a gradient is written over the
    others.

    ``logits`` has shape ``R + (V,)``, ``ids`` ``[N]`` are the targets of the rows, and
    ``picked`` is ``[N, K]``.
    columns; ``known`` ``[N, K]`` are the logits of all.
    """

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        picked: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        known: Tensor | None = None,
    ) -> None:
        total = softmax.total()
        self.known = (ids >= 0) & (ids < total)
        inside = (ids != IGNORE_INDEX)[:, None] & (picked != IGNORE_INDEX)
        self.bad = inside & ((picked < 0) | (picked >= total))
        self.inside = inside & ~self.bad
        local, self.start = picked - softmax.vocab_start, softmax.vocab_start
        self.here = self.inside & (local >= 0) & (local < softmax.vocab_size)
        self.index = torch.where(self.here, local, 0)
        self.shape = (*logits.shape[:-1], picked.size(-1))
        if known is None:
            known = (
                logits.gather(-1, self.index.view(self.shape)).view(picked.shape)
                if softmax.vocab_size
                else logits.new_zeros(picked.shape)
            )
        self.logits = known
        # fp64 costs nothing for so few numbers, and a log-sum-exp of two fp32 numbers
        # is as exact.
        z = known.double()
        self.is_masked, self.temperature = z == -math.inf, temperature.double().view(-1, 1)
        tanh = torch.tanh(z / softmax.softcap) if math.isfinite(softmax.softcap) else None
        self.slope = 1.0 if tanh is None else 1 - tanh * tanh
        self.x = (
            z if tanh is None else torch.where(z.isinf(), z, softmax.softcap * tanh)
        ) / self.temperature

    def logps(self, lse: Tensor, lse_low: Tensor) -> Tensor:
        """Return ``[N, K]`` log-probs, NaN for an id that does not exist."""
        return torch.where(
            self.bad, math.nan, torch.where(self.inside, self._below(lse, lse_low), 0)
        )

    def masked(self, by: Tensor) -> Tensor:
        """Return ``[N, K]`` without the elements that have no gradient."""
        return torch.where(self.inside, by, 0)

    def write_gradient(
        self,
        out: Tensor,
        ids: Tensor,
        by: Tensor,
        stats: dict[str, Tensor],
        derivatives: dict[str, Tensor | None],
    ) -> None:
        """Write the elements of chosen ids over those of a gradient by the other
        statistics, ``out``, with one rounding.

        ``by`` ``[N, K]`` are the derivatives by the log-probs. ``derivatives`` are
        those by the row's statistics. The one by lse already contains the sum of
        ``-by``.
        """

        def column(t: Tensor | None) -> Tensor:
            return torch.zeros_like(by[:, :1]) if t is None else t[:, None]

        c, e, z, q = (
            column(derivatives.get(name)) for name in ("logp", "entropy", "lse", "log_sum_p_sq")
        )
        moved = (by != 0).any(-1, keepdim=True)
        by = torch.where(self.here, by, 0)
        # A list may name an id twice, or the row's own id. An element without an id
        # stands for id 0, which the gradient has anyway.
        own = self._sums(by) + torch.where(self.index + self.start == ids[:, None], c, 0)
        logp = self._below(stats["lse"], stats["lse_low"])
        p = logp.exp()
        # own - (c - z)·p, for a sure token too
        total = p * (own - c + z) - own * torch.expm1(logp)
        if derivatives.get("entropy") is not None:
            total = total - e * p * (logp + column(stats["entropy"]))
        if derivatives.get("log_sum_p_sq") is not None:
            total = total + 2 * q * p * (p / column(stats["log_sum_p_sq"]).exp() - 1)
        moving = moved | (c != 0) | (e != 0) | (z != 0) | (q != 0)
        written = moving & self.known[:, None] & ~(self.is_masked & ~column(stats["lse"]).isnan())
        value = torch.where(written, total * (self.slope / self.temperature), 0)
        out.scatter_(-1, self.index.view(self.shape), value.to(out.dtype).view(self.shape))

    def _below(self, lse: Tensor, lse_low: Tensor) -> Tensor:
        return (self.x - lse.double()[:, None] - lse_low.double()[:, None]).to(lse.dtype)

    def _sums(self, by: Tensor) -> Tensor:
        """Return ``[N, K]``: for every element the sum over all elements of its row
        with the same id.

        The order of a sum is always the same.
        """
        first = torch.searchsorted(self.index.sort(-1).values, self.index)
        row = torch.arange(by.size(0), device=by.device)[:, None].expand_as(first)
        return torch.zeros_like(by).index_put((row, first), by, accumulate=True).gather(-1, first)
