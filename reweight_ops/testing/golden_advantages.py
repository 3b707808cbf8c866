"""Golden rows of advantages and rewards. ``golden_rows`` collects them."""

from __future__ import annotations

from math import e, exp, log, nan, sqrt
from typing import Any

from ..advantages import spo_segments
from .golden_row import LN2, Built, Golden, sigmoid

#: Scores of three reward models; one did not score, two did not, none did.
MEMBERS = [[1.0, 2.0, 6.0], [1.0, nan, 3.0], [nan, nan, -4.0], [nan, nan, nan]]


def shares(*terms: float, total: float = 1.0) -> list[float]:
    return [total * x / sum(terms) for x in terms]


def _advantage(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("advantage", name, arguments, expected)


ADVANTAGES = (
    # Mean 1/2, unbiased std sqrt(1/3).
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
    # u = 1/sqrt(2): (u, -u, u, -u) + (-u, u, u, -u)/2 = u(1, -1, 3, -3)/2: mean 0,
    # variance u²·5/3 = 5/6 over the batch.
    _advantage(
        "gdpo",
        [x * sqrt(3 / 5) for x in (0.5, -0.5, 1.5, -1.5)],
        rewards=[[1.0, 0], [0, 1], [1, 2], [0, 0]],
        weights=[1.0, 0.5],
        epsilon=0,
        group_size=2,
    ),
    # 3 against the others' mean 1.
    _advantage("rloo", [2, -1, -1], rewards=[3.0, 1, 1], group_size=3),
    # Two tokens of reward 1 and six of 0: baseline 1/4.
    _advantage("opo", [0.75, -0.25], rewards=[1.0, 0], lengths=[2, 6], group_size=2),
    # Centered +-.5, and momentum clipped to -.2 and +.28; or +-.1, inside.
    _advantage("aapo", [0.3, -0.22], rewards=[1.0, 0], reference_rewards=[2.0, -1], group_size=2),
    _advantage("aapo", [0.6, -0.6], rewards=[1.0, 0], reference_rewards=[0.9, 0.1], group_size=2),
    # Reference means 1/3 (of 1, 0, 0) and 1/2 (of one; two failed).
    _advantage(
        "pvpo",
        [2 / 3, -1 / 3, 0.5, -0.5],
        rewards=[1.0, 0, 1, 0],
        reference_rewards=[[1.0, 0, 0], [0.5, nan, nan]],
        group_size=2,
    ),
    # exp(2·(1 - 1/2)) = e, and e² for the all-wrong group, whose advantages are 0, or
    # +-.1. The mean of the four weights is (e + e²)/2.
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
    # Mean -1/2, std 1: z = 3/2 and -1/2. A quarter is right: w(1/4) = .4 + 1.1/(1 +
    # e^-5), w(3/4) = .4 + 1.1/2 = .95.
    _advantage(
        "grpo_lead",
        [1.5 * (0.4 + 1.1 * sigmoid(5)), *[-0.475] * 3],
        rewards=[1.0, -1, -1, -1],
        epsilon=0,
        group_size=4,
    ),
    # p = 1/4: λ = 1 - 4·3/16 = 1/4; z = 3/2, -1/2 (std 1/2); of the mean 1/4: 3, -1.
    # 9/8 + 3/4 and -3/8 - 1/4.
    _advantage(
        "mapo_mixed",
        [1.875, *[-0.625] * 3],
        rewards=[1.0, 0, 0, 0],
        correct=[1, 0, 0, 0],
        epsilon=0,
        group_size=4,
    ),
    # Half correct: the z-score alone. All correct but for a format reward: percent of
    # the mean.
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
    # All wrong, with the virtual 1: mean 1/(G+1), variance 1/(G+1), so -1/sqrt(G+1).
    _advantage("ngrpo", [-1 / sqrt(5)] * 4, rewards=[0.0] * 4, epsilon=0, group_size=4),
    # A completion alone in its group keeps its reward, as in the authors' code; or is
    # not used.
    _advantage("ngrpo", [0.25, -2], rewards=[0.25, -2.0], epsilon=0, group_size=1),
    _advantage("ngrpo", [0, 0], rewards=[0.25, -2.0], singleton="zero", epsilon=0, group_size=1),
    _advantage("ngrpo", [-1 / 3] * 8, rewards=[0.0] * 8, epsilon=0, group_size=8),
    # A quarter is right, under 1 - .4: baseline 0, population std sqrt(1/4·3/4).
    _advantage(
        "qae",
        [4 / sqrt(3), 4 / sqrt(3), *[0.0] * 6],
        rewards=[1.0, 1, 0, 0, 0, 0, 0, 0],
        epsilon=0,
        group_size=8,
    ),
    # All wrong, D = 2·1/2: r = -1/2·(1/2)/(1/2) = -1/2 and -1/2·(1/4)/(3/4) = -1/6,
    # centered -+1/6, times 1/4.
    _advantage(
        "lens",
        [-1 / 24, 1 / 24],
        correct=[0.0, 0],
        old_per_token_logps=[[-LN2], [-2 * LN2]],
        completion_mask=[[1], [1]],
        epsilon=0,
        group_size=2,
    ),
    # D = max(2·1/2, 3/(1/(1/2))) = 3/2: r = 1, -1/3·(1/4)/(5/4) = -1/15, -1/3·(1/2)/1 =
    # -1/6: 67, -29, -38 ninetieths off their mean.
    _advantage(
        "lens",
        [67 / sqrt(3387), -29 / sqrt(3387), -38 / sqrt(3387)],
        correct=[1.0, 0, 0],
        old_per_token_logps=[[-LN2], [-2 * LN2], [-LN2]],
        completion_mask=[[1], [1], [1]],
        epsilon=0,
        group_size=3,
    ),
    # Equal metrics: rows 0 and 1 are S with mean 1.5, rows 2 and 3 L with mean 0.
    _advantage("canon", [2, 1, -1.5, -1.5], rewards=[2.0, 1, 0, 0], metric=[7.0] * 4, group_size=4),
    # Inter .9·2 - .1, .9·1 - .1, -.9·1.5 + .1 twice; intra .5, -.5, 0, 0; half of each.
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
    # z = +-1/sqrt(2) over entropies of 1/2 and 3/2 of their mean.
    _advantage(
        "edge_grpo",
        [sqrt(2), -sqrt(2) / 3],
        rewards=[1.0, 0],
        entropy=[0.5, 1.5],
        epsilon=0,
        group_size=2,
    ),
    # One token of 1, three of 0: mean 1/4, population std sqrt(3)/4.
    _advantage(
        "hapo", [sqrt(3), -1 / sqrt(3)], rewards=[1.0, 0], lengths=[1, 3], epsilon=0, group_size=2
    ),
    # One short correct completion among long wrong ones: |A| = sqrt(99) >= 5, so GRPO's
    # unbiased one, +-1/sqrt(2) for a pair.
    _advantage(
        "hapo", [sqrt(0.5), -sqrt(0.5)], rewards=[1.0, 0], lengths=[1, 99], epsilon=0, group_size=2
    ),
    # Episodes +-1/2; steps at anchor 0: 3 and 1, at anchor 1: 2 and 2.
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
    # Over the masked token: δ = 1 + .5·.25 - .5 = .625 and 2 - .25 = 1.75; .625 +
    # .25·1.75. Returns add the values.
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
    # The same advantages; the critic's returns at λ = 1 are those of the rewards, 1 +
    # .5·2 and 2.
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
    # Returns 2 and 4: mean 3, unbiased variance 2.
    _advantage(
        "reinforce_plus_plus",
        [-1 / sqrt(2 + 1e-8), 1 / sqrt(2 + 1e-8)],
        rewards=[[0.0, 4]],
        completion_mask=[[1, 1]],
        gamma=0.5,
    ),
    # Centered 1, -1, 0, 0: unbiased variance 2/3.
    _advantage(
        "reinforce_plus_plus_baseline",
        [1 / sqrt(2 / 3 + 1e-8), -1 / sqrt(2 / 3 + 1e-8), 0, 0],
        rewards=[3.0, 1, 4, 4],
        completion_mask=[[1]] * 4,
        group_size=2,
    ),
    # A gain of 2, clipped to 1; .5 - .1·(-2 + 1) at the end, .25 - .1·(-1 + 2) before.
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
    # Cuts before the first and the third token: .75 - .25, and 1 - .75.
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
    # Root 0 (value .5) with children .25 and .75; the second has leaves 1, .5. Another
    # root with a leaf of the same parent number elsewhere.
    _advantage(
        "spo_tree",
        [0, -0.25, 0.25, 0.25, -0.25, 0, 0.2],
        values=[0.5, 0.25, 0.75, 1.0, 0.5, 0.2, 0.4],
        parents=[-1, 0, 0, 2, 2, -1, 5],
    ),
    # Siblings .25 and .75 have a population std of .25, as have 1 and .5; an only child
    # 0.
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
    # Means 3, 2, -4; unbiased variances (4 + 1 + 9)/2 = 7, (1 + 1)/1 = 2, and 0 of one
    # member.
    _reward("uwo", [3 - 3.5, 2 - 1, -4, nan], rewards=MEMBERS, coef=0.5),
    _reward("uwo", [3 - 0.7, 2 - 0.2, -4, nan], rewards=MEMBERS),
    _reward(
        "lsc", [log(sigmoid(0.5)), log(sigmoid(-2)), -LN2], rewards=[1.5, -1, 1], reference=1.0
    ),
    # The sum over what applies, log 1/2 each.
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
    # Weights 1/4, 1/4, 1/2 of 1, 2, 6: 1/(1/4 + 1/8 + 1/12) = 24/11. 1/3 and 2/3 of 1
    # and 3: 1/(1/3 + 2/9) = 9/5.
    _reward(
        "harmonic_mean",
        [24 / 11, 9 / 5, 4, nan],
        rewards=[[abs(x) for x in row] for row in MEMBERS],
        weights=[1.0, 1, 2],
    ),
    # One that is 0 makes the mean 0, unless it has no weight.
    _reward("harmonic_mean", [0, 0], rewards=[[0.0, 5], [0, 5]], weights=[1.0, 1]),
    _reward("harmonic_mean", [5], rewards=[[0.0, 5]], weights=[0.0, 1]),
    # Right thoughts score .3, wrong ones .9: trust e^-.6, and .3 of it; at step 0
    # nothing is annealed.
    _reward(
        "trust_grpo",
        [o + exp(-0.6) * 0.3 * t for o, t in ((1, 0.2), (1, 0.4), (0, 0.9), (0, 0.8), (0, 1))],
        outcome_rewards=[1.0, 1, 0, 0, 0],
        thinking_rewards=[0.2, 0.4, 0.9, 0.8, 1],
        step=0,
        total_steps=100,
        group_size=5,
    ),
    # Without a wrong answer trust is 1, however bad the thinking of the right ones.
    _reward(
        "trust_grpo",
        [1 - 0.6, 1 - 0.3],
        outcome_rewards=[1.0, 1],
        thinking_rewards=[-2.0, -1],
        step=0,
        total_steps=9,
        group_size=2,
    ),
    # The three shortest, one of them wrong, have a mean of exactly 4000: short enough.
    # With the fourth it would be 5250.
    _reward(
        "grpo_lead_length",
        [1, -1, 1, 1],
        correct=[1.0, 0, 1, 1],
        lengths=[5000.0, 3000, 4000, 9000],
        group_size=4,
    ),
    # A pair is never short enough: there are no three shortest. z = -+1/sqrt(2).
    _reward(
        "grpo_lead_length",
        [exp(0.05 / sqrt(2)), exp(-0.05 / sqrt(2))],
        correct=[1.0, 1],
        lengths=[50.0, 70],
        epsilon=0.0,
        group_size=2,
    ),
    # Lengths 2, 4, 6 have std 2: one gives up alpha/2, the others more and less, a
    # wrong one gets nothing.
    _reward(
        "grpo_lambda_length",
        [1 - 0.5 * sigmoid(-1), 0.75, 1 - 0.5 * sigmoid(1), 0],
        correct=[1.0, 1, 1, 0],
        lengths=[2.0, 4, 6, 4],
        alpha=0.5,
        epsilon=0,
        group_size=4,
    ),
    # Right at the median: 4 + .5 + 1/2. Wrong: the format alone. Right, one scale
    # shorter: sigmoid(1).
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
