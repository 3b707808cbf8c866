"""Batches of rollouts with every quantity that a recipe may read, and a policy so small
that a loop takes milliseconds.
"""

from types import SimpleNamespace

import torch

import reweight_ops as rw

B, T, V, GROUP = 8, 6, 11, 4


class Policy(torch.nn.Module):
    """Logits ``[B, T, V]`` of the completions' tokens. Each row is from the token
    before it.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(V, V, generator=generator))

    def forward(self, batch):
        return self.table[batch.completion_ids.roll(1, -1)]


def make_rollout(policy, name, seed=0):
    """A batch for the recipe ``name``, which decides what differs between recipes under
    one name (``values``).
    """
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.tensor([6, 3, 5, 4, 6, 2, 6, 1])[:, None]).float()
    batch = SimpleNamespace(
        completion_ids=torch.randint(V, (B, T), generator=g),
        completion_mask=mask,
        group_size=GROUP,
        vocab_size=V,
    )
    with torch.no_grad():
        stats = rw.token_stats(
            policy(batch), batch.completion_ids, stats=("logps", "entropies", "log_sum_p_sq")
        )
        logps, entropies = stats.logps, stats.entropies
    correct = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    values = {"spo_chain": torch.rand(B, T, generator=g), "spo_tree": torch.rand(B, generator=g)}

    def near(scale):
        return logps + scale * torch.randn(B, T, generator=g)

    vars(batch).update(
        rewards=torch.rand(B, generator=g),
        rewards_per_func=torch.rand(B, 2, generator=g),
        correct=correct,
        chosen_options=torch.eye(3)[torch.arange(B) % 3],
        right_options=torch.tensor([1.0, 1, 0]).expand(B, 3),
        class_counts=torch.arange(1.0, V + 1),
        lengths=mask.sum(-1),
        old_per_token_logps=near(0.2),
        ref_per_token_logps=near(0.3),
        sampling_per_token_logps=near(0.02),
        log_sum_p_sq=stats.log_sum_p_sq,
        entropies=entropies,
        mean_entropies=(entropies * mask).sum(-1) / mask.sum(-1),
        reference_rewards=torch.rand(
            (B // GROUP, 3) if name in ("pvpo", "a_star_po") else (B,), generator=g
        ),
        greedy_rewards=torch.rand(B, generator=g),
        values=values.get(name, torch.rand(B, T, generator=g)),
        parents=torch.tensor([-1, 0, 0, 1, 1, 2, 2, 0]),
        episode_rewards=torch.rand(4, generator=g),
        step_returns=torch.rand(B, generator=g),
        episode_ids=torch.arange(B) // 2,
        anchor_ids=torch.arange(B) % 2,
        num_anchors=2,
        labels=torch.tensor([1.0, -1] * 4),
        returns=torch.rand(B, generator=g),
        start_values=torch.rand(B, generator=g),
        source_ids=torch.arange(B) % 3,
        source_counts=torch.tensor([3.0, 3, 2]),
        teacher_logits=4 * torch.randn(B, T, V, generator=g),
        augmented=SimpleNamespace(completion_ids=torch.randint(V, (B, T), generator=g)),
        lambdas=torch.ones(B, T),
        metrics=(0.5 + seed, 0.25),
        gradients=torch.randn(2, 5, generator=g),
    )
    if name == "tpo":  # triples
        vars(batch).update(completion_ids=batch.completion_ids[:6], completion_mask=mask[:6])
        return batch
    batch.segments = rw.advantages.spo_segments(batch.old_per_token_logps, mask)
    return batch
