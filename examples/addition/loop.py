"""A training loop on two-digit addition without a trainer: sample, score, compare
inside the group, update twice.

Every variant of ``ablations.py`` runs in it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reweight_ops as rw

from . import task

PROMPTS, GROUP = 32, 8  # prompts of a rollout, completions of each
LEARNING_RATE = 3e-4
EOS = task.TOKENS.index("<eos>")


class Rollout(NamedTuple):
    """``B = PROMPTS · GROUP`` completions; those of a prompt are consecutive."""

    input_ids: Tensor  # [B, P + T]
    completion_ids: Tensor  # [B, T]
    completion_mask: Tensor  # [B, T]
    old_per_token_logps: Tensor  # [B, T]
    entropies: Tensor  # [B, T]
    rewards: Tensor  # [B]


def grpo(rollout: Rollout) -> Tensor:
    """Return the advantages of every variant that names no other estimator."""
    return rw.advantages.grpo(rollout.rewards, group_size=GROUP)


@dataclass(frozen=True)
class Variant:
    """What one variant changes: the losses of the two updates on a rollout, the
    advantages, and the sampler's temperature.
    """

    group: str
    name: str
    specs: Callable[[Rollout], Sequence[rw.PolicyLossSpec]]
    advantages: Callable[[Rollout], Tensor] = grpo
    # The temperature of the next token, from its entropy [B] and the last rollout. The
    # default is 1.
    temperature: Callable[[Tensor, Rollout], Tensor] | None = None


class Course(NamedTuple):
    """One number for each rollout: the share of exact answers, and the mean entropy of
    the sampled tokens in nats.
    """

    rewards: list[float]
    entropies: list[float]


def logits_of(model: Any, rollout_ids: Tensor) -> Tensor:
    """Return the logits that predict the completion, ``[B, T, V]``."""
    return model(input_ids=rollout_ids, logits_to_keep=task.ANSWER_TOKENS + 1).logits[:, :-1]


@dataclass
class Sampler:
    """Samples completions of random problems with the generators of one seed.

    It also returns their log-probs and entropies at temperature 1.
    """

    seed: int
    temperature: Callable[[Tensor, Rollout], Tensor] | None

    def __post_init__(self) -> None:
        self.problems, self.generator = (
            random.Random(f"problems {self.seed}"),
            torch.Generator().manual_seed(self.seed),
        )
        self.encode = task.make_tokenizer().encode
        self.last: Rollout | None = None

    def next_tokens(self, logits: Tensor) -> Tensor:
        """Sample ``[B, 1]`` ids from ``[B, V]`` logits."""
        if self.temperature and self.last:
            entropies = torch.distributions.Categorical(logits=logits).entropy()
            logits = logits / self.temperature(entropies, self.last)[:, None]
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)

    @torch.no_grad()
    def rollout(self, model: Any) -> Rollout:
        pairs = [
            (self.problems.randrange(100), self.problems.randrange(100)) for _ in range(PROMPTS)
        ]
        prompts = torch.tensor(
            [self.encode(task.prompt(a, b)) for a, b in pairs]
        ).repeat_interleave(GROUP, 0)
        answers = torch.tensor(
            [[*self.encode(task.written(a + b, 3)), EOS] for a, b in pairs]
        ).repeat_interleave(GROUP, 0)
        tokens, read, cache = [], prompts, None
        for _ in range(task.ANSWER_TOKENS):
            out = model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            read = self.next_tokens(out.logits[:, -1])
            tokens.append(read)
            cache = out.past_key_values
        completions = torch.cat(tokens, 1)
        ended = (completions == EOS).cumsum(1)
        # up to and including the first <eos>
        mask = (ended - (completions == EOS).long()) == 0
        ids = torch.cat([prompts, completions], 1)
        logps, entropies = rw.token_logps(
            logits_of(model, ids), completions, completion_mask=mask, return_entropy=True
        )
        right = (completions == answers).all(1)
        self.last = Rollout(ids, completions, mask, logps, entropies, right.float())
        return self.last


def train(variant: Variant, model: Any, rollouts: int, seed: int) -> Course:
    """Train a copy of the model for some rollouts, with one update for each of the
    variant's two losses.
    """
    model = copy.deepcopy(model).train()
    sampler = Sampler(seed, variant.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    course = Course([], [])
    for _ in range(rollouts):
        rollout = sampler.rollout(model)
        course.rewards.append(rollout.rewards.mean().item())
        course.entropies.append(rollout.entropies[rollout.completion_mask].mean().item())
        advantages = variant.advantages(rollout)
        for spec in variant.specs(rollout):
            out = rw.policy_loss(
                logits_of(model, rollout.input_ids),
                rollout.completion_ids,
                advantages,
                spec=spec,
                completion_mask=rollout.completion_mask,
                old_per_token_logps=rollout.old_per_token_logps,
                consume_logits=True,
            )
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return course
