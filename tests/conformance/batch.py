"""The data of every peer: hidden states and a head, their logits, and rows with ratios
on both sides of any clip.

One sequence is empty, and the masks are ragged.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

import reweight_ops as rw

S, T, V, D = 6, 9, 31, 8


def batch(temperature: float = 1.0, seed: int = 0, scale: float = 0.5) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    b = SimpleNamespace(
        hidden=normal(S, T, D).requires_grad_(),
        weight=(scale * normal(V, D)).requires_grad_(),
        bias=(0.1 * normal(V)).requires_grad_(),
    )
    b.ids = torch.randint(V, (S, T), generator=g)
    b.mask = (torch.arange(T) < torch.tensor([9, 1, 4, 0, 2, 9])[:, None]).float()
    with torch.no_grad():
        logps = rw.linear_token_logps(
            b.hidden,
            b.weight,
            b.ids,
            lm_head_bias=b.bias,
            temperature=temperature,
            backend="reference",
        )
    b.old, b.ref = logps + 0.3 * normal(S, T), logps + 0.3 * normal(S, T)
    b.advantages, b.token_advantages = normal(S), normal(S, T)
    b.ratio = torch.rand(S, T, generator=g) + 0.5
    b.leaves = (b.hidden, b.weight, b.bias)
    return b


def logits(b: SimpleNamespace) -> torch.Tensor:
    return torch.nn.functional.linear(b.hidden, b.weight, b.bias)
