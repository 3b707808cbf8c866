"""Literal golden rows. Every rule has a few tokens whose loss and derivative were
worked out by hand, and every weight has a few small batches.

Rows of published weights are in the package's :mod:`.golden_rows`.

``loss`` is the rule's value. ``dlogp`` is its total derivative by the token's log-prob,
through ``log_ratio = logp - old_logp`` and the reference distance alike. ``dentropy``
is its derivative by the entropy. ``clipped`` has the (below, above) flags.

``LN2 = log 2`` makes ratios and probabilities exact: ``old_logp = logp - LN2`` is a
ratio of 2, ``old_logp = logp + LN2`` one of 1/2. A row has ``logp = -LN2`` (p = 1/2)
unless it says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .golden_row import LN2, LN3, old
from .golden_rows import SPREAD

LN_1_1 = 0.09531017980432486  # log 1.1
#: The advantages have mean 1, and the log-probs have mean -3. The data are on-policy.
COVARYING = {
    "adv": [0.0, 1.0, 0.0, 3.0],
    "logp": [-4.0, -3.0, -4.0, -1.0],
    "old_logp": [-4.0, -3.0, -4.0, -1.0],
}

MOVING = {"logp": -2.0, "old_logp": [-2.1, -1.8, -2.4, -1.0], "adv": [1.0, -1.0, 1.0, 1.0]}
DRIFTED = {
    "logp": -math.log(2),
    "old_logp": [math.log(0.25), math.log(0.25), math.log(0.75), math.log(0.75)],
    "adv": [1.0, -1.0, 1.0, -1.0],
}


@dataclass(frozen=True)
class Row:
    rule: str
    leaves: dict[str, float]
    loss: float
    dlogp: float
    dentropy: float = 0.0
    clipped: tuple[bool, bool] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


def ratio(log_ratio: float, adv: float, logp: float = -LN2) -> dict[str, float]:
    return {"logp": logp, "old_logp": logp - log_ratio, "adv": adv}


def distance(d: float, logp: float = -LN2, log_ratio: float = 0.0) -> dict[str, float]:
    return {"logp": logp, "ref_logp": logp + d, "old_logp": logp - log_ratio}


ROWS = (
    # clip has epsilon .2/.2. Inside, the loss is -1.1*2, and the derivative is the same
    # since dr/dlogp = r.
    Row("clip", ratio(LN_1_1, 2.0), -2.2, -2.2, clipped=(False, False)),
    # r = 2, A > 0: -min(2, 1.2) = -1.2, which is flat. r = 2, A < 0: -min(-2, -1.2) =
    # 2, which has slope 2.
    Row("clip", ratio(LN2, 1.0), -1.2, 0.0, clipped=(False, True)),
    Row("clip", ratio(LN2, -1.0), 2.0, 2.0, clipped=(False, False)),
    # r = 1/2, A < 0: -min(-.5, -.8) = .8, which is flat. r = 1/2, A > 0: -min(.5, .8) =
    # -.5.
    Row("clip", ratio(-LN2, -1.0), 0.8, 0.0, clipped=(True, False)),
    Row("clip", ratio(-LN2, 1.0), -0.5, -0.5, clipped=(False, False)),
    # With clip-higher the loss is -1.28*3 = -3.84.
    Row(
        "clip",
        ratio(LN2, 3.0),
        -3.84,
        0.0,
        clipped=(False, True),
        parameters={"epsilon_high": 0.28},
    ),
    # delta = 1.5 caps the unclipped branch for A < 0: -min(-1.5, -1.2) = 1.5, which is
    # flat.
    Row("clip", ratio(LN2, -1.0), 1.5, 0.0, clipped=(False, False), parameters={"delta": 1.5}),
    # dual_clip has c = 3. At r = 2, A = -1 the loss of 2 is below the bound. With c =
    # 1.5 the objective is max(-2, -1.5) = -1.5, so the loss is 1.5, flat and clipped.
    Row("dual_clip", ratio(LN2, -1.0), 2.0, 2.0, clipped=(False, False)),
    Row(
        "dual_clip",
        ratio(LN2, -1.0),
        1.5,
        0.0,
        clipped=(False, True),
        parameters={"clip_ratio_c": 1.5},
    ),
    Row(
        "dual_clip",
        ratio(LN2, 1.0),
        -1.2,
        0.0,
        clipped=(False, True),
        parameters={"clip_ratio_c": 1.5},
    ),
    Row("dual_clip", ratio(-LN2, -1.0), 0.8, 0.0, clipped=(True, False)),
    # cispo holds the weight 2 constant: the loss is -2*1*logp = 2 log 2, and the slope
    # is -2. Capped at 1.5 the loss is 1.5 log 2 and the slope is -1.5: clipped tokens
    # keep it.
    Row("cispo", ratio(LN2, 1.0), 2 * LN2, -2.0, clipped=(False, False)),
    Row(
        "cispo",
        ratio(LN2, 1.0),
        1.5 * LN2,
        -1.5,
        clipped=(False, True),
        parameters={"ratio_max": 1.5},
    ),
    Row(
        "cispo",
        ratio(-LN2, -3.0),
        -0.8 * 3 * LN2,
        2.4,
        clipped=(True, False),
        parameters={"ratio_min": 0.8},
    ),
    # sapo at r = 1 has sigmoid(0) = 1/2. The loss is -(4/tau)/2*A = -2A/tau. The slope
    # is -4 s(1-s) r A = -A whatever tau is.
    Row("sapo", ratio(0.0, 1.0), -2.0, -1.0),
    Row("sapo", ratio(0.0, -1.0), 2 / 1.05, 1.0),
    # r = 2, A = 2, tau = 1: s = sigmoid(1) = .7310585786300049. The loss is -4*s*2, and
    # the slope is -4 s(1-s)*2*2 = -16*.19661193324148185.
    Row("sapo", ratio(LN2, 2.0), -5.848468629040039, -3.1457909318637096),
    # r = 1/2, A = -1, tau = 2: s = sigmoid(-1) = .2689414213699951. The loss is 2*s,
    # and the slope is 4 s(1-s)/2 = 2*.19661193324148185.
    Row(
        "sapo",
        ratio(-LN2, -1.0),
        0.5378828427399902,
        0.3932238664829637,
        parameters={"temperature_neg": 2.0},
    ),
    # reinforce is -A logp.
    Row("reinforce", {"logp": -LN2, "adv": 3.0}, 3 * LN2, -3.0),
    # dppo_tv has p = 1/2. At p_old = 1/4 the drift +.25 is over .2, so A > 0 gives
    # nothing. Inside .3 the weight is r = 2. For A < 0 growth is allowed.
    Row("dppo_tv", ratio(LN2, 1.0), 0.0, 0.0, clipped=(False, True)),
    Row(
        "dppo_tv",
        ratio(LN2, 1.0),
        2 * LN2,
        -2.0,
        clipped=(False, False),
        parameters={"divergence_high": 0.3},
    ),
    Row("dppo_tv", ratio(LN2, -1.0), -2 * LN2, 2.0, clipped=(False, False)),
    # At p_old = 1 the drift is -.5. A < 0 is dropped, and A > 0 is kept with r = 1/2.
    Row("dppo_tv", ratio(-LN2, -1.0), 0.0, 0.0, clipped=(True, False)),
    Row("dppo_tv", ratio(-LN2, 1.0), 0.5 * LN2, -0.5, clipped=(False, False)),
    # ratio_max = 1.5 truncates the weight.
    Row(
        "dppo_tv",
        ratio(LN2, -1.0),
        -1.5 * LN2,
        1.5,
        clipped=(False, False),
        parameters={"ratio_max": 1.5},
    ),
    # dppo_kl has p = 1/2. At p_old = 1/4 the divergence is .25 log .5 + .75 log 1.5 =
    # .13. For A > 0 it is inside .2 and outside .1. For A < 0 growth is allowed.
    Row("dppo_kl", ratio(LN2, 1.0), 2 * LN2, -2.0, clipped=(False, False)),
    Row(
        "dppo_kl",
        ratio(LN2, 1.0),
        0.0,
        0.0,
        clipped=(False, True),
        parameters={"divergence_high": 0.1},
    ),
    Row(
        "dppo_kl",
        ratio(LN2, -1.0),
        -2 * LN2,
        2.0,
        clipped=(False, False),
        parameters={"divergence_low": 0.1},
    ),
    # At p_old = 1 the divergence is log 2, over .2. A < 0 is dropped, and A > 0 is kept
    # with r = 1/2.
    Row("dppo_kl", ratio(-LN2, -1.0), 0.0, 0.0, clipped=(True, False)),
    Row("dppo_kl", ratio(-LN2, 1.0), 0.5 * LN2, -0.5, clipped=(False, False)),
    Row(
        "dppo_kl",
        ratio(LN2, -1.0),
        -1.5 * LN2,
        1.5,
        clipped=(False, False),
        parameters={"ratio_max": 1.5},
    ),
    # ratio_mask takes the ratio as a constant weight inside of (.8, 1.2), and nothing
    # outside.
    Row("ratio_mask", ratio(LN_1_1, 2.0), 2.2 * LN2, -2.2),
    Row("ratio_mask", ratio(LN2, 2.0), 0.0, 0.0),
    Row("ratio_mask", ratio(LN2, 2.0), 4 * LN2, -4.0, parameters={"epsilon_high": 1.5}),
    Row("ratio_mask", ratio(-LN2, -2.0), 0.0, 0.0),
    Row("ratio_mask", ratio(-LN2, -2.0), -LN2, 1.0, parameters={"epsilon_low": 0.6}),
    # dro is 3 log 2 + .25 log² 2, and its slope is -3 + .5 log 2.
    Row("dro", ratio(LN2, 3.0), 3 * LN2 + 0.25 * LN2**2, -3 + 0.5 * LN2, parameters={"beta": 0.5}),
    # kl_cov is -2 + .5 log 2. At r = 1/2 it is -1/2 + .5 log 2, and moving down costs.
    Row("kl_cov", ratio(LN2, 1.0), -2 + 0.5 * LN2, -1.5, parameters={"kl_coef": 0.5}),
    Row("kl_cov", ratio(-LN2, 1.0), -0.5 + 0.5 * LN2, -1.0, parameters={"kl_coef": 0.5}),
    # topr imitates A >= 0 whatever the ratio is. It gives A < 0 the weight min(r, 1).
    Row("topr", ratio(-LN2, 3.0), 3 * LN2, -3.0),
    Row("topr", ratio(-LN2, -3.0), -1.5 * LN2, 1.5),
    Row("topr", ratio(LN2, -3.0), -3 * LN2, 3.0),
    Row("topr", ratio(LN2, -3.0), -4.5 * LN2, 4.5, parameters={"ratio_max": 1.5}),
    # The penalties have d = ref - logp = log 2, so u = 2 and 1 - u = -1.
    Row("k1", distance(LN2), -LN2, 1.0),
    Row("absolute", distance(LN2), LN2, -1.0),
    Row("absolute", distance(-LN2), LN2, 1.0),
    # k2 = d^2/2 = .2402265069591007, and its slope is -d.
    Row("k2", distance(LN2), 0.2402265069591007, -LN2),
    # d = 30 is over the clamp of 20, so the value is 200 and flat.
    Row("k2", distance(30.0, logp=-40.0), 200.0, 0.0),
    # k3 = u - d - 1 = 1 - log 2, and its slope is 1 - u = -1. At d = -log 2 it is 1/2 +
    # log 2 - 1, and its slope is 1/2.
    Row("k3", distance(LN2), 1 - LN2, -1.0),
    Row("k3", distance(-LN2), LN2 - 0.5, 0.5),
    # cap = .25 < 1 - log 2 = .307, so the value is flat.
    Row("k3", distance(LN2), 0.25, 0.0, parameters={"cap": 0.25}),
    # clamp = 1 on d = log 4 gives e - 2 = .7182818284590451, which is flat.
    Row("k3", distance(2 * LN2), 0.7182818284590451, 0.0, parameters={"clamp": 1.0}),
    # k3_corrected with r = 2 is 2(1 - log 2). Its slope is r*k3 + r*(1-u) = 2(1 - log
    # 2) - 2 = -2 log 2.
    Row("k3_corrected", distance(LN2, log_ratio=LN2), 2 * (1 - LN2), -2 * LN2),
    # Straight through has the value of k1 or k3 and the slope of k2, -d.
    Row("k1_straight_through", distance(LN2), -LN2, -LN2),
    Row("absolute_straight_through", distance(LN2), LN2, -LN2),
    Row("k3_straight_through", distance(LN2), 1 - LN2, -LN2),
    Row("k3_straight_through", distance(LN2), 0.25, -LN2, parameters={"cap": 0.25}),
    # At r = 2 these have the values of k1, k2, k3 with the slope -r·d. r is cut at 1.5.
    # Values are cut at 10 (k3's exponent too), and slopes are not.
    Row("k1_unbiased", distance(LN2, log_ratio=LN2), -LN2, -2 * LN2),
    Row(
        "k1_unbiased", distance(LN2, log_ratio=LN2), -LN2, -1.5 * LN2, parameters={"ratio_max": 1.5}
    ),
    Row("k1_unbiased", distance(30.0, logp=-40.0), -10.0, -30.0),
    Row("k2_unbiased", distance(LN2, log_ratio=LN2), 0.2402265069591007, -2 * LN2),
    Row("k3_unbiased", distance(LN2, log_ratio=LN2), 1 - LN2, -2 * LN2),
    Row("k3_unbiased", distance(30.0, logp=-40.0), 10.0, -30.0),
    # σ(log 2) = 2/3 is held constant.
    Row("gated_distillation", distance(LN2), 2 / 3 * LN2, -2 / 3, parameters={"gate_beta": 1.0}),
    # The value is the teacher's log 2 over the old policy's log-prob, whatever the
    # current one is.
    Row(
        "teacher_reinforce", {"logp": -LN2, "old_logp": -3.0, "ref_logp": -3.0 + LN2}, LN2**2, -LN2
    ),
    Row("entropy_bonus", {"logp": -LN2, "entropy": 1.5}, -1.5, 0.0, dentropy=-1.0),
    # unclipped is -r*A, and its slope is the same.
    Row("unclipped", ratio(LN2, 3.0), -6.0, -6.0),
    Row("unclipped", ratio(-LN2, -1.0), 0.5, 0.5),
    Row("nll", {"logp": -LN2}, LN2, -1.0),
    Row("likelihood_ascent", {"logp": -LN2}, -LN2, 1.0),
    # comp_sum at p = 1/2 is log 2 at tau 1, 1 - p at tau 2, 1/p - 1 at tau 0, and 2(1 -
    # sqrt(1/2)) at tau 3/2. The slope is -p^(tau-1).
    Row("comp_sum", {"logp": -LN2}, LN2, -1.0),
    Row("comp_sum", {"logp": -LN2}, 0.5, -0.5, parameters={"tau": 2.0}),
    Row("comp_sum", {"logp": -LN2}, 1.0, -2.0, parameters={"tau": 0.0}),
    Row(
        "comp_sum", {"logp": -LN2}, 0.5857864376269049, -0.7071067811865476, parameters={"tau": 1.5}
    ),
    # The margin log 3 gives log(1 + 1*3) = log 4. The slope is -e^D/(p + (1-p)e^D) =
    # -3/(1/2 + 3/2). At p = 1 the loss is 0 and the slope is -3. Without a margin it is
    # the cross-entropy.
    Row("margin_nll", {"logp": -LN2}, 2 * LN2, -1.5, parameters={"margin": LN3}),
    Row("margin_nll", {"logp": 0.0}, 0.0, -3.0, parameters={"margin": LN3}),
    Row("margin_nll", {"logp": -LN2}, LN2, -1.0, parameters={"margin": 0.0}),
    # npo is 2/beta log(1 + e^(beta x)), and its slope is 2 sigmoid(beta x). x is log 2,
    # -log 2, 0, and 2 log 2 at beta 1/2.
    Row("npo", ratio(LN2, 0.0), 2 * LN3, 4 / 3, parameters={"beta": 1.0}),
    Row("npo", ratio(-LN2, 0.0), 0.8109302162163288, 2 / 3, parameters={"beta": 1.0}),
    Row("npo", ratio(0.0, 0.0), 20 * LN2, 1.0),
    Row("npo", ratio(2 * LN2, 0.0), 4 * LN3, 4 / 3, parameters={"beta": 0.5}),
    Row("likelihood_ratio", ratio(LN2, 0.0), -2.0, -2.0),
    # The loss is (log(2)/2 - 1)^2, and its slope is log(2)/2 - 1.
    Row(
        "advantage_regression",
        ratio(LN2, 1.0),
        (0.5 * LN2 - 1) ** 2,
        0.5 * LN2 - 1,
        parameters={"beta": 0.5},
    ),
    # The losses are 1 - σ(log 2) and σ(log 2), with the slopes -+2/9. Against z = log 2
    # the loss is 1/2 with the slope 1/4, times 2 or times 3.
    Row("kto", ratio(LN2, 1.0), 1 / 3, -2 / 9, parameters={"beta": 1.0}),
    Row("kto", ratio(LN2, -1.0), 2 / 3, 2 / 9, parameters={"beta": 1.0}),
    Row(
        "kto",
        ratio(LN2, 0.0),
        1.0,
        0.5,
        parameters={"beta": 1.0, "kl": LN2, "undesirable_weight": 2.0},
    ),
    Row(
        "kto",
        ratio(LN2, 1.0),
        1.5,
        -0.375,
        parameters={"beta": 0.5, "kl": LN2, "desirable_weight": 3.0},
    ),
    # The loss is log(2)^2/2, and its slope is log 2.
    Row("drift_k2", ratio(LN2, 0.0), 0.2402265069591007, LN2),
    # At d = log 2 the value k and the slope k - k' are -log 2 and 1 - log 2 of k1,
    # log(2)^2/2 and that less log 2 of k2, and 1 - log 2 and 1 - log 2 - 1 of k3.
    # Beyond a bound there is no slope.
    Row("k1_on_policy", distance(LN2), -LN2, 1 - LN2),
    Row("k2_on_policy", distance(LN2), 0.2402265069591007, 0.2402265069591007 - LN2),
    Row("k3_on_policy", distance(LN2), 1 - LN2, -LN2),
    Row("k3_on_policy", distance(-LN2), LN2 - 0.5, LN2),
    Row("k3_on_policy", distance(LN2), 0.25, 0.0, parameters={"cap": 0.25}),
    Row("k1_on_policy", distance(LN2), -0.5, 0.0, parameters={"clamp": 0.5}),
    Row("drift_k1", ratio(LN2, 0.0), -LN2, -1.0),
    # The loss is r - log r - 1 at 2 and 1/2, and its slope is r - 1.
    Row("drift_k3", ratio(LN2, 0.0), 1 - LN2, 1.0),
    Row("drift_k3", ratio(-LN2, 0.0), LN2 - 0.5, -0.5),
)


@dataclass(frozen=True)
class WeightRow:
    """A batch of tokens ``[B, T]``, flattened, and the weight of each. ``leaves`` holds
    numbers for all tokens, or lists. ``masked`` tokens are ignored.
    """

    weight: str
    leaves: dict[str, Any]
    expected: list[float]
    parameters: dict[str, Any] = field(default_factory=dict)
    sequences: int = 1
    masked: tuple[int, ...] = ()


def drift(*log_ratios: float) -> dict[str, list[float]]:
    """``sampling_logp`` that makes ``old_logp - sampling_logp`` the given numbers, with
    ``old_logp = -LN2``.
    """
    return {"old_logp": [-LN2] * len(log_ratios), "sampling_logp": [-LN2 - x for x in log_ratios]}


WEIGHT_ROWS = (
    # The weights are .3*1/2 + .7 and .3*1/4 + .7.
    WeightRow("current_advantage_reweighting", {"logp": [-LN2, -2 * LN2]}, [0.85, 0.775]),
    WeightRow(
        "positive_advantage_reweighting",
        {**old(0.5, 0.5, 0.5), "adv": [1.0, -1.0, 0.0]},
        [0.85, 1.0, 1.0],
    ),
    # 10 log 3 * (.5 - .4) = log 3 gives 2*3/4. At the midpoint the weight is 1.
    WeightRow("sigmoid_reweighting", old(0.5, 0.4), [1.5, 1.0], {"steepness": 10 * LN3}),
    WeightRow(
        "negative_sigmoid_reweighting",
        {**old(0.5, 0.5), "adv": [-1.0, 1.0]},
        [1.5, 1.0],
        {"steepness": 10 * LN3},
    ),
    # u = 1 at p = .4. The gain is 2*.5 = 1 and the loss is 2*(1*.4) = .8, so the
    # negatives are weighted by 1.25. The masked token counts in neither sum.
    WeightRow(
        "balanced_sigmoid_reweighting",
        {**old(0.5, 0.4, 0.4, 0.9), "adv": [2.0, -1.0, -1.0, 5.0]},
        [1.0, 1.25, 1.25, 0.0],
        masked=(3,),
    ),
    WeightRow("balanced_sigmoid_reweighting", {**old(0.5, 0.4), "adv": [2.0, 1.0]}, [1.0, 1.0]),
    WeightRow(
        "sign_weight",
        {"adv": [1.0, -1.0, 0.0]},
        [2.0, 0.5, 0.5],
        {"positive": 2.0, "negative": 0.5},
    ),
    WeightRow("reward_ranked", {"adv": [4.0, -1.0, 0.0]}, [0.25, 0.0, 0.0]),
    WeightRow(
        "probability_band", old(0.25, 0.5, 0.1), [1.0, 0.0, 0.0], {"lower": 0.25, "upper": 0.5}
    ),
    WeightRow(
        "probability_interval", old(0.25, 0.5, 0.1), [0.0, 1.0, 0.0], {"lower": 0.25, "upper": 0.5}
    ),
    # The .5 quantile of .1, .2, .4, .8 is .3. The masked .01 does not count.
    WeightRow(
        "probability_quantile",
        old(0.1, 0.4, 0.2, 0.8, 0.01),
        [1.0, 0.0, 1.0, 0.0, 0.0],
        masked=(4,),
    ),
    WeightRow(
        "probability_quantile", old(0.1, 0.2, 0.3), [0.25, 0.5, 0.5], {"below": 0.25, "above": 0.5}
    ),
    # The ratios are 4 and 1/2, and the cap is 2.
    WeightRow("truncated_importance", drift(2 * LN2, -LN2), [2.0, 0.5]),
    WeightRow("masked_importance", drift(2 * LN2, -LN2), [0.0, 0.5]),
    # The sequence ratios are 2*2 = 4, which is over the cap of 3, and 1/2.
    WeightRow(
        "sequence_truncated_importance",
        drift(LN2, LN2, -LN2, 0.0),
        [3.0, 3.0, 0.5, 0.5],
        sequences=2,
    ),
    WeightRow(
        "sequence_masked_importance", drift(LN2, LN2, -LN2, 0.0), [0.0, 0.0, 0.5, 0.5], sequences=2
    ),
    # The mean drifts are .6, .4, .9 against .5. Only negative advantages are masked.
    WeightRow(
        "off_policy_sequence_mask",
        {
            "logp": -2.0,
            "old_logp": [-1.6, -1.2, -1.6, -1.6, -1.1, -1.1],
            "adv": [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0],
        },
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        {"threshold": 0.5},
        sequences=3,
    ),
    # A token without a sampler's log-prob counts as no drift. (0 + .8)/2 = .4 is kept,
    # and (.4 + .8)/2 and (0 + 1.6)/2 are not.
    WeightRow(
        "sampler_sequence_mask",
        {"logp": -2.0, "sampling_logp": [math.nan, -1.2, -1.6, -1.2, math.nan, -0.4], "adv": -1.0},
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        {"threshold": 0.5},
        sequences=3,
    ),
    # W = 2 gives 2^2 e^(3(1-2)) = 4e^-3 and 2^3 e^(2(1-2)) = 8e^-2. W = 1 gives 1.
    WeightRow(
        "sequence_gamma",
        {
            "logp": -1.0,
            "old_logp": [-1 - LN2, -1.0, -1 - LN2, -1.0, -1.0, -1.0],
            "adv": [1.0, 1.0, -1.0, -1.0, 1.0, 1.0],
        },
        [0.19914827347145578] * 2 + [1.0826822658929016] * 2 + [1.0, 1.0],
        sequences=3,
    ),
    # The second token's correction makes W = 2, which gives e^(3(1 - 2)). A correction
    # of 0 counts as 1e-8, which gives e^(3(1 - 1e-8)).
    WeightRow(
        "sequence_gamma",
        {"logp": -1.0, "old_logp": -1.0, "adv": 1.0},
        [0.049787068367863944] * 2 + [20.08553632062157] * 2,
        {"k_pos": 0.0, "correction": [1.0, 2.0, 0.0, 1.0]},
        sequences=2,
    ),
    WeightRow("precomputed", {}, [0.5, 2.0], {"values": [0.5, 2.0]}),
    WeightRow("entropy", {"entropy": [0.5, 2.0]}, [0.5, 2.0]),
    # The .5 quantile of 1, 2, 3, 4 is 2.5.
    WeightRow(
        "top_entropy", {"entropy": [1.0, 2.0, 3.0, 4.0]}, [0.0, 0.0, 1.0, 1.0], {"fraction": 0.5}
    ),
    # The covariances are 1, 0, 1, 4, and floor(.5·4) = 2. Of equal ones the first is
    # taken.
    WeightRow("top_covariance", COVARYING, [0.0, 0.0, 0.0, 3.0], {"value": 3.0}),
    WeightRow("top_covariance", COVARYING, [3.0, 0.0, 0.0, 3.0], {"value": 3.0, "fraction": 0.5}),
    # Only the last is between 1.5 and 5. It is drawn, unless its ratio is clipped.
    WeightRow("clip_cov", COVARYING, [1.0, 1.0, 1.0, 0.0], {"lower": 1.5}),
    WeightRow(
        "clip_cov",
        {**COVARYING, "old_logp": [-4.0, -3.0, -4.0, -2.0]},
        [1.0, 1.0, 1.0, 1.0],
        {"lower": 1.5},
    ),
    # Without the last the means are 1/3 and -11/3, and the covariances are 1/9, 4/9,
    # 1/9.
    WeightRow("clip_cov", COVARYING, [1.0, 0.0, 1.0, 0.0], {"lower": 0.2}, masked=(3,)),
    # The second token agrees against the first. The weights are 1 + (1 - 0) and 1 + (1
    # - 1/4), since |a| is log 2 and 3 log 2.
    WeightRow(
        "prefix_discrepancy", {"old_logp": -2.0, "ref_logp": [-2 + LN2, -2 - 3 * LN2]}, [2.0, 1.75]
    ),
    WeightRow(
        "prefix_discrepancy", {"old_logp": -2.0, "ref_logp": -2.0}, [1.5, 1.5], {"gamma": 0.5}
    ),
    WeightRow(
        "negative_self_distilled_evidence",
        {"old_logp": -2.0, "ref_logp": -2 + LN2, "adv": [3.0, -3.0, 0.0]},
        [1.0, 0.9, 1.0],
    ),
    # Of |log r| those that follow A are .1, .2, .4. Cut at these, (log r)^2 has the
    # means .01, .03, .07. Up to .2 that is under .05, and at .4 it is over it.
    WeightRow(
        "second_moment_lower", MOVING, [1 - math.exp(-0.2)] * 4, {"budget": 0.05, "least": 0.1}
    ),
    WeightRow("second_moment_upper", MOVING, [math.expm1(0.2)] * 4, {"budget": 0.05, "least": 0.1}),
    WeightRow("second_moment_upper", MOVING, [0.5] * 4, {"budget": 0.05}),
    # Within the budget nothing is bounded.
    WeightRow("second_moment_lower", MOVING, [1.0] * 4, {"budget": 0.08, "least": 0.1}),
    WeightRow("second_moment_upper", MOVING, [math.inf] * 4, {"budget": 0.08, "least": 0.1}),
    # The bounds are e^(.1·n), and 1 - e^(-.1·sqrt(n)). The masked token has none.
    WeightRow(
        "position_bound",
        {},
        [math.exp(0.1), math.exp(0.2), math.exp(0.1), 0.0],
        {"base": 0.1, "power": 1.0},
        sequences=2,
        masked=(3,),
    ),
    WeightRow(
        "position_bound",
        {},
        [1 - math.exp(-0.1), 1 - math.exp(-0.1 * math.sqrt(2))],
        {"base": -0.1, "shift": -1.0, "sign": -1.0},
    ),
    # p goes from 1/4 or 3/4 to 1/2.
    WeightRow("probability_drift_mask", DRIFTED, [0.0, 1.0, 1.0, 0.0]),
    WeightRow("probability_drift_mask", DRIFTED, [1.0, 1.0, 1.0, 0.0], {"high": 0.3}),
    WeightRow("probability_distance_mask", DRIFTED, [0.0] * 4),
    WeightRow("probability_distance_mask", DRIFTED, [1.0] * 4, {"threshold": 0.26}),
    # The bounds are .2(1 - h) for h <= 0, and .28(1 + h) for h > 0.
    WeightRow("hapo_lower", SPREAD, [0.4, 0.3, 0.2, 0.2, 0.2], {"pivot": 0.5}),
    WeightRow("hapo_upper", SPREAD, [0.28, 0.28, 0.28, 0.42, 0.56], {"pivot": 0.5}),
)
