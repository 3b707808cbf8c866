"""What PyTorch itself makes of a loss in fp32, by ``torch.log_softmax`` and autograd.
The accuracy criterion measures in its errors.

It shares a loss's formula from row statistics on with every backend, and nothing else.
The reference is one of these backends.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.engine.output import PolicyLossOutput


class Yardstick(NamedTuple):
    """A loss, its gradient by the logits, and the row statistics ``[*R]`` that the loss
    is formed from.
    """

    loss: Tensor
    grad: Tensor
    per_token_logps: Tensor
    entropies: Tensor


def row_statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    drop_last: bool = False,
    sampling_mask: Tensor | None = None,
    entropy_over: str = "kept",
) -> dict[str, Tensor]:
    """``logp``, ``entropy`` and ``log_sum_p_sq`` of every row. They have the ids' shape
    and are differentiable. ``sampling_mask`` is a bool mask.
    """
    x = logits[..., :-1, :] if drop_last else logits
    x = x[..., :vocab_size]
    if softcap is not None and softcap < math.inf:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(*temperature.shape, *[1] * (x.dim() - temperature.dim()))
    x = x / temperature
    log_p = torch.log_softmax(
        x if sampling_mask is None else torch.where(sampling_mask, x, -math.inf), -1
    )
    mean = torch.log_softmax(x, -1) if entropy_over == "vocabulary" else log_p
    finite = torch.where(mean.exp() == 0, 0, mean)  # 0 * -inf is 0, and so is 0 * -1e38
    return {
        "logp": log_p.gather(-1, ids.clamp(min=0)[..., None].long())[..., 0],
        "entropy": -(mean.exp() * finite).sum(-1),
        "log_sum_p_sq": torch.logsumexp(2 * log_p, -1),
    }


def yardstick(out: PolicyLossOutput, logits: Tensor, ids: Tensor, **head: Any) -> Yardstick:
    """The loss of a call that gave ``out``, from these logits. ``head`` has the
    keywords of :func:`row_statistics`.
    """
    z = logits.detach().clone().requires_grad_()
    call = out._call
    rows = row_statistics(z, ids, **head)
    statistics = {
        name: torch.where(call.rows.keep, value.reshape(-1), 0) for name, value in rows.items()
    }
    loss = call.token_losses({name: statistics[name] for name in out._leaves}).weighted_loss.sum()
    (grad,) = torch.autograd.grad(loss, z)
    logps, entropies = (
        call.rows.unflatten(statistics[name].detach()) for name in ("logp", "entropy")
    )
    return Yardstick(loss.detach(), grad, logps, entropies)
