"""Log-probs of pairs, for losses of pairs that are compared with transcriptions."""

from __future__ import annotations

import math

import torch

P, T, V = 4, 7, 13
LENGTHS = ((7, 3, 1, 5), (4, 6, 2, 5))  # chosen, rejected


def batch(dtype=torch.float64, seed=0):
    """Log-probs of policy, reference and sampler in halves, ``[2P, T]``,
    and the mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([*LENGTHS[0], *LENGTHS[1]])
    mask = torch.arange(T) < lengths[:, None]
    logps, ref, old = (
        -3 * torch.rand(2 * P, T, generator=g, dtype=torch.float64) - 0.05 for _ in range(3)
    )
    p_sq = -torch.rand(2 * P, T, generator=g, dtype=torch.float64) - 0.2
    poison = torch.full_like(logps, math.nan)
    return [torch.where(mask, x, poison).to(dtype) for x in (logps, ref, old, p_sq)] + [mask]


def sides(x, mask):
    rows = [row[m].tolist() for row, m in zip(x.double(), mask, strict=True)]
    return rows[:P], rows[P:]
