"""Token weights by their sources' formulas, token by token in Python numbers. ``rows``
are lists of valid tokens, one dict a token.
"""

from __future__ import annotations

import math


def steer(rows, omega="code", mapping="exponential", w_min=0.8, w_max=1.2, floor=0.02):
    """``compute_token_weights`` of the authors' repository; ``exact``: the entropy's
    change by the token's own logit, ``r·A·p(1-p)(log p + H)``.
    """
    sizes = []
    for t in rows:
        p, p_old = math.exp(t["logp"]), math.exp(t["old"])
        f = p * (1 - p) * (math.log(p) + t["H"])
        sizes.append(abs(t["A"] / p_old * f) if omega == "code" else abs(p / p_old * t["A"] * f))
    if mapping == "linear":
        low, high = min(sizes), max(sizes)
        return [w_max - (s - low) * (w_max - w_min) / (high - low) for s in sizes]
    k = -math.log(w_min) / max(max(sizes), floor)
    return [max(w_min, min(1.0, math.exp(-k * s))) for s in sizes]


def hapo(rows, epsilon_low=0.2, epsilon_high=0.28, alpha=1.0, beta=1.0, pivot=0.8):
    """The paper: ``(lower bound, upper bound, factor)`` of each token, with the
    deviation that it divides by.
    """
    logs = [math.log(t["H"]) for t in rows]
    centre = sorted(logs)[round(pivot * (len(logs) - 1))]
    deviation = math.sqrt(sum((x - centre) ** 2 for x in logs) / len(logs))
    h = [(x - centre) / deviation for x in logs]
    top, bottom = max(h), min(h)
    out = []
    for t, x in zip(rows, h, strict=True):
        x = x / top if x > 0 else x / abs(bottom)
        low = epsilon_low * (1 - alpha * x) if x <= 0 else epsilon_low
        high = epsilon_high * (1 + alpha * x) if x > 0 else epsilon_high
        r = math.exp(t["logp"] - t["old"])
        neutral = 1 - low / 2 < r < 1 + high / 2
        factor = 1 + beta * x if (x > 0 and not neutral) or (x <= 0 and neutral) else 1.0
        out.append((low, high, factor))
    return out


def stare(rows, ratio=0.1, W=1.1, M=1.0):
    """``compute_stare_token_weights``: the top ``ratio`` by surprisal of the positive
    tokens get W, of the negative ones M.
    """
    weights = [1.0] * len(rows)
    for sign, value in ((1, W), (-1, M)):
        candidates = [i for i, t in enumerate(rows) if t["A"] * sign > 0]
        if candidates:
            k = max(1, int(len(candidates) * ratio + 0.999999))
            for i in sorted(candidates, key=lambda i: rows[i]["logp"])[:k]:
                weights[i] = value
    return weights


def divergence_gate(rows, kind, level, delta):
    """OpenRLHF 0.11.2, ``PolicyLoss`` with ``is_correction_gating``: the factor of a
    sequence's tokens, the ratio of what is kept, else 0.
    """

    def clamped(x):
        return min(max(math.exp(x), 1e-6), 1 - 1e-6)

    stats = []
    for t in rows:
        p, q = clamped(t["sampling"]), clamped(t["old"])
        stats.append(
            abs(p - q)
            if kind == "tv"
            else p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        )
    if level == "sequence":
        stats = [sum(stats) / len(stats)] * len(stats)
    return [
        math.exp(t["old"] - t["sampling"]) if s <= delta else 0.0
        for t, s in zip(rows, stats, strict=True)
    ]


def tw_grpo(logits, lengths, G, max_weight):
    """``compute_token_importance_kl_logs_uniform``: nested lists ``logits[B][T][V]``,
    ``lengths[B]``; weights ``[B][T]``, 0 behind the end.
    """
    B, T, V = len(logits), len(logits[0]), len(logits[0][0])
    out = []
    for first in range(0, B, G):
        D = []
        for t in range(T):
            logps = []
            for g in range(first, first + G):
                z = logits[g][t]
                lse = math.log(sum(math.exp(x) for x in z))
                logps.append([x - lse for x in z] if t < lengths[g] else [-math.log(V)] * V)
            mean = [sum(row[v] for row in logps) / G for v in range(V)]
            d = [[min(11.0, max(-11.0, mean[v] - row[v])) for v in range(V)] for row in logps]
            D.append(sum(math.exp(x) - x - 1 for row in d for x in row) / G)
        n = [(x - min(D)) / (max(D) - min(D) + 1e-8) for x in D]
        for g in range(first, first + G):
            out.append([1 + (max_weight - 1) * n[t] if t < lengths[g] else 0.0 for t in range(T)])
    return out


def gtpo(H, correct, lengths, G, alpha_1=1.0, alpha_2=0.1, eps=1e-8):
    """Eq. 3, 5 and 6 for each prompt: ``(rewards, advantages)``, both ``[B][T]`` with 0
    behind the end.
    """
    B, T = len(H), len(H[0])
    rewards, advantages = ([[0.0] * T for _ in range(B)] for _ in range(2))
    for first in range(0, B, G):
        for label in (True, False):
            members = [i for i in range(first, first + G) if correct[i] is label]
            for i in members:
                for t in range(lengths[i]):
                    there = [k for k in members if t < lengths[k]]
                    if label:
                        rewards[i][t] = alpha_1 + alpha_2 * H[i][t] / sum(
                            H[k][t] for k in there
                        ) * len(there)
                    else:
                        share = (1 / (H[i][t] + eps)) / sum(1 / (H[k][t] + eps) for k in there)
                        rewards[i][t] = -alpha_1 - alpha_2 * share * len(there)
            values = [rewards[i][t] for i in members for t in range(lengths[i])]
            if values:
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values) + eps)
                for i in members:
                    for t in range(lengths[i]):
                        advantages[i][t] = (rewards[i][t] - mean) / deviation
    return rewards, advantages
