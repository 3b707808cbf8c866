"""Golden rows of the losses of pairs: the loss and its slope by every token's log-prob.

``LN3 = log 3`` makes sigmoids exact: ``σ(log 3) = 3/4``, ``σ(2·log 3) = 9/10``. Unless
a row says otherwise, its pair is :data:`PAIR`. The chosen sequence has the log-ratio
``log 3`` over two tokens, and the rejected one has ``-log 3`` on one token. The margin
is ``2·log 3``.
"""

from __future__ import annotations

from math import log
from typing import Any

from .golden_row import LN2, LN3, Golden

#: Three valid tokens. Two are chosen, and one is rejected.
MASK = [[1, 1], [1, 0]]
PAIR: dict[str, Any] = {
    "per_token_logps": [[-1.0, -1.0], [-2.0, -5.0]],
    "ref_per_token_logps": [[-1 - LN3, -1.0], [-2 + LN3, -9.0]],
    "completion_mask": MASK,
}
#: ``-log σ(log 3)``. Its slope by the margin is -1/4.
LOSS = log(4 / 3)
#: ``-log σ(-log 3)``. Its slope is -3/4.
FLIPPED = log(4)


def _row(
    name: str, loss: float, slopes: list[float], tokens: dict[str, Any], /, **arguments: Any
) -> Golden:
    return Golden("pair_loss", name, arguments, [loss, *slopes], tokens=tokens)


def _pair(
    name: str,
    loss: float,
    chosen: float,
    rejected: float,
    *,
    given: dict[str, Any] | None = None,
    **arguments: Any,
) -> Golden:
    """A row of :data:`PAIR`, with one slope for both chosen tokens and one for the
    rejected token.
    """
    return _row(name, loss, [chosen, chosen, rejected, 0.0], {**PAIR, **(given or {})}, **arguments)


def _likely(chosen: list[float], rejected: float, **more: Any) -> dict[str, Any]:
    """Tokens of a loss without a reference."""
    logps = [chosen, [rejected, -5.0]]
    return {"per_token_logps": logps, "completion_mask": MASK, **more}


WITH_A_REFERENCE = (
    # β·m = log 3, so the slope is -β/4 = -1/8.
    _pair("dpo", LOSS, -1 / 8, 1 / 8, beta=0.5),
    # The slope is 0.9·(-1/4) + 0.1·3/4 = -0.15, times β.
    _pair("cdpo", 0.9 * LOSS + 0.1 * FLIPPED, -0.075, 0.075, beta=0.5, label_smoothing=0.1),
    # The slope is (0.9·(-1/4) - 0.1·3/4) / 0.8 = -0.375, times β.
    _pair(
        "robust_dpo",
        (0.9 * LOSS - 0.1 * FLIPPED) / 0.8,
        -0.1875,
        0.1875,
        beta=0.5,
        label_smoothing=0.1,
    ),
    _pair("hinge", 1 - LN3 / 2, -0.25, 0.25, beta=0.25),
    # β·m = log 3 is above 1, so the loss is 0.
    _pair("hinge", 0.0, 0.0, 0.0, beta=0.5),
    # The margin of the means is log(3)/2 + log 3, less 1/(2β) = 1. A chosen token is
    # half of its mean.
    _pair("ipo", (1.5 * LN3 - 1) ** 2, 1.5 * LN3 - 1, -2 * (1.5 * LN3 - 1), beta=0.5),
    _pair(
        "ipo",
        (2 * LN3 - 1) ** 2,
        2 * (2 * LN3 - 1),
        -2 * (2 * LN3 - 1),
        beta=0.5,
        average=False,
    ),
    # The loss is the KL of (3/4, 1/4) from (1/2, 1/2). Its slope is σ(1-σ)·log 3, times
    # β.
    _pair(
        "exo",
        0.75 * log(1.5) - 0.25 * LN2,
        3 / 32 * LN3,
        -3 / 32 * LN3,
        beta=0.5,
        label_smoothing=0.5,
    ),
    # The loss is -log(3/4) - 1/2·log(1/4) - 1/2·log(3/4). The slopes are -1/4 +
    # 1/2·3/4, and 1/2·1/4.
    _pair("nca", 1.5 * LOSS + 0.5 * FLIPPED, 1 / 8, 1 / 8, beta=1.0),
    _pair("bco", 2 * LOSS, -1 / 4, 1 / 4, beta=1.0),
    # The target 1/(2β) is 1.
    _pair("sppo", 2 * (LN3 - 1) ** 2, 2 * (LN3 - 1), -2 * (LN3 - 1), beta=0.5),
    # The losses are 1 - 3/4 + 1/4, and 3/4 + 1 - 9/10.
    _pair("apo", 0.5, -3 / 16, 3 / 16, beta=1.0),
    _pair("apo", 0.85, 3 / 16 - 0.09, 0.09, beta=1.0, anchor="down"),
    # g = 3/4 and e^-x = 1/3, so g' = 3/16. The slope is -3/16·LOSS - 1/16 + 1/16 - 1/4,
    # times β.
    _pair(
        "discopop",
        LOSS / 4 + 1 / 4,
        -(3 / 16 * LOSS + 1 / 4) / 2,
        (3 / 16 * LOSS + 1 / 4) / 2,
        beta=0.5,
        tau=1.0,
    ),
    # The reference has -2 - log 3 and -2 + log 3, and γ = 1/2 of that counts. What is
    # left is -1 + log(3)/2 against -1 - log(3)/2.
    _pair("dpo_gamma", LOSS, -1 / 4, 1 / 4, beta=1.0, gamma=0.5),
    # The first row has η·β·2 more in the loss, and -η·β more a token. The second has
    # 0.2 of the mean 1 more in the loss, and -0.1 more a token.
    _pair("rpo", LOSS + 0.1, -1 / 8 - 0.05, 1 / 8, form="cumulative", beta=0.5, eta=0.1),
    _pair("rpo", LOSS + 0.2, -1 / 8 - 0.1, 1 / 8, form="average", beta=0.5),
    # D = D_old = 0 and D_ref = -2·log 3, and half of each counts. The target 1/(2η) is
    # 1.
    _pair(
        "inpo",
        (LN3 - 1) ** 2,
        2 * (LN3 - 1),
        -2 * (LN3 - 1),
        given={"old_per_token_logps": PAIR["per_token_logps"]},
        eta=0.5,
        tau=0.25,
    ),
    _pair(
        "cream",
        0.9 * LOSS + 0.1 * FLIPPED,
        -0.075,
        0.075,
        given={"consistency": [0.9]},
        beta=0.5,
    ),
    # The rewards agree in the first row. That adds 2·(3/4 - 9/10)² to the loss, and
    # 2·2·(-0.15)·3/16 to the slope, times β. In the second row they do not agree.
    _pair(
        "scir",
        LOSS + 0.045,
        -(1 / 4 + 0.1125) / 2,
        (1 / 4 + 0.1125) / 2,
        given={"judge_margins": [2 * LN3]},
        beta=0.5,
        coef=2.0,
    ),
    _pair("scir", 0.0, 0.0, 0.0, given={"judge_margins": [-1.0]}, beta=0.5, coef=2.0),
    # t is 3 and 1/3. The difference of log(2t/(t+1)) is log(3/2) + log 2. Its slopes
    # are 1/(t+1).
    _pair("f_dpo", LOSS, -1 / 16, 3 / 16, beta=1.0, divergence="js_divergence"),
    # The difference of 1 - 1/t is 2/3 + 2. Its slopes are 1/t.
    _pair(
        "f_dpo",
        LOSS,
        -3 / 8 * LN3 / 12,
        3 / 8 * LN3 * 3 / 4,
        beta=3 / 8 * LN3,
        divergence="forward_kl",
    ),
    # The difference of t - 1 is 2 + 2/3. Its slopes are t.
    _pair(
        "f_dpo",
        LOSS,
        -3 / 8 * LN3 * 3 / 4,
        3 / 8 * LN3 / 12,
        beta=3 / 8 * LN3,
        divergence="alpha_divergence",
        alpha=2.0,
    ),
    # The second chosen token is beyond the rejected length. The chosen log-ratio is
    # log(3)/2 + 1/2·log 3.
    _row(
        "ld_dpo",
        LOSS,
        [-1 / 8, -1 / 16, 1 / 8, 0.0],
        {**PAIR, "ref_per_token_logps": [[-1 - LN3 / 2, -1 - LN3], [-2 + LN3, -9.0]]},
        beta=0.5,
        ld_alpha=0.5,
    ),
    # The mean NLL of the chosen sequence is 1.
    _pair("irpo", LOSS + 2, -1 / 8 - 1, 1 / 8, beta=0.5, alpha=2.0),
    # σ(2·log 3) = 9/10, LOSS counts twice, and the NLL is 1. The slope is -0.8/10 -
    # 0.2/4 - 1/2.
    _pair("mpo", 0.8 * log(10 / 9) + 0.4 * LOSS + 1, -0.63, 0.13, beta=1.0),
    # w = exp(-log 2 + 0). The log of the sum of squares is not read where the mask is
    # 0.
    _pair(
        "wpo",
        LOSS / 2,
        -1 / 16,
        1 / 16,
        given={"log_sum_p_sq": [[-1 + LN2, -1 + LN2], [-2.0, -7.0]]},
        beta=0.5,
    ),
    # e^2 is cut to 1.
    _pair(
        "wpo", LOSS, -1 / 8, 1 / 8, given={"log_sum_p_sq": [[-2.0, -2.0], [-3.0, 0.0]]}, beta=0.5
    ),
    # h = log 3 is τ + log 2. So c = 1/2 + (3/2)/(1 + 2·2) = 0.8, and w =
    # σ(0.8·h)/(3/4).
    _pair(
        "madpo",
        LOSS * 4 / 3 / (1 + 3**-0.8),
        -1 / 6 / (1 + 3**-0.8),
        1 / 6 / (1 + 3**-0.8),
        given={"reward_margins": [LN3]},
        beta=0.5,
        c_max=2.0,
        tau=LN3 - LN2,
    ),
    # h is below -τ.
    _pair("madpo", LOSS, -1 / 8, 1 / 8, given={"reward_margins": [-LN3]}, beta=0.5, tau=LN2),
    # c = 1/(1 + 1/4), so ε = 0.2. The slope is -0.8/4 + 0.2·3/4 = -0.05, times β, from
    # the second token on.
    *(
        _row(
            "mcts_dpo",
            loss,
            [0.0, slope, 0.0, -slope],
            {
                "per_token_logps": [[-1.0, -1.0], [-1.0, -2.0]],
                "ref_per_token_logps": [[-3.0, -1 - LN3], [-3.0, -2 + LN3]],
                "completion_ids": [[5, 6], [5, 7]],
                "completion_mask": [[1, 1], [1, 1]],
                **given,
            },
            beta=0.5,
            loss=kind,
        )
        for kind, loss, slope, given in (
            (
                "conservative",
                0.8 * LOSS + 0.2 * FLIPPED,
                -0.025,
                {"chosen_values": [4.0], "rejected_values": [1.0]},
            ),
            ("sigmoid", LOSS, -1 / 8, {}),
            ("ipo", (2 * LN3 - 1) ** 2, 2 * (2 * LN3 - 1), {}),
        )
    ),
    # u is 1/2·log 3 on either side. The KL terms of both sides are 0.1. The norms of
    # the masks are 2 and 2.5.
    _row(
        "sparse_po",
        LOSS + 0.1 * 2 + 0.2 * 2.5,
        [-1 / 8, -1 / 4, 1 / 8, 0.0],
        {
            **PAIR,
            "reward_mask": [[0.5, 1.0], [0.5, 9.0]],
            "kl_mask": [[0.5, 1.0], [1.0, 9.0]],
            "per_token_kl": [[0.2, 0.0], [0.1, 9.0]],
        },
        beta=1.0,
        reward_norm_coef=0.1,
        kl_norm_coef=0.2,
    ),
    # The slopes are -1/2 at the margin 0, and -1/3 at s = log 3. The second is divided
    # by s.
    _pair(
        "ens_loss",
        -1 / 3 - 1e-6 * LN3,
        -(1 / 3 / LN3 + 1e-6) / 2,
        (1 / 3 / LN3 + 1e-6) / 2,
        given={"noise": [-LN2, -LN3]},
        beta=0.5,
    ),
    # The log-probs of the pairs differ by 1 and -1. The reference's differ by -1 and 1,
    # less 2·log 3, so that the pairs are in the other order.
    _row(
        "aot",
        LOSS,
        [-1 / 16, -1 / 16, 1 / 16, 1 / 16],
        {
            "per_token_logps": [[-1.0], [-2.0], [-2.0], [-1.0]],
            "ref_per_token_logps": [[-4 - 2 * LN3], [-3 - 2 * LN3], [-3.0], [-4.0]],
        },
        beta=0.5,
    ),
    # The chosen log-ratios are log 3 and 3. The rejected ones are 3 - 2·log 3 and -log
    # 3.
    _row(
        "aot",
        LOSS,
        [-1 / 16, -1 / 16, 1 / 16, 1 / 16],
        {
            "per_token_logps": [[-1.0], [-2.0], [-2.0], [-1.0]],
            "ref_per_token_logps": [[-1 - LN3], [-5.0], [-5 + 2 * LN3], [-1 + LN3]],
        },
        beta=0.5,
        paired=False,
    ),
)

#: A list with the scores log 3, 0 and -log 3.
LIST: dict[str, Any] = {
    "per_token_logps": [[-1.0], [-1.0], [-1.0]],
    "ref_per_token_logps": [[-1 - LN3], [-1.0], [-1 + LN3]],
}

OTHERS = (
    # The means are -1 and -2, and β - γ = log 3.
    _row(
        "simpo",
        LOSS,
        [-(1 + LN3) / 8, -(1 + LN3) / 8, (1 + LN3) / 4, 0.0],
        _likely([-1.0, -1.0], -2.0),
        beta=1 + LN3,
        gamma=1.0,
    ),
    # The mean NLL of chosen tokens is 1.
    _row(
        "cpo",
        LOSS + 2,
        [-1 / 8 - 1, -1 / 8 - 1, 1 / 8, 0.0],
        _likely([-1.0, -1.0], -2 - 2 * LN3),
        beta=0.5,
        cpo_alpha=2.0,
    ),
    # The odds are 1 and 1/3. Their logs have the slopes 1/(1-p) = 2 and 4/3.
    _row(
        "orpo",
        LN2 + LOSS / 2,
        [-1 / 8 - 1 / 2, -1 / 8 - 1 / 2, 1 / 6, 0.0],
        _likely([-LN2, -LN2], -2 * LN2),
        beta=0.5,
    ),
    # log(1 - 1/2) cancels the reference's log(1/2). Its slope is -p/(1-p) = -1.
    _row(
        "unlikelihood",
        LOSS,
        [-1 / 4, -1 / 4, 1 / 4, 0.0],
        _likely([-1.0, -1.0], -LN2, ref_per_token_logps=[[-1 - LN3, -1.0], [-LN2, -9.0]]),
        beta=1.0,
    ),
    # β·(-log 2 - log 2) = -log 2, so σ = 1/3.
    _row(
        "no_sft_ratio_w_unlikelihood",
        LN3,
        [-1 / 3, -1 / 3, 1 / 3, 0.0],
        _likely([-LN2 / 2, -LN2 / 2], -LN2),
        beta=0.5,
    ),
    # 1 - 1/p is -1 against -2, with the slopes 2 and 3. β - γ = log 3.
    _row(
        "alpha_po",
        LOSS,
        [-(1 + LN3) / 4, -(1 + LN3) / 4, 3 * (1 + LN3) / 4, 0.0],
        _likely([-LN2, -LN2], -LN3),
        alpha=1.0,
        beta=1 + LN3,
        gamma=1.0,
    ),
    # α → 0 is SimPO.
    _row(
        "alpha_po",
        LOSS,
        [-(1 + LN3) / 8, -(1 + LN3) / 8, (1 + LN3) / 4, 0.0],
        _likely([-1.0, -1.0], -2.0),
        alpha=0.0,
        beta=1 + LN3,
        gamma=1.0,
    ),
    # The mean NLL of the gold tokens is 2. With means the margin is 1.
    *(
        _row(
            "tpo",
            LOSS + 1,
            [*slopes, 0.0, -1 / 4, -1 / 4],
            {
                "per_token_logps": [[-1.0, -1.0], [rejected, -5.0], [-3.0, -1.0]],
                "completion_mask": [[1, 1], [1, 0], [1, 1]],
            },
            alpha=0.5,
            **arguments,
        )
        for rejected, slopes, arguments in (
            (-2 - 2 * LN3, [-1 / 8, -1 / 8, 1 / 8], {"beta": 0.5}),
            (
                -2.0,
                [-(0.5 + LN3) / 8, -(0.5 + LN3) / 8, (0.5 + LN3) / 4],
                {"beta": 0.5 + LN3, "loss_type": "tpo-l"},
            ),
        )
    ),
    _row(
        "rank_list",
        2 * LOSS,
        [-1 / 4, 0.0, 1 / 4],
        LIST,
        group_size=3,
        beta=1.0,
        skips=(1,),
    ),
    # One skip of two adds -log(9/10).
    _row(
        "rank_list",
        2 * LOSS + log(10 / 9),
        [-0.35, 0.0, 0.35],
        LIST,
        group_size=3,
        beta=1.0,
    ),
    # The loss is log(1 + 1/3 + 1/9) + log(1 + 1/3).
    _row(
        "rank_list",
        log(13 / 9) + LOSS,
        [-4 / 13, 3 / 13 - 1 / 4, 1 / 13 + 1 / 4],
        LIST,
        group_size=3,
        beta=1.0,
        skips="all",
    ),
)

PAIRS = WITH_A_REFERENCE + OTHERS
