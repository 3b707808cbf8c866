"""The generalised Jensen-Shannon divergence of two logits tensors, in PyTorch for every
backend.

It takes a few rows at a time, so that its temporaries are small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows.groups import IGNORE_INDEX
from .base import DivergenceInputs

#: The number of elements that are computed at once, in about ten temporaries. On a CPU
#: they fit a cache. On a GPU they are enough for its bandwidth.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


def generalized_jsd(
    two: DivergenceInputs, beta: float, weights: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return ``D = β·KL(q‖m) + (1-β)·KL(p‖m)`` ``[N]`` of every row of logits
    ``[N, V]``. It is 0 in ignored rows.

    The mixture is ``m = β·q + (1-β)·p``.

    With ``out``, which may be the logits, it also writes ``weights · dD/dlogits``. That
    is ``1/T · slope · (1-β)·p·(log p - log m - KL(p‖m))``, and 0 in rows whose weight
    is 0 and on ``-inf`` logits. m depends on p too, but the terms of its derivative sum
    to 0.
    """
    kl_p, kl_q = to_the_mixture(two, beta, weights, out).unbind()
    return beta * kl_q + (1 - beta) * kl_p


def to_the_mixture(
    two: DivergenceInputs,
    beta: float,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """``(KL(p‖m), KL(q‖m))`` ``[2, N]`` and the same gradient. Of a shard they are its
    parts of the sums, with ``known``: the log-sum-exp of p and what
    rounding lost of it, those of q, and for a gradient KL(p‖m), of whole rows."""
    n, columns = two.ids.numel(), two.softmax.vocab_size
    keep, t, t_other = (
        two.ids != IGNORE_INDEX,
        two.temperature.expand(n),
        two.other_temperature.expand(n),
    )
    found = torch.zeros(2, n, dtype=t.dtype, device=two.logits.device)
    most = max(_BLOCK.get(two.logits.device.type, _BLOCK["cuda"]) // max(columns, 1), 1)
    for first in range(0, n, most):
        rows = slice(first, min(first + most, n))
        inside = keep[rows, None]
        of_p, of_q = (None, None) if known is None else (known[:2, rows], known[2:4, rows])
        log_p, slope = _log_probs(
            two.logits[rows, :columns], inside, t[rows], two.softmax.softcap, of_p
        )
        log_q, _ = _log_probs(
            two.other[rows, :columns], inside, t_other[rows], two.other_softmax.softcap, of_q
        )
        p, gap, kl_p, kl_q = _mixture(log_p, log_q, beta)
        found[:, rows] = torch.where(keep[rows], torch.stack([kl_p, kl_q]), 0)
        if out is not None:
            assert weights is not None
            factor = (1 - beta) * weights[rows, None] / t[rows, None]
            whole = kl_p if known is None else known[4, rows]
            gradient = gap.sub_(whole[:, None]).mul_(p).mul_(slope).mul_(factor)
            out[rows, :columns] = torch.where(inside & (factor != 0), gradient, 0).to(out.dtype)
            out[rows, columns:] = 0
    return found


def _log_probs(
    z: Tensor, inside: Tensor, temperature: Tensor, softcap: float, known: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """Return log-probs in the dtype of the temperature, and the slope of the soft cap.

    In an ignored row they are those of zeros.
    caller, of these rows."""
    x: Tensor = torch.where(inside, z.to(temperature.dtype), 0)
    slope: Tensor | float = 1.0
    if math.isfinite(softcap):
        tanh = torch.tanh(x / softcap)
        # +inf makes the row NaN, as without a cap
        x = torch.where(x.isinf(), x, softcap * tanh)
        slope = 1 - tanh * tanh
    x = x / temperature[:, None]
    return torch.log_softmax(x, -1) if known is None else (x - known[0, :, None]) - known[
        1, :, None
    ], slope


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``p``, ``log p - log m`` (0 where p is 0), ``KL(p‖m)`` and ``KL(q‖m)``."""
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    p, q = log_p.exp(), log_q.exp()
    gap, gap_q = (torch.where(log_x == -math.inf, 0, log_x - log_m) for log_x in (log_p, log_q))
    return p, gap, (p * gap).sum(-1), (q * gap_q).sum(-1)
