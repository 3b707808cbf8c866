"""Golden rows: calls that are small enough to work out by hand. Every entry that is not
compared with the fp64 reference has some. ``reweight-ops check`` runs them.
"""

from __future__ import annotations

from math import e, exp, log, nan, sqrt, tanh
from typing import Any

from . import golden_ops
from .golden_advantages import ADVANTAGES, REWARDS, shares
from .golden_pairs import PAIRS
from .golden_row import LN2, LN3, Golden, old, sigmoid
from .golden_trainers import TRAINERS

#: The kinds that have golden rows. Losses that have kernels are compared with the fp64
#: reference, and so are their gradients. Losses of pairs have golden rows too.
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


OBJECTIVES = (
    # sigmoid(0) has slope 1/4, the violations are -+.4, and the rate is .1, so u =
    # +-.01.
    Golden(
        "objective",
        "constrained_rlhf",
        {"thresholds": (0.5, 0.5)},
        [sigmoid(0.01), sigmoid(-0.01)],
        updates=([0.1, 0.9],),
    ),
    # The second point is dominated: it gains nothing and is not kept. The third adds
    # .2·.6.
    Golden(
        "objective",
        "hypervolume_reward_weighting",
        {"reference": (0.0, 0.0)},
        [0.5 + 1.5 * tanh(0.2), 0.5, 0.5 + 1.5 * tanh(0.12)],
        updates=((0.5, 0.4), (0.4, 0.3), (0.2, 1.0)),
    ),
    # The steps are of .1/.2. They give e^(4/2), and then e^(1/2).
    Golden(
        "objective",
        "gradient_reward_weighting",
        {"learning_rate": 0.1, "regularization": 0.2},
        [shares(1, e**2, 1), shares(e**0.5, e**2, 1)],
        updates=([0.0, 4, 0], [1.0, 0, 0]),
        init=(3,),
    ),
    # The windows (4, 4), (2, 2) have c = 1/2 and i = 0, and (1, 3), (2, 2) have c = 1
    # and i = 0. Then (4, 2), (2, 1) have c = 1/2 and i = .5/4.5, and (3, 2), (2, 4)
    # have c = 6/5 and i = 1/5.5.
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
    # FamO2O has one temperature for each state, and the cap 100. Nothing overflows on
    # the way.
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
    # The weights are e^0 and e^log 3 of a sum of 4, times 2.
    _sample_weight("kl_dro", [0.5, 1.5], losses=[0.0, LN3], temperature=1.0),
    # The losses 1, 2, 5 have h = -1, -1/2, 1.
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
    # With delta 2, h = -2, -1, 2. linupper is min(h + 2, 2) = 0, 1, 2.
    _sample_weight(
        "dynamic_loss_reweighting",
        shares(1, e, e**2, total=3),
        losses=[1.0, 2, 5],
        temperature=1.0,
        delta=2.0,
    ),
    # A loss without a change gets 1/2. One that is worse by log(3)/20 gets sigmoid(log
    # 3) = 3/4. One that improved much gets the floor. With alpha 12 the first two get
    # the ceiling.
    _sample_weight(
        "glow", [0.5, 0.75, 0.5], losses=[2.0, 2 + LN3 / 20, 1], previous_losses=[2.0, 2, 2]
    ),
    _sample_weight(
        "glow", [5, 5, 0.5], losses=[2.0, 2 + LN3 / 20, 1], previous_losses=[2.0, 2, 2], alpha=12.0
    ),
    # Without history the batch's mean 2 + log(3)/20 stands for it. The loss is worse
    # than that by log(3)/20. In the first epoch every weight is 1.
    _sample_weight("glow", [0.5, 0.75], losses=[2.0, 2 + LN3 / 10], previous_losses=[2.0, nan]),
    _sample_weight("glow", [1, 1], losses=[2.0, 7], previous_losses=None),
    # Of ties the first is kept.
    _sample_weight("raft", [0, 1, 0, 1, 0, 0], rewards=[1.0, 3, 3, 2, 0, 0], group_size=3),
    _sample_weight("raft", [0, 1, 1, 1, 1, 0], rewards=[1.0, 3, 3, 2, 0, 0], keep=2, group_size=3),
    _sample_weight("raft", [0, 1, 0, 0], rewards=[nan, -1, nan, nan], group_size=2),
    # The widest pair is kept, and then the widest three. The variances of (-2, 0, 3)
    # and (-2, .5, 3) are 6.33 and 6.25, and that of (-2, -1, 3) is 7.
    _sample_weight("d3s", [1, 0, 0, 1], advantages=[-2.0, 0, 0.5, 3], num_samples=2),
    _sample_weight("d3s", [1, 1, 0, 0, 1], advantages=[-2.0, -1, 0, 0.5, 3], num_samples=3),
    # The softmax is 1/4, 3/4. The sources have shares of 3/4 and 1/4 of the samples.
    _sample_weight(
        "source_weights",
        [1 / 3, 3, 1 / 3, 1 / 3],
        source_logits=[0.0, LN3],
        source_ids=[0, 1, 0, 0],
    ),
    # The weight is ((1 - l)^γ + η)/(1 + η).
    _sample_weight("focal", [1, 0.5, (1 + 1 / 32) / 2], likelihoods=[0.0, 1, 0.5]),
    _sample_weight("focal", [9 / 16, 0.25], likelihoods=[0.25, 0.5], eta=0.0, gamma=2.0),
    # The returns 1, 2, 5 are on a line at 0, 1/4, 1, over the temperature of .1. The
    # next rows have equal returns, and a missing one.
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
    # The clusters are {0, 2, 4} and {1, 3}. The best two of each are kept, and then the
    # best one.
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
    # Before the switch only advantages >= 0 count. From it on all count.
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
    # The buffer has 2, 4, 6 - 5, 1, 5 - 5, 7 - 5.
    Golden(
        "schedule", "relift", {"buffer_size": 5}, [0, 0, 1, 0, 1, 1], updates=(2, 2, 2, 0, 4, 7)
    ),
    # The value is α·(1 - 1/K) + 1/K.
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


#: |Omega| = |A|/p_old * p(1-p)|log p + H| is |A|/2, since p = p_old = 1/2 and H = 1 +
#: log 2.
STEER = {"logp": -LN2, "old_logp": -LN2, "entropy": 1 + LN2, "adv": [1.0, -2.0, 3.0]}
#: log H is 0..4, and the pivot is the median: h = -1, -1/2, 0, 1/2, 1.
SPREAD = {"logp": -LN2, "old_logp": -LN2, "entropy": [1.0, e, e**2, e**3, e**4]}

#: The ratios of the old policy to the sampler are 4, 1/2, and unknown.
SAMPLED = {"old_logp": -2.0, "sampling_logp": [-2 - 2 * LN2, -2 + LN2, nan]}

TOKEN_WEIGHTS = (
    # The weights are .3*1/2 + .7 and .3*1 + .7.
    _token_weight("advantage_reweighting", [0.85, 1.0], old(0.5, 1.0)),
    # |A|H is 4, 2, 1, 6, and 100, which is masked. Half of the four tokens are kept.
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
    # p = 1/2 is the sampler's, and q is 1/4 and 1/2. KL = log(2)/2 + log(2/3)/2 = .144
    # and 0, and TV is 1/4 and 0. The means are half of that.
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
    # r is 2 and 1. The weights are r/(r + 1), and then r.
    _token_weight("f_distill", [2 / 3, 0.5], {"logp": -2.0, "ref_logp": [-2 + LN2, -2.0]}),
    _token_weight(
        "f_distill",
        [2.0, 1.0],
        {"logp": -2.0, "ref_logp": [-2 + LN2, -2.0]},
        divergence="forward_kl",
    ),
    # The ratios are 4 and 1/2, and one token has no log-prob of the sampler. Token
    # ratios are cut at 2, or dropped over 2. The sequence's ratio of 2 is under 3 and
    # over 1.5, and its geometric mean is 2^(1/3).
    _token_weight("tis", [2.0, 0.5, 1.0], SAMPLED),
    _token_weight("icepop", [0.0, 0.5, 1.0], SAMPLED),
    _token_weight("sequence_tis", [2.0] * 3, SAMPLED),
    _token_weight("sequence_tis", [1.5] * 3, SAMPLED, ratio_max=1.5),
    _token_weight("mis", [2.0] * 3, SAMPLED),
    _token_weight("mis", [0.0] * 3, SAMPLED, ratio_max=1.5),
    _token_weight("geometric_mask", [1.0] * 3, SAMPLED, ratio_min=0.9, ratio_max=1.26),
    _token_weight("geometric_mask", [0.0] * 3, SAMPLED, ratio_min=0.9, ratio_max=1.25),
    _token_weight("geometric_mask", [0.0] * 3, SAMPLED, ratio_min=1.26, ratio_max=2.0),
    # Correct responses get 1 + .1·2·(1/4, 3/4). Wrong ones get -1 - .1·2·(3/4, 1/4), by
    # 1/H = 1, 1/3. Each pair is symmetric about its mean.
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
    # Ratio 1 is neutral and gives 1 + h for h <= 0. Ratio 2 is not, and gives 1 + h for
    # h > 0. Ratio 1.25 is over 1 + .28/2 and 1 + .42/2, and inside of 1 + .56/2.
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
    # The positives take ceil(.34*3) = 2 of the surprisals 1, 3, 2. The negatives take
    # ceil(.34*2) = 1 of 1, 5. A gate of 0 lets none through.
    _token_weight(
        "stare",
        [1.0, 1.1, 1.1, 1.0, 0.9],
        {"logp": [-1.0, -3.0, -2.0, -1.0, -5.0], "adv": [1.0, 1.0, 1.0, -1.0, -1.0]},
        fraction=0.34,
        damp=0.9,
    ),
    _token_weight("stare", [1.0, 1.0], {"logp": [-1.0, -3.0], "adv": 1.0}, gate=0.0),
    # |Omega| is .5, 1, 1.5. If all are equal, the weight is half way.
    _token_weight("steer", [1.2, 1.0, 0.8], STEER, mapping="linear"),
    _token_weight("steer", [1.0, 1.0, 1.0], {**STEER, "adv": [1.0, -1.0, 1.0]}, mapping="linear"),
    # The weights are .8^(1/3), .8^(2/3), .8. With one more p all Omegas halve, and the
    # maximum cancels that.
    _token_weight("steer", [0.8 ** (1 / 3), 0.8 ** (2 / 3), 0.8], STEER),
    _token_weight("steer", [0.8 ** (1 / 3), 0.8 ** (2 / 3), 0.8], STEER, omega="exact"),
    # |Omega| = .005 is under the floor .02, which gives .8^(1/4). A stored entropy of H
    # = log 2 gives Omega = 0.
    _token_weight("steer", [0.8**0.25], {**STEER, "adv": [0.01]}),
    _token_weight("steer", [1.0, 0.8], {**STEER, "adv": [1.0, 1.0]}, entropies=[[LN2, 1 + LN2]]),
    # With p = 1/2 and p_old = 1/4, Omega = |A|/(1/4)*(1/4) = 1, 3. But A > 0 is clipped
    # at ratio 2, so its Omega is 0. The largest is that of A < 0.
    _token_weight(
        "steer", [1.0, 0.8], {**STEER, "old_logp": -2 * LN2, "adv": [1.0, -3.0]}, epsilon_high=0.28
    ),
    _token_weight("tsa", [1.0, 0.0, 1.0], {"logp": [-LN2, -0.1, -3.0]}, threshold=0.5),
    # The first token agrees. The second has (1/4, 3/4) against (3/4, 1/4): d =
    # +-log(3)/2 off the mean log-prob, and D = sqrt(3) + 1/sqrt(3) - 2. The scaling
    # adds 1e-8.
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
#: The cross entropy -Σ q log p.
CROSS = LN2 + log(4 / 3) / 2

DIVERGENCES = (
    # The value is half of that and half of -Σ p log q = log 2.
    _divergence("symmetric_cross_entropy", [[(CROSS + LN2) / 2]], logits=P, teacher_logits=Q),
    # The value is KL(q‖p) where the teacher's 1/2 is above 0.4. It is 0 where that is
    # not above 0.6.
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
    # The teacher's 3/4 on the label comes first. The student's two logits are equal, so
    # the value is 3/4·log 2. With label 0 it is 1/4·log 2. The last is free.
    _divergence("pld", [[0.75 * LN2]], logits=Q, teacher_logits=P, completion_ids=[[1]]),
    _divergence("pld", [[0.25 * LN2]], logits=Q, teacher_logits=P, completion_ids=[[0]]),
    # The value is 4·log cosh(log(3)/4). cosh(log 1) = 1 adds nothing.
    _divergence("dhkd", [[4 * log((3**0.25 + 3**-0.25) / 2)]], logits=P, teacher_logits=Q),
    # Equal logits give 2·log((1 + e^(1/2))/2). At λ = 1 without a margin the value is
    # the cross-entropy less log 2, which is log 4 - log 2.
    _divergence(
        "ldr",
        [[2 * log((1 + sqrt(e)) / 2)]],
        logits=Q,
        completion_ids=[[0]],
        lambda_=2.0,
        margin=1.0,
    ),
    _divergence("ldr", [[LN2]], logits=P, completion_ids=[[0]], margin=0.0),
    # Two columns with the entropy log 2 are uniform, so λ stays. The entropy 0 gives 3
    # - 3/2.
    _divergence("aldr", [3.0, 1.5], entropies=[LN2, 0.0], vocab_size=2, lambda0=3.0, alpha=2.0),
    # s is 1, 2, 1/2. The values are log(3.5/2) and log(3.5·2).
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
