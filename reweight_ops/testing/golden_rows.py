"""Golden rows: calls small enough to work out by hand, for every entry that is not
compared with the fp64 reference. ``reweight-ops check`` runs them.
"""

from __future__ import annotations

from math import e, exp, log, nan, sqrt, tanh
from typing import Any

from ..advantages import spo_segments
from . import golden_ops
from .golden_pairs import PAIRS
from .golden_row import LN2, LN3, Built, Golden, old, sigmoid
from .golden_trainers import TRAINERS

#: The kinds that have golden rows. Losses that have kernels are compared with the fp64
#: reference, gradient and all; those of pairs have golden rows besides.
GOLDEN_KINDS = (
    "token_weight",
    "advantage",
    "reward",
    "objective",
    "sample_weight",
    "schedule",
    "pair_loss",
    "divergence",
    "op",
)


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

OBJECTIVES = (
    # sigmoid(0) has slope 1/4, violations -+.4, rate .1: u = +-.01.
    Golden(
        "objective",
        "constrained_rlhf",
        {"thresholds": (0.5, 0.5)},
        [sigmoid(0.01), sigmoid(-0.01)],
        updates=([0.1, 0.9],),
    ),
    # The second point is dominated: nothing gained, not kept. The third adds .2·.6.
    Golden(
        "objective",
        "hypervolume_reward_weighting",
        {"reference": (0.0, 0.0)},
        [0.5 + 1.5 * tanh(0.2), 0.5, 0.5 + 1.5 * tanh(0.12)],
        updates=((0.5, 0.4), (0.4, 0.3), (0.2, 1.0)),
    ),
    # Steps of .1/.2: e^(4/2), then e^(1/2).
    Golden(
        "objective",
        "gradient_reward_weighting",
        {"learning_rate": 0.1, "regularization": 0.2},
        [shares(1, e**2, 1), shares(e**0.5, e**2, 1)],
        updates=([0.0, 4, 0], [1.0, 0, 0]),
        init=(3,),
    ),
    # Windows (4, 4), (2, 2): c = 1/2, i = 0. (1, 3), (2, 2): c = 1, i = 0. Then (4, 2),
    # (2, 1): c = 1/2, i = .5/4.5. (3, 2), (2, 4): 6/5, 1/5.5.
    Golden(
        "objective",
        "recap",
        {"window": 2, "temperature": 5.0},
        [[1, 1]] * 3
        + [
            shares(exp(0.5 / 5), exp(1 / 5), total=2),
            shares(exp((0.5 + 0.5 / 4.5) / 5), exp((1.2 + 1 / 5.5) / 5), total=2),
        ],
        updates=([4.0, 1], [4.0, 3], [2.0, 2], [2.0, 2], [1.0, 4]),
        init=(2,),
    ),
)


def _sample_weight(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("sample_weight", name, arguments, expected)


SAMPLE_WEIGHTS = (
    _sample_weight(
        "exponential_advantage",
        [1, exp(0.5), exp(-1), 4],
        advantages=[0.0, 1, -2, 3],
        temperature=2.0,
        max_weight=4.0,
    ),  # e^1.5 > 4
    # FamO2O: a temperature a state, cap 100; nothing overflows on the way.
    _sample_weight(
        "exponential_advantage",
        [100, e, 100],
        advantages=[1.0, 1, 1e4],
        temperature=[1 / 8, 1.0, 1 / 14],
        max_weight=100.0,
    ),
    _sample_weight("kl_tilt", shares(exp(2), 1, exp(4), total=3), rewards=[1.0, 0, 2], beta=0.5),
    _sample_weight("kl_tilt", [1, 1, 1, 1], rewards=[1.0, 0, 2, 7], beta=0.5, group_size=1),
    _sample_weight("kl_tilt", [2, 0, 0, 1], rewards=[1000.0, 0, nan, 0], beta=0.5, group_size=2),
    # e^0 and e^log 3 of a sum of 4, times 2.
    _sample_weight("kl_dro", [0.5, 1.5], losses=[0.0, LN3], temperature=1.0),
    # Losses 1, 2, 5: h = -1, -1/2, 1.
    *(
        _sample_weight(
            "dynamic_loss_reweighting",
            shares(*(exp(x / 0.4) for x in f), total=3),
            losses=[1.0, 2, 5],
            temperature=0.4,
            strategy=strategy,
        )
        for strategy, f in (
            ("linupper", (0, 0.5, 1)),
            ("quadratic", (0, 0.75, 0)),
            ("upper", (0, 0.25, 1)),
            ("extremes", (1, 0.5, 1)),
        )
    ),
    # delta 2: h = -2, -1, 2; linupper min(h + 2, 2) = 0, 1, 2.
    _sample_weight(
        "dynamic_loss_reweighting",
        shares(1, e, e**2, total=3),
        losses=[1.0, 2, 5],
        temperature=1.0,
        delta=2.0,
    ),
    # No change: 1/2. Worse by log(3)/20: sigmoid(log 3) = 3/4. Improved much: the
    # floor. With alpha 12 the ceiling.
    _sample_weight(
        "glow", [0.5, 0.75, 0.5], losses=[2.0, 2 + LN3 / 20, 1], previous_losses=[2.0, 2, 2]
    ),
    _sample_weight(
        "glow", [5, 5, 0.5], losses=[2.0, 2 + LN3 / 20, 1], previous_losses=[2.0, 2, 2], alpha=12.0
    ),
    # Without history the batch's mean 2 + log(3)/20 stands for it: worse than that by
    # log(3)/20. In the first epoch every weight is 1.
    _sample_weight("glow", [0.5, 0.75], losses=[2.0, 2 + LN3 / 10], previous_losses=[2.0, nan]),
    _sample_weight("glow", [1, 1], losses=[2.0, 7], previous_losses=None),
    # Ties: the first.
    _sample_weight("raft", [0, 1, 0, 1, 0, 0], rewards=[1.0, 3, 3, 2, 0, 0], group_size=3),
    _sample_weight("raft", [0, 1, 1, 1, 1, 0], rewards=[1.0, 3, 3, 2, 0, 0], keep=2, group_size=3),
    _sample_weight("raft", [0, 1, 0, 0], rewards=[nan, -1, nan, nan], group_size=2),
    # The widest pair, and the widest three: variances of (-2, 0, 3) and (-2, .5, 3) are
    # 6.33 and 6.25, of (-2, -1, 3) 7.
    _sample_weight("d3s", [1, 0, 0, 1], advantages=[-2.0, 0, 0.5, 3], num_samples=2),
    _sample_weight("d3s", [1, 1, 0, 0, 1], advantages=[-2.0, -1, 0, 0.5, 3], num_samples=3),
    # softmax 1/4, 3/4 over shares of 3/4 and 1/4 of the samples; softplus log 2, log 4:
    # 1/3, 2/3.
    _sample_weight(
        "source_weights",
        [1 / 3, 3, 1 / 3, 1 / 3],
        source_logits=[0.0, LN3],
        source_ids=[0, 1, 0, 0],
    ),
    # ((1 - l)^γ + η)/(1 + η).
    _sample_weight("focal", [1, 0.5, (1 + 1 / 32) / 2], likelihoods=[0.0, 1, 0.5]),
    _sample_weight("focal", [9 / 16, 0.25], likelihoods=[0.25, 0.5], eta=0.0, gamma=2.0),
    # Returns 1, 2, 5 on a line: 0, 1/4, 1, over the temperature of .1. Equal ones, and
    # a missing one.
    _sample_weight("trajectory_rw", shares(1, exp(2.5), exp(10), total=3), returns=[1.0, 2, 5]),
    _sample_weight("trajectory_rw", [1, 1], returns=[4.0, 4]),
    _sample_weight(
        "trajectory_rw",
        [x if x else 0 for x in shares(1, 0, exp(2.5), exp(10), total=3)],
        returns=[1.0, nan, 2, 5],
    ),
    _sample_weight(
        "trajectory_aw",
        shares(1, exp(2.5), exp(10), total=3),
        returns=[3.0, 2, 4],
        start_values=[2.0, 0, -1],
    ),
    # Clusters {0, 2, 4} and {1, 3}: the best two, the best one.
    _sample_weight(
        "selective_rehearsal",
        [0, 0.01, 0.01, 0.01, 0.01],
        scores=[1.0, 2, 3, 4, 5],
        keep=2,
        group_ids=[1, 0, 1, 0, 1],
        num_groups=2,
    ),
    _sample_weight(
        "selective_rehearsal",
        [0, 0, 0, 1, 1],
        scores=[1.0, 2, 3, 4, 5],
        keep=1,
        coef=1.0,
        group_ids=[1, 0, 1, 0, 1],
        num_groups=2,
    ),
)


def _schedule(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("schedule", name, arguments, expected)


SCHEDULES = (
    # Only advantages >= 0 before the switch, all from it on.
    _schedule(
        "capo",
        [1, 1, 0, 0, 1, 0],
        advantages=[1.0, -2, 0],
        completion_mask=[[1, 1], [1, 1], [1, 0]],
        step=29,
        switch_step=30,
    ),
    _schedule(
        "capo",
        [1, 1, 1, 1, 1, 0],
        advantages=[1.0, -2, 0],
        completion_mask=[[1, 1], [1, 1], [1, 0]],
        step=30,
        switch_step=30,
    ),
    _schedule("d3s", [40, 0.6], progress=0.5, num_samples=(16, 64), token_fraction=(0.2, 1.0)),
    # The tokens of each of the two updates.
    Golden(
        "schedule",
        "lopti",
        {"eta": 0.3},
        [[1, 0, 1], [0, 1, 0]],
        tokens={"old_logp": [log(0.25), -LN2, log(0.1)]},
    ),
    # In the buffer: 2, 4, 6 - 5, 1, 5 - 5, 7 - 5.
    Golden(
        "schedule", "relift", {"buffer_size": 5}, [0, 0, 1, 0, 1, 1], updates=(2, 2, 2, 0, 4, 7)
    ),
    # α·(1 - 1/K) + 1/K.
    _schedule("tsa", [0.25], progress=0.0, num_classes=4),
    _schedule("tsa", [1.0], progress=1.0, num_classes=4),
    _schedule("tsa", [exp(-5) * 0.75 + 0.25], progress=0.0, num_classes=4, curve="exp"),
    _schedule("tsa", [(1 - exp(-5)) * 0.75 + 0.25], progress=1.0, num_classes=4, curve="log"),
    _schedule("tsa", [exp(-2.5) / 2 + 0.5], progress=0.5, num_classes=2, curve="exp"),
)


def _token_weight(
    name: str, expected: Any, tokens: dict[str, Any] | None = None, **arguments: Any
) -> Golden:
    return Golden("token_weight", name, arguments, expected, tokens=tokens or {})


#: |Omega| = |A|/p_old * p(1-p)|log p + H| with p = p_old = 1/2 and H = 1 + log 2:
#: |A|/2.
STEER = {"logp": -LN2, "old_logp": -LN2, "entropy": 1 + LN2, "adv": [1.0, -2.0, 3.0]}
#: log H = 0..4 with the median as pivot: h = -1, -1/2, 0, 1/2, 1.
SPREAD = {"logp": -LN2, "old_logp": -LN2, "entropy": [1.0, e, e**2, e**3, e**4]}

#: Ratios of the old policy to the sampler of 4, 1/2, and unknown.
SAMPLED = {"old_logp": -2.0, "sampling_logp": [-2 - 2 * LN2, -2 + LN2, nan]}

TOKEN_WEIGHTS = (
    # .3*1/2 + .7, .3*1 + .7.
    _token_weight("advantage_reweighting", [0.85, 1.0], old(0.5, 1.0)),
    # |A|H = 4, 2, 1, 6 and 100 masked: half of four tokens.
    _token_weight(
        "d3s",
        [1.0, 0.0, 0.0, 1.0, 0.0],
        {
            "adv": [1.0, -2.0, 1.0, 3.0, 100.0],
            "entropy": [4.0, 1.0, 1.0, 2.0, 1.0],
            "completion_mask": [1, 1, 1, 1, 0],
        },
        fraction=0.5,
    ),
    # p = 1/2 of the sampler, q = 1/4 and 1/2: KL = log(2)/2 + log(2/3)/2 = .144 and 0,
    # TV 1/4 and 0; means are half of that.
    *(
        _token_weight(
            "divergence_gate",
            expected,
            {"sampling_logp": [-LN2, -LN2], "old_logp": [-2 * LN2, -LN2]},
            threshold=threshold,
            **options,
        )
        for threshold, expected, options in (
            (0.15, [1.0, 1.0], {"level": "token"}),
            (0.14, [0.0, 1.0], {"level": "token"}),
            (0.26, [1.0, 1.0], {"level": "token", "divergence": "tv"}),
            (0.24, [0.0, 1.0], {"level": "token", "divergence": "tv"}),
            (0.073, [1.0, 1.0], {}),
            (0.07, [0.0, 0.0], {}),
            (0.13, [1.0, 1.0], {"divergence": "tv"}),
            (0.12, [0.0, 0.0], {"divergence": "tv"}),
        )
    ),
    # An unknown log-prob of the sampler means no drift.
    _token_weight(
        "divergence_gate",
        [1.0, 1.0],
        {"sampling_logp": [nan, -LN2], "old_logp": [-2 * LN2, -LN2]},
        threshold=0.001,
    ),
    # r = 2, 1: r/(r + 1), r.
    _token_weight("f_distill", [2 / 3, 0.5], {"logp": -2.0, "ref_logp": [-2 + LN2, -2.0]}),
    _token_weight(
        "f_distill",
        [2.0, 1.0],
        {"logp": -2.0, "ref_logp": [-2 + LN2, -2.0]},
        divergence="forward_kl",
    ),
    # Ratios 4 and 1/2, and one without a sampler's log-prob: cut at 2, dropped over 2;
    # the sequence's 2 under 3, over 1.5; its geometric mean 2^(1/3).
    _token_weight("tis", [2.0, 0.5, 1.0], SAMPLED),
    _token_weight("icepop", [0.0, 0.5, 1.0], SAMPLED),
    _token_weight("sequence_tis", [2.0] * 3, SAMPLED),
    _token_weight("sequence_tis", [1.5] * 3, SAMPLED, ratio_max=1.5),
    _token_weight("mis", [2.0] * 3, SAMPLED),
    _token_weight("mis", [0.0] * 3, SAMPLED, ratio_max=1.5),
    _token_weight("geometric_mask", [1.0] * 3, SAMPLED, ratio_min=0.9, ratio_max=1.26),
    _token_weight("geometric_mask", [0.0] * 3, SAMPLED, ratio_min=0.9, ratio_max=1.25),
    _token_weight("geometric_mask", [0.0] * 3, SAMPLED, ratio_min=1.26, ratio_max=2.0),
    # Correct: 1 + .1·2·(1/4, 3/4). Wrong, by 1/H = 1, 1/3: -1 - .1·2·(3/4, 1/4). Each
    # pair is symmetric about its mean.
    *(
        _token_weight(
            "gtpo",
            expected,
            entropies=[[1.0], [3], [1], [3]],
            correct=[True, True, False, False],
            completion_mask=[[1]] * 4,
            normalize=normalize,
            eps=0.0,
            group_size=4,
        )
        for normalize, expected in ((False, [1.05, 1.15, -1.15, -1.05]), (True, [-1, 1, -1, 1]))
    ),
    # Ratio 1 is neutral: 1 + h for h <= 0. Ratio 2 is not: 1 + h for h > 0. Ratio 1.25:
    # over 1 + .28/2 and 1 + .42/2, inside of 1 + .56/2.
    _token_weight("hapo_redistribution", [0.0, 0.5, 1.0, 1.0, 1.0], SPREAD, pivot=0.5),
    _token_weight(
        "hapo_redistribution",
        [1.0, 1.0, 1.0, 1.5, 2.0],
        {**SPREAD, "old_logp": -2 * LN2},
        pivot=0.5,
    ),
    _token_weight(
        "hapo_redistribution",
        [1.0, 1.0, 1.0, 1.5, 1.0],
        {**SPREAD, "old_logp": -LN2 - log(1.25)},
        pivot=0.5,
    ),
    _token_weight("spo_probability_mask", [1.0, 0.0], old(0.5, 0.95)),
    # Positives: ceil(.34*3) = 2 of surprisals 1, 3, 2; negatives: ceil(.34*2) = 1 of 1,
    # 5. A gate of 0 lets none through.
    _token_weight(
        "stare",
        [1.0, 1.1, 1.1, 1.0, 0.9],
        {"logp": [-1.0, -3.0, -2.0, -1.0, -5.0], "adv": [1.0, 1.0, 1.0, -1.0, -1.0]},
        fraction=0.34,
        damp=0.9,
    ),
    _token_weight("stare", [1.0, 1.0], {"logp": [-1.0, -3.0], "adv": 1.0}, gate=0.0),
    # |Omega| = .5, 1, 1.5; all equal: half way.
    _token_weight("steer", [1.2, 1.0, 0.8], STEER, mapping="linear"),
    _token_weight("steer", [1.0, 1.0, 1.0], {**STEER, "adv": [1.0, -1.0, 1.0]}, mapping="linear"),
    # .8^(1/3), .8^(2/3), .8; with one more p all Omegas halve, which the maximum
    # cancels.
    _token_weight("steer", [0.8 ** (1 / 3), 0.8 ** (2 / 3), 0.8], STEER),
    _token_weight("steer", [0.8 ** (1 / 3), 0.8 ** (2 / 3), 0.8], STEER, omega="exact"),
    # |Omega| = .005 under the floor .02: .8^(1/4). Stored entropies: H = log 2 gives
    # Omega = 0.
    _token_weight("steer", [0.8**0.25], {**STEER, "adv": [0.01]}),
    _token_weight("steer", [1.0, 0.8], {**STEER, "adv": [1.0, 1.0]}, entropies=[[LN2, 1 + LN2]]),
    # p = 1/2, p_old = 1/4: Omega = |A|/(1/4)*(1/4) = 1, 3, but A > 0 is clipped at
    # ratio 2: Omega = 0, and the largest is that of A < 0.
    _token_weight(
        "steer", [1.0, 0.8], {**STEER, "old_logp": -2 * LN2, "adv": [1.0, -3.0]}, epsilon_high=0.28
    ),
    _token_weight("tsa", [1.0, 0.0, 1.0], {"logp": [-LN2, -0.1, -3.0]}, threshold=0.5),
    # Agreement, then (1/4, 3/4) against (3/4, 1/4): d = +-log(3)/2 off the mean
    # log-prob, D = sqrt(3) + 1/sqrt(3) - 2. The scaling adds 1e-8.
    _token_weight(
        "tw_grpo",
        [1, 1 + 0.7 / (1 + 1e-8 / (4 / sqrt(3) - 2))] * 2,
        logits=[[[0.0, 0], [0, LN3]], [[0, 0], [LN3, 0]]],
        completion_mask=[[1, 1], [1, 1]],
        group_size=2,
    ),
)


def _divergence(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("divergence", name, arguments, expected)


#: Logits of p = (1/4, 3/4) and q = (1/2, 1/2).
P, Q = [[[0.0, LN3]]], [[[0.0, 0.0]]]
#: -Σ q log p.
CROSS = LN2 + log(4 / 3) / 2

DIVERGENCES = (
    # Half of that, and of -Σ p log q = log 2.
    _divergence("symmetric_cross_entropy", [[(CROSS + LN2) / 2]], logits=P, teacher_logits=Q),
    # KL(q‖p) where the teacher's 1/2 is above 0.4, and 0 where it is not above 0.6.
    _divergence(
        "confidence_masked_kl",
        [[CROSS - LN2]],
        logits=P,
        teacher_logits=Q,
        threshold=0.4,
        sharpening_temperature=1.0,
    ),
    _divergence(
        "confidence_masked_kl",
        [[0.0]],
        logits=P,
        teacher_logits=Q,
        threshold=0.6,
        sharpening_temperature=1.0,
    ),
    # The teacher's 3/4 on the label comes first, of two equal students' logits: 3/4·log
    # 2; with label 0 it is 1/4·log 2. The last is free.
    _divergence("pld", [[0.75 * LN2]], logits=Q, teacher_logits=P, completion_ids=[[1]]),
    _divergence("pld", [[0.25 * LN2]], logits=Q, teacher_logits=P, completion_ids=[[0]]),
    # 4·log cosh(log(3)/4), and cosh(log 1) = 1 adds nothing.
    _divergence("dhkd", [[4 * log((3**0.25 + 3**-0.25) / 2)]], logits=P, teacher_logits=Q),
    # 2·log((1 + e^(1/2))/2) of equal logits; at λ = 1 without a margin cross-entropy
    # less log 2: log 4 - log 2.
    _divergence(
        "ldr",
        [[2 * log((1 + sqrt(e)) / 2)]],
        logits=Q,
        completion_ids=[[0]],
        lambda_=2.0,
        margin=1.0,
    ),
    _divergence("ldr", [[LN2]], logits=P, completion_ids=[[0]], margin=0.0),
    # Entropy log 2 of two columns: uniform, so λ stays; entropy 0: 3 - 3/2.
    _divergence("aldr", [3.0, 1.5], entropies=[LN2, 0.0], vocab_size=2, lambda0=3.0, alpha=2.0),
    # s = 1, 2, 1/2: log(3.5/2), log(3.5·2).
    _divergence(
        "stablemax",
        [[log(1.75), log(7)]],
        logits=[[[0.0, 1, -1], [0, 1, -1]]],
        completion_ids=[[1, 2]],
    ),
)

GOLDEN = (
    ADVANTAGES
    + REWARDS
    + OBJECTIVES
    + SAMPLE_WEIGHTS
    + SCHEDULES
    + TOKEN_WEIGHTS
    + PAIRS
    + DIVERGENCES
    + TRAINERS
    + golden_ops.ROWS
)
