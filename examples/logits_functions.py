"""A trainer that imports ``selective_log_softmax`` and ``entropy_from_logits`` by name.

Trainers on TRL before 1.15 do that. The patched functions give the same numbers.

    python examples/logits_functions.py

The example defines the trainer's module itself, so that it runs with any TRL or none.
"""

from __future__ import annotations

import types

import torch

from reweight_ops.integrations.logits import patch_logits_functions

TRAINER = """
import torch

def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

def entropy_from_logits(logits, chunk_size=128):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)

def loss(logits, ids, advantages):
    logits = logits[:, :-1]
    logps, entropies = selective_log_softmax(logits, ids), entropy_from_logits(logits)
    return -(logps * advantages).mean() - 0.01 * entropies.mean()
"""


def main() -> tuple[list[float], dict[str, int]]:
    """Return loss and gradient norm with the trainer's functions and with ours, and the
    calls that were replaced.
    """
    trainer = types.ModuleType("my_trainer")
    exec(TRAINER, vars(trainer))
    torch.manual_seed(0)
    logits = torch.randn(4, 17, 5000, requires_grad=True)
    ids, advantages = torch.randint(5000, (4, 16)), torch.randn(4, 1)

    def step() -> tuple[float, float]:
        loss = trainer.loss(logits, ids, advantages)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.item(), gradient.norm().item()

    stock = step()
    with patch_logits_functions(trainer) as patch:
        ours = step()
    print(f"loss {stock[0]:.7f}, gradient {stock[1]:.7f} by the trainer's functions")
    print(f"loss {ours[0]:.7f}, gradient {ours[1]:.7f} by {dict(patch.fused_calls)}")
    return [*stock, *ours], dict(patch.fused_calls)


if __name__ == "__main__":
    main()
