"""Preference losses on a toy: a small language model learns to prefer ascending to
descending digits.

    python examples/preference.py [--steps 60]

It trains the same model with DPO; with WPO, whose weight is a statistic of the whole
vocabulary; with SparsePO, a token-masked DPO with a full-vocabulary KL to the
reference, which needs a second logits tensor; and with a user-defined loss of four
lines. Every loss reads logits. Their gradient is the only other tensor of their size.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reweight_ops as rw
from reweight_ops.preference import PairLoss, Pairs, PairSpec, PairTerm

VOCAB, LENGTH, PAIRS = 32, 6, 16


@dataclass(frozen=True, kw_only=True)
class Cauchy(PairLoss):
    """``log(1 + max(0, 1 - β·m)²)``: a user-defined loss with a margin and a bounded
    slope.
    """

    def loss(self, p: Pairs) -> Tensor:
        return torch.log1p(torch.relu(1 - p.beta * p.margins).square())


class Model(nn.Module):
    """Logits of the next token from the last two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.body = nn.Sequential(nn.Linear(48, 48), nn.Tanh())
        self.head = nn.Linear(48, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
        return self.head(
            self.body(torch.cat([self.embed(before[:, :-2]), self.embed(before[:, 1:-1])], -1))
        )


def batch(seed: int) -> Tensor:
    """``[2·PAIRS, LENGTH]``: all chosen sequences (ascending), then the same ones
    descending (rejected).
    """
    g = torch.Generator().manual_seed(seed)
    digits = (
        torch.stack([torch.randperm(10, generator=g)[:LENGTH] for _ in range(PAIRS)])
        .sort(-1)
        .values
    )
    return torch.cat([digits, digits.flip(-1)])


def losses() -> dict[str, PairSpec]:
    return {
        "dpo": rw.preference.dpo(beta=0.5),
        "wpo": rw.preference.wpo(beta=0.5),
        "sparse_po": rw.preference.sparse_po(beta=0.5, reward_norm_coef=1e-3),
        "our own": PairSpec(terms=(PairTerm(loss=Cauchy()),), beta=0.5, name="cauchy"),
    }


def train(spec: PairSpec, steps: int) -> list[dict[str, float]]:
    """The metrics of every step."""
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model).requires_grad_(False)
    # SparsePO's learned mask, here one number per position
    masks = nn.Parameter(torch.ones(LENGTH))
    optimizer = torch.optim.Adam([*model.parameters(), masks], lr=3e-3)
    history = []
    for step in range(steps):
        ids = batch(step)
        logits, ref_logits = model(ids), reference(ids)
        given: dict[str, Any] = {"ref_per_token_logps": rw.token_logps(ref_logits, ids)}
        if "kl" in spec.requires:
            mask = torch.relu(masks).expand(ids.shape)
            given |= {"ref_logits": ref_logits, "reward_mask": mask, "kl_mask": mask}
        out = rw.preference_loss(logits, ids, spec=spec, **given)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({"loss": out.loss.item(), **out.metrics.as_floats()})
    return history


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(arguments).steps
    runs = {name: train(spec, steps) for name, spec in losses().items()}
    print(f"{'loss':10} {'first':>8} {'last':>8}   accuracy   margin of rewards")
    for name, history in runs.items():
        first, last = history[0], history[-1]
        print(
            f"{name:10} {first['loss']:8.4f} {last['loss']:8.4f}   "
            f"{last['rewards/accuracies']:8.2f}   {last['rewards/margins']:8.3f}"
        )
    return runs


if __name__ == "__main__":
    main()
