"""A group advantage in your own training loop: sample, score, compare inside the group,
update.

A small policy reads a digit ``d`` and should write ``d+1, d+2, ...`` (modulo 10). Each
step samples G completions of every digit, scores them by the share of right tokens,
turns the scores into advantages with an estimator of ``rw.advantages``, and updates
with ``rw.policy_loss`` on the logits::

    # GRPO's advantage, DAPO's loss
    python examples/group_advantages.py
    python examples/group_advantages.py --estimator rloo
    # two updates per batch: unlikely tokens first
    python examples/group_advantages.py --lopti

It needs only PyTorch and this package, and runs for some seconds on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import reweight_ops as rw

DIGITS, LENGTH, GROUP = 10, 5, 8


class Rollout(NamedTuple):
    """``B = prompts · G`` rows; the G completions of a prompt are consecutive."""

    prompts: Tensor  # [B]
    completions: Tensor  # [B, T]
    old_per_token_logps: Tensor  # [B, T]
    entropies: Tensor  # [B]
    rewards: Tensor  # [B]


#: An estimator takes a rollout and returns [B] or [B, T] advantages. Most need only the
#: rewards and the size of the group.
ESTIMATORS: dict[str, Callable[[Rollout], Tensor]] = {
    "grpo": lambda r: rw.advantages.grpo(r.rewards, group_size=GROUP),
    "dr_grpo": lambda r: rw.advantages.dr_grpo(r.rewards, group_size=GROUP),
    "rloo": lambda r: rw.advantages.rloo(r.rewards, group_size=GROUP),
    "ngrpo": lambda r: rw.advantages.ngrpo(r.rewards, group_size=GROUP),
    "qae": lambda r: rw.advantages.qae(r.rewards, group_size=GROUP),
    "mapo_mixed": lambda r: rw.advantages.mapo_mixed(r.rewards, r.rewards == 1, group_size=GROUP),
    "canon": lambda r: rw.advantages.canon(r.rewards, r.entropies, group_size=GROUP),
    "edge_grpo": lambda r: rw.advantages.edge_grpo(r.rewards, r.entropies, group_size=GROUP),
    "lens": lambda r: rw.advantages.lens(
        r.rewards == 1, r.old_per_token_logps, torch.ones_like(r.completions), group_size=GROUP
    ),
    "reinforce_plus_plus": lambda r: rw.advantages.reinforce_plus_plus(
        r.rewards, torch.ones_like(r.completions)
    ),
}


class Policy(nn.Module):
    """Logits of the next digit from the prompt, the last digit and the position."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.prompt, self.last, self.position = (
            nn.Embedding(DIGITS, width),
            nn.Embedding(DIGITS + 1, width),
            nn.Embedding(LENGTH, width),
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, DIGITS))

    def forward(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """``[B], [B, t] -> [B, t + 1, 10]``; for a whole completion the last position
        is not needed.
        """
        last = torch.cat([torch.full_like(prompts, DIGITS)[:, None], completions], 1)[:, :LENGTH]
        return self.head(
            self.prompt(prompts)[:, None] + self.last(last) + self.position.weight[: last.shape[1]]
        )


@torch.no_grad()
def sample(policy: Policy, per_digit: int) -> Rollout:
    """``per_digit`` completions of every digit, with the policy's log-probs and
    entropies.
    """
    prompts = torch.arange(DIGITS).repeat_interleave(per_digit)
    completions = torch.empty(len(prompts), 0, dtype=torch.int64)
    for _ in range(LENGTH):
        logits = policy(prompts, completions)[:, -1]
        completions = torch.cat([completions, torch.multinomial(logits.softmax(-1), 1)], 1)
    logps, entropies = rw.token_logps(
        policy(prompts, completions), completions, return_entropy=True
    )
    right = completions == (prompts[:, None] + 1 + torch.arange(LENGTH)) % DIGITS
    return Rollout(prompts, completions, logps, entropies.mean(-1), right.float().mean(-1))


def train(estimator: str, *, steps: int, lopti: bool, seed: int = 0) -> list[float]:
    """Train, and return the mean reward of each step."""
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    history = []
    for _ in range(steps):
        rollout = sample(policy, GROUP)
        advantages = ESTIMATORS[estimator](rollout)
        # mini-batches may cut groups: advantages are ready
        halves = torch.arange(len(rollout.rewards)).chunk(2)
        plain = rw.methods.dapo()
        for spec, rows in (
            rw.schedules.lopti_updates(halves) if lopti else [(plain, rows) for rows in halves]
        ):
            out = rw.policy_loss(
                policy(rollout.prompts[rows], rollout.completions[rows]),
                rollout.completions[rows],
                advantages[rows],
                spec=spec,
                old_per_token_logps=rollout.old_per_token_logps[rows],
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        history.append(rollout.rewards.mean().item())
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description="A group advantage with rw.policy_loss.")
    parser.add_argument("--estimator", default="grpo", choices=ESTIMATORS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--lopti",
        action="store_true",
        help="two updates per batch of rollouts: unlikely tokens first, then the others",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    history = train(options.estimator, steps=options.steps, lopti=options.lopti)
    for step in range(0, options.steps, max(1, options.steps // 6)):
        print(f"step {step:4d}  mean reward {history[step]:.3f}")
    print(f"last five steps   {sum(history[-5:]) / len(history[-5:]):.3f}")


if __name__ == "__main__":
    main()
