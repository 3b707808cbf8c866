"""Time and memory of the loss alone at a real vocabulary on this machine.

It compares eager PyTorch, torch.compile and the fused op.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import reweight_ops as rw
from reweight_ops.testing import eager_policy_loss

from .memory import most_alive

VOCAB = 151936


class Head(torch.autograd.Function):
    """Logits that a model has computed: they are not a leaf, so that an op may
    overwrite them.

    The further use of their gradient is part of the model's own cost.
    """

    gradient: Tensor | None = None

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        Head.gradient = gradient


class Cost(NamedTuple):
    """Cost of one forward and backward: the median time, and peak bytes in addition to
    the logits.
    """

    name: str
    milliseconds: float
    extra_bytes: int


def candidates(
    ids: Tensor, advantages: Tensor, old: Tensor, compiled: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    def eager(logits: Tensor) -> Tensor:
        return eager_policy_loss(logits, ids, advantages, old_per_token_logps=old)

    def fused(logits: Tensor, **keywords: bool) -> Tensor:
        return rw.policy_loss(
            logits, ids, advantages, spec=rw.methods.grpo(), old_per_token_logps=old, **keywords
        ).loss

    found = {"eager PyTorch": eager}
    if compiled:
        found["torch.compile"] = torch.compile(eager)
    return {
        **found,
        "fused op": fused,
        "fused op, in place": lambda logits: fused(logits, consume_logits=True),
    }


def measure(rows: int, vocab: int = VOCAB, rounds: int = 5, compiled: bool = True) -> list[Cost]:
    """Measure all variants in turns, round after round, on the same bf16 logits, and
    compare their gradients.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, rows, vocab, generator=generator).bfloat16()
    ids = torch.randint(vocab, (1, rows), generator=generator)
    advantages = torch.randn(1, generator=generator)
    old = rw.token_logps(values, ids) + 0.1 * torch.randn(1, rows, generator=generator)
    calls = candidates(ids, advantages, old, compiled)
    times: dict[str, list[float]] = {name: [] for name in calls}
    extra, gradients = {}, {}
    values.requires_grad_()
    # one separate run: compilation, and the slow measurement of memory
    for name, call in calls.items():
        logits = Head.apply(values)
        extra[name] = most_alive(lambda call=call, logits=logits: call(logits).backward())
        gradients[name] = Head.gradient
    for _ in range(rounds):
        for name, call in calls.items():
            logits = Head.apply(values)
            begin = time.perf_counter()
            call(logits).backward()
            times[name].append(1000 * (time.perf_counter() - begin))
            del logits
            Head.gradient = None
    truth = gradients["eager PyTorch"].float()
    for name, gradient in gradients.items():
        if (difference := ((gradient.float() - truth).norm() / truth.norm()).item()) > 0.01:
            raise RuntimeError(
                f"the gradient of {name} differs from eager PyTorch's by {difference:.1%}"
            )
    return [Cost(name, median(ms), extra[name]) for name, ms in times.items()]
