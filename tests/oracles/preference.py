"""Pair losses written straight from TRL 1.16's ``DPOTrainer._compute_loss`` and from
the papers: one pair at a time, in Python numbers.
"""

from __future__ import annotations

import math
from typing import Any

Token = list[float]  # the log-probs of one sequence's tokens


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def f_score(log_t: float, kind: str, alpha: float) -> float:
    """TRL's f-divergence scores of a log-ratio."""
    if kind == "reverse_kl":
        return log_t
    if kind == "forward_kl":
        return 1 - math.exp(-log_t)
    if kind == "js_divergence":
        return math.log(2) + log_sigmoid(log_t)
    return (math.exp(min((alpha - 1) * log_t, 80.0)) - 1) / (alpha - 1)


def ld_sum(tokens: Token, other_length: int, ld_alpha: float | None) -> float:
    shared = min(len(tokens), other_length)
    return sum(tokens[:shared]) + (1.0 if ld_alpha is None else ld_alpha) * sum(tokens[shared:])


def trl_loss(
    chosen: list[Token],
    rejected: list[Token],
    ref_chosen: list[Token],
    ref_rejected: list[Token],
    loss_types: list[str],
    loss_weights: list[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    log_sum_p_sq: tuple[list[Token], list[Token]] | None = None,
) -> float:
    """The batch's loss; ``log_sum_p_sq`` (chosen, rejected) turns WPO's
    weighting on."""
    n = len(chosen)
    c = [ld_sum(chosen[i], len(rejected[i]), ld_alpha) for i in range(n)]
    r = [ld_sum(rejected[i], len(chosen[i]), ld_alpha) for i in range(n)]
    rc = [ld_sum(ref_chosen[i], len(rejected[i]), ld_alpha) for i in range(n)]
    rr = [ld_sum(ref_rejected[i], len(chosen[i]), ld_alpha) for i in range(n)]
    cr, rj = [c[i] - rc[i] for i in range(n)], [r[i] - rr[i] for i in range(n)]
    cs = [f_score(x, f_divergence_type, f_alpha_divergence_coef) for x in cr]
    rs = [f_score(x, f_divergence_type, f_alpha_divergence_coef) for x in rj]
    total, e = 0.0, label_smoothing
    for kind, coef in zip(loss_types, loss_weights or [1.0] * len(loss_types), strict=True):
        losses = []
        for i in range(n):
            d = cs[i] - rs[i]
            per_token = cs[i] / max(len(chosen[i]), 1) - rs[i] / max(len(rejected[i]), 1)
            if kind == "sigmoid":
                x = -log_sigmoid(beta * d)
            elif kind == "hinge":
                x = max(0.0, 1 - beta * d)
            elif kind == "ipo":
                x = (per_token - 1 / (2 * beta)) ** 2
            elif kind == "exo_pair":
                qw, ql = sigmoid(beta * d), sigmoid(-beta * d)
                x = qw * (math.log(qw) - math.log(1 - e)) + ql * (math.log(ql) - math.log(e))
            elif kind == "nca_pair":
                x = (
                    -log_sigmoid(beta * cr[i])
                    - 0.5 * log_sigmoid(-beta * cr[i])
                    - 0.5 * log_sigmoid(-beta * rj[i])
                )
            elif kind == "robust":
                x = (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e)
            elif kind == "bco_pair":
                x = -log_sigmoid(beta * cr[i]) - log_sigmoid(-beta * rj[i])
            elif kind == "sppo_hard":
                x = (cr[i] - 0.5 / beta) ** 2 + (rj[i] + 0.5 / beta) ** 2
            elif kind == "aot":
                left, right = (
                    sorted(a - b for a, b in zip(c, r, strict=True)),
                    sorted(a - b for a, b in zip(rc, rr, strict=True)),
                )
                z = beta * (left[i] - right[i])
                x = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
            elif kind == "aot_unpaired":
                z = beta * (sorted(cr)[i] - sorted(rj)[i])
                x = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
            elif kind == "apo_zero":
                x = 1 - sigmoid(beta * cr[i]) + sigmoid(beta * rj[i])
            elif kind == "apo_down":
                x = sigmoid(beta * cr[i]) + 1 - sigmoid(beta * (cr[i] - rj[i]))
            elif kind == "discopop":
                gate = sigmoid(beta * d / discopop_tau)
                x = -log_sigmoid(beta * d) * (1 - gate) + math.exp(-beta * d) * gate
            elif kind == "sft":
                flat = [t for tokens in chosen for t in tokens]
                x = -sum(flat) / len(flat)
            elif kind == "sigmoid_norm":
                x = -log_sigmoid(beta * per_token)
            else:
                raise ValueError(kind)
            if log_sum_p_sq is not None:
                x *= wpo_weight(chosen[i], log_sum_p_sq[0][i]) * wpo_weight(
                    rejected[i], log_sum_p_sq[1][i]
                )
            losses.append(x)
        total += coef * sum(losses) / n
    return total


def wpo_weight(logps: Token, log_sum_p_sq: Token) -> float:
    """Eq. 2, sampled alignment."""
    return math.exp(
        sum(a - b for a, b in zip(logps, log_sum_p_sq, strict=True)) / max(len(logps), 1)
    )


def madpo_weight(h: float, c_min: float, c_max: float, lam: float, tau: float) -> float:
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(lam * (abs(h) - tau)))
    return sigmoid(c * h) / sigmoid(h) if h > -tau else 1.0


def unlikelihood(
    chosen: Token, rejected: Token, ref_chosen: Token, ref_rejected: Token, beta: float
) -> float:
    """``loss_type="unlikelihood"`` of the authors' trainer: log(1 - p) of the rejected
    tokens against their log-probs under the reference.
    """
    log_one_minus = sum(math.log(1 - math.exp(t)) for t in rejected)
    return -log_sigmoid(beta * (sum(chosen) - sum(ref_chosen) + log_one_minus - sum(ref_rejected)))


def no_sft_ratio_w_unlikelihood(chosen: Token, rejected: Token, beta: float) -> float:
    """``loss_type="no_sft_ratio_w_unlikelihood"``."""
    return -log_sigmoid(beta * (sum(chosen) + sum(math.log(1 - math.exp(t)) for t in rejected)))


def inpo(d: float, d_ref: float, d_old: float, eta: float, tau: float) -> float:
    return (d - tau / eta * d_ref - (eta - tau) / eta * d_old - 1 / (2 * eta)) ** 2


def mcts_dpo(d: float, q_w: float, q_l: float, beta: float) -> float:
    eps = min(1 - 1 / (1 + q_l / max(1, q_w)), 0.5)
    return -(1 - eps) * log_sigmoid(beta * d) - eps * log_sigmoid(-beta * d)


def sparse_po(sides: list[dict[str, Any]], beta: float, c_u: float, c_d: float) -> float:
    """``sides``: chosen and rejected, each with logps, ref, kl (of ref to policy), m_u,
    m_d. The authors' ``k`` is -kl.
    """
    u = [
        sum(m * (a - b) for m, a, b in zip(s["m_u"], s["logps"], s["ref"], strict=True))
        for s in sides
    ]
    d = [sum(m * -k for m, k in zip(s["m_d"], s["kl"], strict=True)) for s in sides]
    norms = sum(c_u * sum(map(abs, s["m_u"])) + c_d * sum(map(abs, s["m_d"])) for s in sides)
    return -log_sigmoid(beta * ((u[0] - u[1]) - (d[0] - d[1]))) + norms


def kendall(a: list[float], b: list[float]) -> float:
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    concordant = sum((a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in pairs)
    discordant = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs)
    return (concordant - discordant) / len(pairs)


def ens_loss_slopes(s: list[float], noise: list[float]) -> list[float]:
    """λ = 0: the draws as slopes, sorted, capped, dealt out in increasing order of the
    margin with one extra margin of 0.
    """
    slopes = sorted(max(-math.exp(n), -1.0) for n in noise)
    order = sorted(range(len(s) + 1), key=lambda i: [*s, 0.0][i])
    dealt = {i: slopes[k] for k, i in enumerate(order)}
    return [dealt[i] * (1 / s[i] if s[i] > 1 else 1.0) - 1e-6 for i in range(len(s))]
