"""Golden rows of advantages and rewards. ``golden_rows`` collects them."""

from __future__ import annotations

from math import e, exp, log, nan, sqrt
from typing import Any

from ..advantages import spo_segments
from .golden_row import LN2, Built, Golden, sigmoid

#: Scores of three reward models. One model did not score in the second row, two did not
#: in the third, and none did in the fourth.
MEMBERS = [[1.0, 2.0, 6.0], [1.0, nan, 3.0], [nan, nan, -4.0], [nan, nan, nan]]


def shares(*terms: float, total: float = 1.0) -> list[float]:
    return [total * x / sum(terms) for x in terms]


def _advantage(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("advantage", name, arguments, expected)


ADVANTAGES = (
    # The mean is 1/2, and the unbiased std is sqrt(1/3).
    _advantage(
        "grpo",
        [sqrt(0.75), -sqrt(0.75), -sqrt(0.75), sqrt(0.75)],
        rewards=[1.0, 0, 0, 1],
        epsilon=0,
        group_size=4,
    ),
    _advantage(
        "dr_grpo", [0.5, -0.5, -0.5, 0.5, 1, -1], rewards=[1.0, 0, 0, 1, 3, 1], group_size=2
    ),
    # With u = 1/sqrt(2) the sum is (u, -u, u, -u) + (-u, u, u, -u)/2 = u(1, -1, 3,
    # -3)/2. Its mean over the batch is 0, and its variance is u²·5/3 = 5/6.
    _advantage(
        "gdpo",
        [x * sqrt(3 / 5) for x in (0.5, -0.5, 1.5, -1.5)],
        rewards=[[1.0, 0], [0, 1], [1, 2], [0, 0]],
        weights=[1.0, 0.5],
        epsilon=0,
        group_size=2,
    ),
    # The reward 3 is against the others' mean 1.
    _advantage("rloo", [2, -1, -1], rewards=[3.0, 1, 1], group_size=3),
    # Two tokens have reward 1 and six have 0, so the baseline is 1/4.
    _advantage("opo", [0.75, -0.25], rewards=[1.0, 0], lengths=[2, 6], group_size=2),
    # The centered rewards are +-.5. The momentum is clipped to -.2 and +.28 in the
    # first row. In the second it is +-.1, which is inside the clip.
    _advantage("aapo", [0.3, -0.22], rewards=[1.0, 0], reference_rewards=[2.0, -1], group_size=2),
    _advantage("aapo", [0.6, -0.6], rewards=[1.0, 0], reference_rewards=[0.9, 0.1], group_size=2),
    # The reference means are 1/3 (of 1, 0, 0) and 1/2 (of one reward, since two
    # failed).
    _advantage(
        "pvpo",
        [2 / 3, -1 / 3, 0.5, -0.5],
        rewards=[1.0, 0, 1, 0],
        reference_rewards=[[1.0, 0, 0], [0.5, nan, nan]],
        group_size=2,
    ),
    # The weight is exp(2·(1 - 1/2)) = e, and it is e² for the all-wrong group. That
    # group's advantages are 0 in the first row, and +-.1 in the second. The mean of the
    # four weights is (e + e²)/2.
    _advantage(
        "difficulty_prior",
        [e / 2, -e / 2, 0, 0],
        rewards=[1.0, 0, 0, 0],
        correct=[1, 0, 0, 0],
        slope=2.0,
        group_size=2,
    ),
    _advantage(
        "difficulty_prior",
        [2 * w / (e + e**2) * a for w, a in ((e, 0.5), (e, -0.5), (e**2, -0.1), (e**2, 0.1))],
        rewards=[1.0, 0, 0, 0.2],
        correct=[1, 0, 0, 0],
        slope=2.0,
        normalize=True,
        group_size=2,
    ),
    # The mean is -1/2 and the std is 1, so z is 3/2 and -1/2. A quarter is right:
    # w(1/4) = .4 + 1.1/(1 + e^-5), and w(3/4) = .4 + 1.1/2 = .95.
    _advantage(
        "grpo_lead",
        [1.5 * (0.4 + 1.1 * sigmoid(5)), *[-0.475] * 3],
        rewards=[1.0, -1, -1, -1],
        epsilon=0,
        group_size=4,
    ),
    # At p = 1/4, λ = 1 - 4·3/16 = 1/4. The z-scores are 3/2 and -1/2 (the std is 1/2).
    # As multiples of the mean 1/4 the deviations are 3 and -1. The sums are 9/8 + 3/4
    # and -3/8 - 1/4.
    _advantage(
        "mapo_mixed",
        [1.875, *[-0.625] * 3],
        rewards=[1.0, 0, 0, 0],
        correct=[1, 0, 0, 0],
        epsilon=0,
        group_size=4,
    ),
    # Where half are correct, the z-score counts alone. Where all are correct and only a
    # format reward differs, the percentage of the mean counts alone.
    _advantage(
        "mapo_mixed",
        [sqrt(0.5), -sqrt(0.5)],
        rewards=[1.0, 0],
        correct=[1, 0],
        epsilon=0,
        group_size=2,
    ),
    _advantage(
        "mapo_mixed", [0.2, -0.2], rewards=[1.2, 0.8], correct=[1, 1], epsilon=0, group_size=2
    ),
    # All are wrong. With the virtual 1 the mean is 1/(G+1) and the variance is 1/(G+1),
    # so the advantage is -1/sqrt(G+1).
    _advantage("ngrpo", [-1 / sqrt(5)] * 4, rewards=[0.0] * 4, epsilon=0, group_size=4),
    # A completion that is alone in its group keeps its reward, as in the authors' code.
    # With "zero" it is not used.
    _advantage("ngrpo", [0.25, -2], rewards=[0.25, -2.0], epsilon=0, group_size=1),
    _advantage("ngrpo", [0, 0], rewards=[0.25, -2.0], singleton="zero", epsilon=0, group_size=1),
    _advantage("ngrpo", [-1 / 3] * 8, rewards=[0.0] * 8, epsilon=0, group_size=8),
    # A quarter is right, which is under 1 - .4. The baseline is 0, and the population
    # std is sqrt(1/4·3/4).
    _advantage(
        "qae",
        [4 / sqrt(3), 4 / sqrt(3), *[0.0] * 6],
        rewards=[1.0, 1, 0, 0, 0, 0, 0, 0],
        epsilon=0,
        group_size=8,
    ),
    # All are wrong, and D = 2·1/2. r is -1/2·(1/2)/(1/2) = -1/2 and -1/2·(1/4)/(3/4) =
    # -1/6. Centered it is -+1/6, and the factor is 1/4.
    _advantage(
        "lens",
        [-1 / 24, 1 / 24],
        correct=[0.0, 0],
        old_per_token_logps=[[-LN2], [-2 * LN2]],
        completion_mask=[[1], [1]],
        epsilon=0,
        group_size=2,
    ),
    # D = max(2·1/2, 3/(1/(1/2))) = 3/2. r is 1, -1/3·(1/4)/(5/4) = -1/15, and
    # -1/3·(1/2)/1 = -1/6. These are 67, -29 and -38 ninetieths off their mean.
    _advantage(
        "lens",
        [67 / sqrt(3387), -29 / sqrt(3387), -38 / sqrt(3387)],
        correct=[1.0, 0, 0],
        old_per_token_logps=[[-LN2], [-2 * LN2], [-LN2]],
        completion_mask=[[1], [1], [1]],
        epsilon=0,
        group_size=3,
    ),
    # The metrics are equal. Rows 0 and 1 are S with mean 1.5, and rows 2 and 3 are L
    # with mean 0.
    _advantage("canon", [2, 1, -1.5, -1.5], rewards=[2.0, 1, 0, 0], metric=[7.0] * 4, group_size=4),
    # The inter part is .9·2 - .1, then .9·1 - .1, then -.9·1.5 + .1 twice. The intra
    # part is .5, -.5, 0, 0. The result is half of each.
    _advantage(
        "canon",
        [1.1, 0.15, -0.625, -0.625],
        rewards=[2.0, 1, 0, 0],
        metric=[1.0, 2, 3, 4],
        inter_weight=0.5,
        alpha=0.9,
        beta=0.1,
        group_size=4,
    ),
    # z = +-1/sqrt(2) is divided by entropies of 1/2 and 3/2 of their mean.
    _advantage(
        "edge_grpo",
        [sqrt(2), -sqrt(2) / 3],
        rewards=[1.0, 0],
        entropy=[0.5, 1.5],
        epsilon=0,
        group_size=2,
    ),
    # One token has reward 1 and three have 0. The mean is 1/4, and the population std
    # is sqrt(3)/4.
    _advantage(
        "hapo", [sqrt(3), -1 / sqrt(3)], rewards=[1.0, 0], lengths=[1, 3], epsilon=0, group_size=2
    ),
    # The correct completion is short and the wrong one is long, so |A| = sqrt(99) >= 5.
    # GRPO's unbiased advantage replaces it. For a pair that is +-1/sqrt(2).
    _advantage(
        "hapo", [sqrt(0.5), -sqrt(0.5)], rewards=[1.0, 0], lengths=[1, 99], epsilon=0, group_size=2
    ),
    # The episodes have +-1/2. The steps have 3 and 1 at anchor 0, and 2 and 2 at anchor
    # 1.
    _advantage(
        "gigpo",
        [1.5, 0.5, -1.5, -0.5],
        episode_rewards=[1.0, 0],
        step_returns=[3.0, 2, 1, 2],
        episode_ids=[0, 0, 1, 1],
        anchor_ids=[0, 1, 0, 1],
        num_anchors=2,
        group_size=2,
    ),
    # The recursion goes over the masked token. δ is 1 + .5·.25 - .5 = .625 and 2 - .25
    # = 1.75. The first advantage is .625 + .25·1.75. The returns add the values.
    _advantage(
        "gae",
        [[1.0625, 0, 1.75], [1.5625, 0, 2]],
        rewards=[[1.0, 9, 2]],
        values=[[0.5, 9, 0.25]],
        completion_mask=[[1, 0, 1]],
        gamma=0.5,
        lam=0.5,
        whitened=False,
    ),
    # The advantages are the same. At λ = 1 the critic's returns are those of the
    # rewards: 1 + .5·2 and 2.
    _advantage(
        "decoupled_gae",
        [[1.0625, 0, 1.75], [2, 0, 2]],
        rewards=[[1.0, 9, 2]],
        values=[[0.5, 9, 0.25]],
        completion_mask=[[1, 0, 1]],
        gamma=0.5,
        lam_actor=0.5,
        lam_critic=1.0,
        whitened=False,
    ),
    # The returns are 2 and 4. Their mean is 3, and their unbiased variance is 2.
    _advantage(
        "reinforce_plus_plus",
        [-1 / sqrt(2 + 1e-8), 1 / sqrt(2 + 1e-8)],
        rewards=[[0.0, 4]],
        completion_mask=[[1, 1]],
        gamma=0.5,
    ),
    # The centered rewards are 1, -1, 0, 0. Their unbiased variance is 2/3.
    _advantage(
        "reinforce_plus_plus_baseline",
        [1 / sqrt(2 / 3 + 1e-8), -1 / sqrt(2 / 3 + 1e-8), 0, 0],
        rewards=[3.0, 1, 4, 4],
        completion_mask=[[1]] * 4,
        group_size=2,
    ),
    # The gain of 2 is clipped to 1. The advantage is .5 - .1·(-2 + 1) at the end, and
    # .25 - .1·(-1 + 2) before it.
    _advantage(
        "remax",
        [0.15, 0.6],
        rewards=[3.0],
        greedy_rewards=[1.0],
        completion_mask=[[1, 1]],
        reward_clip=1.0,
        gamma=0.5,
        kl_coef=0.1,
        per_token_logps=[[-1.0, -2]],
        ref_per_token_logps=[[-2.0, -1]],
    ),
    # The cuts are before the first and the third token. The advantages are .75 - .25
    # and 1 - .75.
    _advantage(
        "spo_chain",
        [0.5, 0.5, 0.25],
        values=[[0.25, 0.75]],
        rewards=[1.0],
        completion_mask=[[1, 1, 1]],
        segments=Built(
            spo_segments,
            {
                "old_per_token_logps": [[-LN2, -0.01, -LN2]],
                "completion_mask": [[1, 1, 1]],
                "interval": 1,
            },
        ),
    ),
    # Root 0 has the value .5 and the children .25 and .75. The second child has the
    # leaves 1 and .5. Another root, .2, has one leaf, .4.
    _advantage(
        "spo_tree",
        [0, -0.25, 0.25, 0.25, -0.25, 0, 0.2],
        values=[0.5, 0.25, 0.75, 1.0, 0.5, 0.2, 0.4],
        parents=[-1, 0, 0, 2, 2, -1, 5],
    ),
    # The siblings .25 and .75 have a population std of .25, and so have 1 and .5. An
    # only child has a std of 0.
    _advantage(
        "spo_tree",
        [0, -0.5, 0.5, 0.5, -0.5, 0, 0.8],
        values=[0.5, 0.25, 0.75, 1.0, 0.5, 0.2, 0.4],
        parents=[-1, 0, 0, 2, 2, -1, 5],
        scale="std",
        epsilon=0.25,
    ),
)


def _reward(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("reward", name, arguments, expected)


REWARDS = (
    _reward("wco", [1, 1, -4, nan], rewards=MEMBERS),
    # The means are 3, 2, -4. The unbiased variances are (4 + 1 + 9)/2 = 7, (1 + 1)/1 =
    # 2, and 0 of one member.
    _reward("uwo", [3 - 3.5, 2 - 1, -4, nan], rewards=MEMBERS, coef=0.5),
    _reward("uwo", [3 - 0.7, 2 - 0.2, -4, nan], rewards=MEMBERS),
    _reward(
        "lsc", [log(sigmoid(0.5)), log(sigmoid(-2)), -LN2], rewards=[1.5, -1, 1], reference=1.0
    ),
    # The result is the sum over the rewards that are there. Each adds log 1/2.
    _reward(
        "lsc",
        [-2 * LN2, -LN2, nan],
        rewards=[[2.0, 3], [nan, 3], [nan, nan]],
        reference=[[2.0, 3], [2, 3], [0, 0]],
    ),
    _reward(
        "weighted_mean",
        [(1 + 2 + 12) / 4, (1 + 6) / 3, -4, nan],
        rewards=MEMBERS,
        weights=[1.0, 1, 2],
    ),
    _reward("weighted_mean", [3, 2, -4, nan], rewards=MEMBERS),
    # The weights 1/4, 1/4, 1/2 of 1, 2, 6 give 1/(1/4 + 1/8 + 1/12) = 24/11. The
    # weights 1/3 and 2/3 of 1 and 3 give 1/(1/3 + 2/9) = 9/5.
    _reward(
        "harmonic_mean",
        [24 / 11, 9 / 5, 4, nan],
        rewards=[[abs(x) for x in row] for row in MEMBERS],
        weights=[1.0, 1, 2],
    ),
    # A reward of 0 makes the mean 0, unless it has no weight.
    _reward("harmonic_mean", [0, 0], rewards=[[0.0, 5], [0, 5]], weights=[1.0, 1]),
    _reward("harmonic_mean", [5], rewards=[[0.0, 5]], weights=[0.0, 1]),
    # The thinking of right answers scores .3, and that of wrong ones .9. Trust is
    # e^-.6, and the reward has .3 of it. At step 0 nothing is annealed.
    _reward(
        "trust_grpo",
        [o + exp(-0.6) * 0.3 * t for o, t in ((1, 0.2), (1, 0.4), (0, 0.9), (0, 0.8), (0, 1))],
        outcome_rewards=[1.0, 1, 0, 0, 0],
        thinking_rewards=[0.2, 0.4, 0.9, 0.8, 1],
        step=0,
        total_steps=100,
        group_size=5,
    ),
    # Without a wrong answer trust is 1, however bad the thinking of the right ones is.
    _reward(
        "trust_grpo",
        [1 - 0.6, 1 - 0.3],
        outcome_rewards=[1.0, 1],
        thinking_rewards=[-2.0, -1],
        step=0,
        total_steps=9,
        group_size=2,
    ),
    # The three shortest answers have a mean length of exactly 4000, which is short
    # enough. One of them is wrong. With the fourth answer the mean would be 5250.
    _reward(
        "grpo_lead_length",
        [1, -1, 1, 1],
        correct=[1.0, 0, 1, 1],
        lengths=[5000.0, 3000, 4000, 9000],
        group_size=4,
    ),
    # A pair is never short enough, since it has no three shortest. z is -+1/sqrt(2).
    _reward(
        "grpo_lead_length",
        [exp(0.05 / sqrt(2)), exp(-0.05 / sqrt(2))],
        correct=[1.0, 1],
        lengths=[50.0, 70],
        epsilon=0.0,
        group_size=2,
    ),
    # The lengths 2, 4, 6 have std 2. The middle one gives up alpha/2, the longest more,
    # and the shortest less. A wrong answer gets nothing.
    _reward(
        "grpo_lambda_length",
        [1 - 0.5 * sigmoid(-1), 0.75, 1 - 0.5 * sigmoid(1), 0],
        correct=[1.0, 1, 1, 0],
        lengths=[2.0, 4, 6, 4],
        alpha=0.5,
        epsilon=0,
        group_size=4,
    ),
    # A right answer of median length gets 4 + .5 + 1/2. A wrong one gets the format
    # reward alone. A right one that is one scale shorter gets 4 + sigmoid(1).
    _reward(
        "traac",
        [5, 1, 4 + sigmoid(1), nan],
        correct=[1.0, 0, 1, nan],
        format_rewards=[0.5, 1, 0, 0],
        lengths=[10.0, 1, 6, 1],
        median_lengths=[10.0, 9, 10, 9],
        scale=4.0,
    ),
)
