"""Reward transforms (golden rows are in the package) against the papers' equations in
loops.
"""

import math

import pytest
import torch
from oracles import estimators

import reweight_ops as rw
from reweight_ops import rewards
from reweight_ops.testing import golden_advantages

NAN, INF = math.nan, math.inf


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(
        got, torch.as_tensor(expected, dtype=got.dtype), rtol=1e-10, atol=1e-10, equal_nan=True
    )


#: Three reward models; one did not score, two did not, none did.
MEMBERS = f64(*golden_advantages.MEMBERS)


def test_lsc():
    # Its exp is the probability that a completion is good. A reference a completion.
    close(rewards.lsc(f64(2, 3), f64(2, 3)).exp(), [0.5, 0.5])
    close(
        rewards.lsc(f64(1.5, 0, 4), f64(1, 2, 4)),
        [estimators.log_sigmoid(x) for x in (0.5, -2.0, 0.0)],
    )
    assert rewards.lsc(f64(-1000.0, 1000.0), 0.0).tolist() == [-1000, 0]  # no overflow
    with pytest.raises(rw.InvalidCall, match=r"reference has shape \(2,\), expected \(3,\)"):
        rewards.lsc(f64(1, 2, 3), f64(1, 2))


def test_weighted_sum():
    w = f64(1, 1, 2)
    close(rewards.weighted_sum(MEMBERS, w), [15, 7, -8, NAN])
    close(rewards.weighted_sum(MEMBERS), [9, 4, -4, NAN])


def test_mixes_refuse():
    with pytest.raises(rw.InvalidCall, match="a harmonic mean needs rewards >= 0"):
        rewards.harmonic_mean(MEMBERS)
    with pytest.raises(rw.InvalidCall, match="a weight is negative"):
        rewards.weighted_mean(MEMBERS, f64(1, 1, -1))
    with pytest.raises(rw.InvalidCall, match=r"weights has shape \(2,\), expected \(3,\)"):
        rewards.weighted_sum(MEMBERS, f64(1, 1))


def test_trust_grpo():
    g = torch.Generator().manual_seed(2)
    outcome = torch.randint(0, 3, (30,), generator=g).double() / 2
    outcome[:5], outcome[5:10] = 1, 0  # no wrong answer, no right one
    thinking = torch.rand(30, generator=g, dtype=torch.float64)
    thinking[10:15] = 1 - outcome[10:15]  # wrong answers that are praised
    outcome[10:15] = f64(1, 1, 0, 0, 0)
    thinking[10:15] = f64(0.2, 0.4, 0.9, 0.8, 1.0)
    expected = [
        x
        for k in range(6)
        for x in estimators.trust_grpo(
            *(c[5 * k : 5 * k + 5].tolist() for c in (outcome, thinking)), 30, 100
        )
    ]
    close(rewards.trust_grpo(outcome, thinking, step=30, total_steps=100, group_size=5), expected)
    close(
        rewards.trust_grpo(
            outcome, thinking, step=torch.tensor(30), total_steps=torch.tensor(100), group_size=5
        ),
        expected,
    )


def test_grpo_lead_length():
    g = torch.Generator().manual_seed(3)
    correct = (torch.rand(40, generator=g) < 0.6).double()
    correct[:8], correct[8:16] = 0, 1
    correct[16:24] = f64(1, 0, 0, 0, 0, 0, 0, 0)
    lengths = torch.randint(1000, 9000, (40,), generator=g).double()
    lengths[24:27] = 100
    for limit in (0.0, 1500.0, 4000.0):
        expected = [
            x
            for k in range(5)
            for x in estimators.grpo_lead_length(
                *(c[8 * k : 8 * k + 8].tolist() for c in (correct, lengths)), limit=limit
            )
        ]
        close(rewards.grpo_lead_length(correct, lengths, min_length=limit, group_size=8), expected)
    # Equal lengths of the correct ones are exactly average, whatever the rounding of
    # their mean beside a shorter wrong one.
    odd = torch.tensor([6.0, 5824.7, 5824.7, 5824.7])
    assert rewards.grpo_lead_length(
        torch.tensor([0, 1, 1, 1]), odd, min_length=0.0, group_size=4
    ).tolist() == [-1, 1, 1, 1]
    assert (
        rewards.grpo_lead_length(
            torch.tensor([0, 0, 0, 1]), odd, min_length=0.0, epsilon=0.0, group_size=4
        )[3]
        == 1
    )


def test_grpo_lambda_length():
    g = torch.Generator().manual_seed(4)
    correct = (torch.rand(40, generator=g) < 0.5).double()
    lengths = torch.randint(10, 90, (40,), generator=g).double()
    correct[:4] = correct[36:] = f64(1, 1, 1, 0)  # a tie, decided by number
    correct[4:8] = f64(0, 0, 1, 0)
    groups = [
        [(bool(correct[i]), lengths[i].item()) for i in range(4 * k, 4 * k + 4)] for k in range(10)
    ]
    for fraction in (0.0, 0.1, 0.15, 0.25, 0.7, 1.0):
        got = rewards.grpo_lambda_length(
            correct, lengths, alpha=0.6, fraction=fraction, group_size=4
        )
        close(got, estimators.grpo_lambda_length(groups, 0.6, fraction))
    with pytest.raises(rw.InvalidCall, match=r"expected a number in \[0, 1\]"):
        rewards.grpo_lambda_length(correct, lengths, alpha=0.6, fraction=20, group_size=4)
    with pytest.raises(TypeError, match="alpha"):
        rewards.grpo_lambda_length(correct, lengths, group_size=4)


def test_a_reward_into_an_advantage():
    """A NaN that stays in a reward is a completion without a score for
    the advantage."""
    got = rw.advantages.grpo(rewards.wco(MEMBERS), group_size=4)
    assert got[3] == 0 and got.isfinite().all() and got[:3].abs().sum() > 1
