"""Advantages of the best of k, of likelihoods and of optimal values against the
sources' arithmetic, one group after the other.
"""

import math

import pytest
import torch
from oracles import trainers as oracle

from reweight_ops import advantages as adv
from reweight_ops import rewards
from reweight_ops.errors import InvalidCall

INDEX = [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]
GROUPS = {"group_ids": torch.tensor(INDEX), "num_groups": 4}


def close(got, expected):
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_passk_training(k):
    correct = [1.0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    inside = [i for i, q in enumerate(INDEX) if INDEX.count(q) >= k]
    expected = oracle.passk_training([correct[i] for i in inside], [INDEX[i] for i in inside], k)
    got = adv.passk_training(torch.tensor(correct, dtype=torch.float64), k=k, **GROUPS)
    close(got[inside], expected)
    assert (
        not got[[i for i in range(10) if i not in inside]].any() and max(map(abs, expected)) > 0.5
    )
    if k == 1:
        # GRPO, by the population's deviation
        first = torch.tensor(correct[:4], dtype=torch.float64)
        close(got[:4], ((first - first.mean()) / (first.std(correction=0) + 1e-6)).tolist())


def test_maxrl():
    rewards = [1.0, 0, 0.5, 1, 0, 1, 0.75, 0, 0, 0]
    expected = oracle.skyrl_maxrl(rewards, INDEX)
    close(
        adv.maxrl(torch.tensor(rewards, dtype=torch.float64), singleton="reward", **GROUPS),
        expected,
    )
    assert float(adv.maxrl(torch.tensor(rewards), **GROUPS)[6]) == 0


def test_optimal_values():
    """V* = β·log mean exp(r/β), of the rewards that are known; far rewards do not
    overflow.
    """
    rewards = torch.arange(10, dtype=torch.float64)
    reference = torch.tensor(
        [[0.0, 1, 1], [0, 0, math.nan], [300, 0, 0], [1, 1, 1]], dtype=torch.float64
    )
    values = [0.5 * math.log((1 + 2 * math.exp(2)) / 3), 0.0, 300 + 0.5 * math.log(1 / 3), 1.0]
    close(
        adv.a_star_po(rewards, reference, **GROUPS),
        [x - values[q] for x, q in zip(rewards.tolist(), INDEX, strict=True)],
    )
    with pytest.raises(Exception, match="expected \\(4, M\\)"):
        adv.a_star_po(rewards, reference[:2], **GROUPS)


def test_lite_ppo_is_grpos_batch_scale():
    rewards = torch.tensor([1.0, 0, 0.5, 1, 0, 1, 0.75, 0, 0, 0], dtype=torch.float64)
    means = [rewards[[j for j in range(10) if INDEX[j] == q]].mean() for q in INDEX]
    close(
        adv.lite_ppo(rewards, epsilon=0.1, **GROUPS),
        [float((x - m) / (rewards.std() + 0.1)) for x, m in zip(rewards, means, strict=True)],
    )


LENGTHS = torch.tensor([3.0, 4.0, 5.0, 6.0])
OF_LABELS = {
    "psr_nsr": adv.psr_nsr,
    "passk_training": lambda x: adv.passk_training(x, k=2, group_size=4),
    "lens": lambda x: adv.lens(x, torch.full((4, 6), -0.5), torch.ones(4, 6), group_size=4),
    "grpo_lead_length": lambda x: rewards.grpo_lead_length(x, LENGTHS, group_size=4),
    "grpo_lambda_length": lambda x: rewards.grpo_lambda_length(x, LENGTHS, alpha=0.1, group_size=4),
    "traac": lambda x: rewards.traac(x, LENGTHS, LENGTHS, LENGTHS, scale=2.0),
    "soft_multi_choice": lambda x: rewards.soft_multi_choice(torch.ones(1, 4), x[None]),
}


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_of_minus_one_are_refused(name):
    """A wrong response of -1 would otherwise count as correct."""
    labels = torch.tensor([1.0, -1.0, 1.0, -1.0])
    OF_LABELS[name](labels.clamp(min=0))
    with pytest.raises(InvalidCall, match=f"{name}: correct has a number below 0"):
        OF_LABELS[name](labels)
