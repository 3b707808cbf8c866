"""Reference for kernel tests: statistics and gradients of rows in plain PyTorch, by
autograd, in any dtype.

It is written for the tests alone and shares no code with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STATS = ("logp", "entropy", "lse", "log_sum_p_sq", "max_logp")


def lse_low(lse: Tensor) -> Tensor:
    """The part that rounding an exact log-sum-exp to fp32 loses, rounded to fp32."""
    return (lse - lse.float()).float()


def statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softcap: float = math.inf,
    vocab_start: int = 0,
) -> dict[str, Tensor]:
    """Differentiable statistics of every row ``[N]``. ``logp`` is -inf if no column has
    the id.
    """
    masked = logits == -math.inf
    x = logits if math.isinf(softcap) else softcap * torch.tanh(logits / softcap)
    x = torch.where(masked, -math.inf, x) / temperature[:, None]
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    finite = torch.where(p == 0, 0, logp)  # 0 * -inf is 0
    column = ids - vocab_start
    inside = (column >= 0) & (column < logits.size(1))
    target = logp.gather(-1, torch.where(inside, column, 0)[:, None])[:, 0]
    return {
        "logp": torch.where(inside, target, -math.inf),
        "entropy": -(p * finite).sum(-1),
        "lse": torch.logsumexp(x, -1),
        "log_sum_p_sq": torch.logsumexp(2 * logp, -1),
        "max_logp": logp.amax(-1),
    }


def gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    derivatives: dict[str, Tensor],
    softcap: float = math.inf,
    vocab_start: int = 0,
) -> Tensor:
    """Gradient by the logits from these derivatives of row statistics. A log-prob of
    -inf has no slope.
    """
    z = logits.detach().clone().requires_grad_()
    stats = statistics(z, ids, temperature, softcap, vocab_start)
    outputs = [torch.where(stats[name].isfinite(), stats[name], 0) for name in derivatives]
    (grad,) = torch.autograd.grad(outputs, z, [c.to(z.dtype) for c in derivatives.values()])
    return grad


def clip_loss(
    stats: dict[str, Tensor], old: Tensor, adv: Tensor, weight: Tensor, eps: float, bonus: float
) -> Tensor:
    """Each row's contribution ``[N]`` to a clipped surrogate with an entropy bonus."""
    ratio = torch.exp(stats["logp"] - old)
    surrogate = -torch.minimum(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)
    return weight * (surrogate - bonus * stats["entropy"])


def rows(n: int, v: int, dtype: torch.dtype, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [n, v] and ids of one kind.

    ``plain`` has a language model's spread with outliers and a target of any mass;
    ``peaked`` has sure rows; ``shifted`` has a large common offset and ``far`` a very
    large one; ``low`` has everything at or below -100; ``wide`` is hundreds of nats
    apart.
    """
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=g, dtype=torch.float64) * 3
    ids = torch.randint(0, v, (n,), generator=g)
    lift = torch.rand(n, generator=g, dtype=torch.float64) * 12
    if kind == "peaked":
        lift = 12 + torch.rand(n, generator=g, dtype=torch.float64) * 25
    z.scatter_add_(1, ids[:, None], lift[:, None])
    if kind == "wide":
        z *= 100
    z += {"shifted": 300.0, "far": 3e4, "low": -160.0}.get(kind, 0.0)
    if kind == "low":
        z.clamp_(max=-100)
    return z.to(dtype), ids
