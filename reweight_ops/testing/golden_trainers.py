"""Golden rows of what trainers have: weights along a sequence and over a call,
advantages of the best of k, controllers.
"""

from __future__ import annotations

from math import inf, log, nan, sqrt
from typing import Any

from .golden_row import LN2, LN3, Golden, sigmoid


def _advantage(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("advantage", name, arguments, expected)


def _weight(name: str, expected: Any, tokens: dict[str, Any], **arguments: Any) -> Golden:
    return Golden("token_weight", name, arguments, expected, tokens=tokens)


def moved(*log_ratios: float) -> dict[str, Any]:
    return {"logp": -2.0, "old_logp": [-2 - x for x in log_ratios], "adv": 1.0}


#: The probability at odds of sqrt(3).
HIGH = sqrt(3) / (1 + sqrt(3))
#: A token's uncertainty 1 - 2·p + Σp² is 1/2 for the one, and 0 for the other.
HALF, SURE = {"logp": -LN2, "square": -LN2}, {"logp": 0.0, "square": 0.0}


def _otb(
    name: str,
    expected: Any,
    rewards: Any,
    mask: Any,
    first: dict[str, float],
    second: dict[str, float],
    **more: Any,
) -> Golden:
    columns = len(mask[0])
    given = {
        key: [[x[value]] * columns for x in (first, second)]
        for key, value in (("old_per_token_logps", "logp"), ("log_sum_p_sq", "square"))
    }
    return _advantage(
        name,
        expected,
        rewards=rewards,
        completion_mask=mask,
        epsilon=0.0,
        group_size=2,
        **given,
        **more,
    )


TRAINERS = (
    # The best completion gets its lead. A tie has no lead. The last row divides by the
    # standard deviation sqrt(1/2).
    _advantage("grpo_passk", [0, 1, 0], rewards=[1.0, 3, 2], scale_rewards=False, group_size=3),
    _advantage("grpo_passk", [0, 0, 0], rewards=[2.0, 2, 0], scale_rewards=False, group_size=3),
    _advantage("grpo_passk", [sqrt(2), 0], rewards=[1.0, 0], epsilon=0.0, group_size=2),
    # At n = 4, c = 1, k = 2, ρ = 1 - 3/6 and σ = 1/2. A right answer gets 1, and a
    # wrong one gets (1/2 - 2/3)/(1/2). At k = 1 they get 1 and -1. Where all are wrong,
    # the advantage is -1·0.
    _advantage(
        "passk_training",
        [1, -1 / 3, -1 / 3, -1 / 3],
        correct=[1.0, 0, 0, 0],
        k=2,
        epsilon=0.0,
        group_size=4,
    ),
    _advantage("passk_training", [1, -1], correct=[1.0, 0], k=1, epsilon=0.0, group_size=2),
    _advantage("passk_training", [0, 0, 0, 0], correct=[0.0, 0, 1, 1], k=2, group_size=2),
    # Two of three are right. C(1, 2) = 0, so ρ = 1 and nothing is left to learn.
    _advantage("passk_training", [0, 0, 0], correct=[1.0, 1, 0], k=2, epsilon=1.0, group_size=3),
    _advantage("maxrl", [3, -1, -1, -1], rewards=[1.0, 0, 0, 0], epsilon=0.0, group_size=4),
    _advantage("maxrl", [0.5, 2], rewards=[0.5, 2.0], singleton="reward", group_size=1),
    # The batch has the mean 3/4 and the unbiased variance 1/4.
    _advantage("lite_ppo", [1, -1, 0, 0], rewards=[1.0, 0, 1, 1], epsilon=0.0, group_size=2),
    # Three of four have a reward, so the factor is 4/3.
    _advantage("gpg", [2 / 3, -2 / 3, 0, 0], rewards=[1.0, 0, 1, 1], group_size=2),
    _advantage("gpg", [1, 0], rewards=[2.0, 0.0], singleton="reward", f_norm=4.0, group_size=1),
    # V* is log((1 + 3)/2). Where one reward is known, V* is that reward.
    _advantage(
        "a_star_po",
        [1 - LN2, -LN2, -0.5],
        rewards=[1.0, 0, 0],
        reference_rewards=[[0.0, LN3], [0.0, LN3], [nan, 0.5]],
        beta=1.0,
        group_size=1,
    ),
    # With equal weights the baseline is the mean return. A response that is sure has no
    # weight, so the other's return is the baseline.
    _otb("otb", [0.5, 0.5, -0.5, -0.5], [1.0, 0], [[1, 1], [1, 1]], HALF, HALF),
    _otb("otb", [0, 0, -1, -1], [1.0, 0], [[1, 1], [1, 1]], HALF, SURE),
    # Past the end of the second response the first is alone.
    _otb("otb", [0.5, 1, -0.5, 0], [1.0, 0], [[1, 1], [1, 0]], HALF, HALF),
    _otb("otb", [0.5, 0, -0.5, 0], [1.0, 0], [[1, 1], [1, 0]], HALF, HALF, zero_tail=False),
    # A factor of 2 in the first response's ratio counts as 4 in its weight, so the
    # baseline is 4/5.
    _otb(
        "otb",
        [0.2, 0.2, -0.8, -0.8],
        [1.0, 0],
        [[1, 1], [1, 1]],
        HALF,
        HALF,
        importance_sampling_ratio=[[2.0, 2], [1, 1]],
    ),
    # The second tokens are in columns 3 and 2. They share no baseline by column, and
    # they share one by token.
    _otb("tir_otb", [0.5, 0, 0.5, -0.5, -0.5, 0], [1.0, 0], [[1, 0, 1], [1, 1, 0]], HALF, HALF),
    # Each token later counts half as much. F is log 2·(1 + 0 + 2/4), log 2·(0 + 2/2),
    # and log 2·2. The second row is cut at 1.2.
    _weight("fipo", [2**1.5, 2.0, 4.0], moved(LN2, 0.0, 2 * LN2), half_life=1.0, weight_max=inf),
    _weight("fipo", [1.2] * 3, moved(LN2, 0.0, 2 * LN2), half_life=1.0),
    _weight("fipo", [1.0, 0.5], moved(LN2, -2 * LN2), half_life=1.0, weight_min=0.5),
    # The first row leaves out the third token, whose ratio is 4. In the second row A <
    # 0, and a ratio over 3 is weighted by at most 1.
    _weight(
        "fipo",
        [2.0, 1.0, 1.0],
        moved(LN2, 0.0, 2 * LN2),
        half_life=1.0,
        weight_max=inf,
        participation_max=3.0,
    ),
    _weight(
        "fipo",
        [2**1.5, 2.0, 1.0],
        {**moved(LN2, 0.0, 2 * LN2), "adv": -1.0},
        half_life=1.0,
        weight_max=inf,
        safety_ratio=3.0,
    ),
    # The teacher's ratio is 2. It becomes 1.2 or .8 by the sign of A, and half of the
    # change counts. With a wide bound it becomes 2 or 1/2.
    _weight(
        "rlsd", [1.1, 0.9, 1.0], {"old_logp": -2.0, "ref_logp": -2 + LN2, "adv": [3.0, -3.0, 0.0]}
    ),
    _weight(
        "rlsd",
        [1.5, 0.75],
        {"old_logp": -2.0, "ref_logp": -2 + LN2, "adv": [3.0, -3.0]},
        epsilon=5.0,
    ),
    # At p = 1/2, σ(log 3) = 3/4 gives 2·(3/4 - 1/4). At p = 1/4 the sigmoid is
    # σ(log(3)/2).
    *(
        _weight(
            "tr_grpo",
            expected,
            {"logp": [-LN2, -2 * LN2]},
            alpha=2.0,
            tau=0.5 / LN3,
            mu=0.25,
            **bounds,
        )
        for expected, bounds in (
            ([1.0, 2 * (sigmoid(LN3 / 2) - 0.25)], {"lower": 0.0, "upper": inf}),
            ([0.9, 0.8], {"lower": 0.8, "upper": 0.9}),
        )
    ),
    # Two tokens are unlikely and rewarded. Their median entropy is 3/2.
    _weight(
        "stapo",
        [0.0, 1.0, 1.0, 1.0, 1.0],
        {
            "logp": [-6.0, -6.0, -0.1, -6.0, -0.1],
            "entropy": [1.0, 2.0, 0.1, 0.2, 0.3],
            "adv": [1.0, 1.0, 1.0, -1.0, 1.0],
        },
        probability=0.01,
        entropy_quantile=0.5,
    ),
    # No token is below the probability in the first row. In the second row one token
    # is, and its entropy is the quantile.
    _weight("stapo", [1.0, 1.0], {"logp": [-6.0, -1.0], "entropy": [0.1, 0.0], "adv": 1.0}),
    _weight("stapo", [1.0, 1.0], {"logp": [-7.0, -1.0], "entropy": [0.1, 0.0], "adv": 1.0}),
    # The squares are .01, .09, and 0 for an unknown log-prob. From the smallest on
    # their means are 0, .005, .033. One token is left in any case.
    *(
        _weight(
            "m2_mask",
            expected,
            {"old_logp": -2.0, "sampling_logp": [-2.1, -1.7, nan]},
            threshold=threshold,
        )
        for threshold, expected in (
            (0.04, [1.0, 1.0, 1.0]),
            (0.03, [1.0, 0.0, 1.0]),
            (0.004, [0.0, 0.0, 1.0]),
        )
    ),
    _weight(
        "m2_mask", [1.0, 0.0], {"old_logp": -2.0, "sampling_logp": [-2.1, -1.7]}, threshold=1e-9
    ),
    # r = 2, and p goes from 1/4 to 1/2. Then k3 = 1 - log 2 = .307, k2 = .24, and TV is
    # 1/4.
    *(
        _weight(
            "trm",
            [float(kept)] * 2,
            {"logp": -LN2, "old_logp": [-2 * LN2, -LN2]},
            threshold=threshold,
            divergence=divergence,
        )
        for divergence, threshold, kept in (
            ("k3", 0.3, 0),
            ("k3", 0.31, 1),
            ("k2", 0.24, 0),
            ("k2", 0.25, 1),
            ("tv", 0.24, 0),
            ("tv", 0.26, 1),
        )
    ),
    _advantage("psr_nsr", [0.1, -1, 0], correct=[1.0, 0, nan]),
    _advantage("psr_nsr", [1, 0], correct=[1.0, 0], positive_weight=1.0, negative_weight=0.0),
    # The answers have two of the three right choices, one right and one wrong, all, and
    # none.
    Golden(
        "reward",
        "soft_multi_choice",
        {
            "answers": [[1.0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]],
            "correct": [[1.0, 1, 1, 0]] * 4,
        },
        [2 / 3, 0, 1, 0],
    ),
    # One group is mixed, and one is all wrong. The next row has a completion alone in
    # its group. The last row has a band of the mean.
    Golden(
        "sample_weight",
        "dynamic_sampling",
        {"rewards": [1.0, 0, 0, 0], "group_size": 2},
        [1, 1, 0, 0],
    ),
    Golden("sample_weight", "dynamic_sampling", {"rewards": [1.0, 0], "group_size": 1}, [1, 1]),
    Golden(
        "sample_weight",
        "dynamic_sampling",
        {"rewards": [1.0, 0, 0, 0, 1, 0, 1, 1], "high": 0.5, "group_size": 4},
        [1, 1, 1, 1, 0, 0, 0, 0],
    ),
    # At β = 1/2 one sample counts 1 and two samples count 2/3. Their mean is 5/6.
    Golden(
        "sample_weight",
        "class_balanced",
        {"labels": [1, 0], "class_counts": [1.0, 2], "beta": 0.5},
        [0.8, 1.2],
    ),
    Golden(
        "sample_weight",
        "class_balanced",
        {"labels": [1, 0], "class_counts": [1.0, 2], "beta": 0.0},
        [1, 1],
    ),
    # The sources have 1 and 9 samples. At τ = 2 their shares are 1/4 and 3/4. At
    # infinity each share is 1/2.
    Golden(
        "sample_weight",
        "upweight",
        {"source_ids": [0, 1], "source_counts": [1.0, 9], "temperature": 2.0},
        [10 / 4, 10 / 12],
    ),
    Golden(
        "sample_weight",
        "upweight",
        {"source_ids": [0, 1], "source_counts": [1.0, 9], "temperature": inf},
        [5, 5 / 9],
    ),
    Golden("schedule", "drw", {"epoch": 159}, [0]),
    Golden("schedule", "drw", {"epoch": 160}, [0.9999]),
    # The run has 150 steps. Step 5 is a fifth of the warm-up to 3/5. Step 40 is a
    # quarter of the first cycle of 40 steps, and step 50 is half of it. Step 70 is the
    # top of the second cycle.
    Golden("schedule", "canon", {"step": 5}, [1 - 0.6 / 5]),
    Golden("schedule", "canon", {"step": 40}, [1 - 0.3 * (1 + sqrt(0.5))]),
    Golden("schedule", "canon", {"step": 50, "order": "inter_first"}, [0.7]),
    Golden("schedule", "canon", {"step": 70, "order": "inter_first"}, [1]),
    Golden("schedule", "dynamic_loss_reweighting", {"step": 999, "temperature": 0.4}, [inf]),
    Golden("schedule", "dynamic_loss_reweighting", {"step": 1000, "temperature": 0.4}, [0.4]),
    # Of the entropies 1, 2, 4, 16 the third is the quantile 2/3. The given entropies
    # are half way up, at it, half way down, and above the highest.
    Golden(
        "schedule",
        "hapo_temperature",
        {
            "entropies": [8.0, 4.0, 2.0, 64.0],
            "rollout_entropies": [[4.0, 16, 9], [1, 2, 9]],
            "completion_mask": [[1, 1, 0], [1, 1, 0]],
            "tau": 0.2,
            "pivot": 2 / 3,
            "temperature": 0.5,
        },
        [0.55, 0.5, 0.45, 0.6],
    ),
    # The mean gaps are 2 and -8, and the running means are 1 and -3.5. β is 1 + 1/2·1,
    # and then 1 - 1/2·4.5 < 0.
    Golden(
        "schedule",
        "beta_dpo",
        {"beta": 1.0, "a": 0.5, "momentum": 0.5},
        [1.5, 0.001],
        updates=([1.0, 3], [-8.0]),
    ),
    # Equal logits give log 2. Against p = (1/4, 3/4) they have KL = 1/4·log(1/2) +
    # 3/4·log(3/2) at T = 1.
    Golden(
        "divergence",
        "kd",
        {
            "logits": [[[0.0, 0]]],
            "teacher_logits": [[[0.0, LN3]]],
            "completion_ids": [[0]],
            "alpha": 0.25,
            "kd_temperature": 1.0,
        },
        [[0.25 * LN2 + 0.75 * (0.75 * LN3 - LN2)]],
    ),
    # At T = 2 the teacher's odds are sqrt(3).
    Golden(
        "divergence",
        "kd",
        {
            "logits": [[[0.0, 0]]],
            "teacher_logits": [[[0.0, LN3]]],
            "completion_ids": [[0]],
            "alpha": 0.0,
        },
        [[4 * (LN2 + HIGH * log(HIGH) + (1 - HIGH) * log(1 - HIGH))]],
    ),
    # The terms are -log(1/4), and half of KL((1/2, 1/2) from (1/4, 3/4)) = log(2) -
    # log(3)/2.
    Golden(
        "divergence",
        "superhf",
        {
            "logits": [[[0.0, LN3]]],
            "reference_logits": [[[0.0, 0]]],
            "completion_ids": [[0]],
            "beta": 0.5,
        },
        [[2 * LN2 + 0.5 * (LN2 - LN3 / 2)]],
    ),
    # Below the target .2 the coefficient rises by .001 and is in force. Two more steps
    # leave it at .002. Above the target it falls and is not in force.
    Golden(
        "schedule",
        "adaptive_entropy",
        {"target_entropy": 0.2, "step": 0.001, "coef_max": 0.002},
        [0.001, 0.002, 0.002, 0.0, 0.002],
        updates=(0.1, 0.1, 0.1, 0.3, 0.1),
    ),
)
