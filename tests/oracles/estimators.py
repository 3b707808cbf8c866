"""The papers' advantage estimators, one group (or one text) at a time, in Python floats
as their equations are written.
"""

from __future__ import annotations

from math import ceil, exp, inf, log, sqrt


def mean(xs):
    return sum(xs) / len(xs)


def std(xs, correction=1):
    m = mean(xs)
    return sqrt(sum((x - m) ** 2 for x in xs) / (len(xs) - correction))


def grpo_lead(rewards, a=0.4, b=1.5, x0=0.75, k=10):
    """arXiv:2504.09696, eq. 3 to 5."""
    m, s = mean(rewards), std(rewards)
    rho = sum(r > 0 for r in rewards) / len(rewards)

    def w(x):
        return a + (b - a) / (1 + exp(k * (x - x0)))

    out = []
    for r in rewards:
        normalized = (r - m) / (s + 1e-6)
        out.append(normalized * w(rho) if normalized > 0 else normalized * w(1 - rho))
    return out


def mapo_mixed(rewards, correct):
    """arXiv:2509.18849: (1 - lambda) of the z-score, lambda of the percent deviation,
    lambda = 1 - 4p(1 - p).
    """
    m, s, p = mean(rewards), std(rewards), sum(map(bool, correct)) / len(correct)
    lam = 1 - 4 * p * (1 - p)
    return [(1 - lam) * (r - m) / (s + 1e-6) + lam * (r - m) / (m + 1e-6) for r in rewards]


def ngrpo(rewards, r_max=1.0, count=1):
    """arXiv:2509.18851: the group with ``count`` virtual completions of reward
    ``r_max``; the authors' code has mean 0 and std 1 for one completion.
    """
    if len(rewards) == 1:
        return [rewards[0] / (1 + 1e-6)]
    extended = [*rewards, *([r_max] * count)]
    return [(r - mean(extended)) / (std(extended) + 1e-6) for r in rewards]


def qae(rewards, K=0.4, correction=0):
    """arXiv:2509.22611: the smallest reward x whose share of rewards <= x reaches K;
    shares in whole numbers, K in thousandths.
    """
    n, k = len(rewards), round(1000 * K)
    baseline = min(x for x in rewards if 1000 * sum(r <= x for r in rewards) >= k * n)
    return [(r - baseline) / (std(rewards, correction) + 1e-6) for r in rewards]


def lens(correct, texts, reading="length_normalized", alpha=0.25, epsilon=1e-4):
    """arXiv:2510.08696. ``texts``: the old log-probs of each completion's tokens."""
    G = len(correct)
    pi = [exp(mean(t)) for t in texts]
    likelihood = pi if reading == "length_normalized" else [exp(sum(t)) for t in texts]
    D = 2 * max(pi)
    inverse = sum(r / x for r, x in zip(correct, likelihood, strict=True)) / G
    if inverse > 0:
        D = max(D, 1 / inverse)
    r = [c - (1 - c) * (1 / G) * p / (D - p) for c, p in zip(correct, pi, strict=True)]
    if sum(correct) == 0:
        return [alpha * (x - mean(r)) for x in r]
    return [(x - mean(r)) / (std(r) + epsilon) for x in r]


def canon(rewards, metric, mu, alpha=1.0, beta=0.0, kind="entropy"):
    """arXiv:2509.23962, eq. 5 to 8."""
    order = sorted(range(len(rewards)), key=lambda i: (metric[i], i))
    small, large = order[: len(order) // 2], order[len(order) // 2 :]
    m_small, m_large = (mean([rewards[i] for i in half]) for half in (small, large))
    out = []
    for i, r in enumerate(rewards):
        if kind == "entropy":
            inter = alpha * r - m_large - beta if i in small else r - alpha * m_small + beta
        else:
            inter = r - alpha * m_large - beta if i in small else alpha * r - m_small + beta
        intra = r - (m_small if i in small else m_large)
        out.append(mu * inter + (1 - mu) * intra)
    return out


def edge_grpo(rewards, entropy):
    """arXiv:2507.21848, eq. 5 and 6."""
    m, s = mean(rewards), std(rewards)
    return [
        (r - m) / (s + 1e-4) / (h / mean(entropy)) for r, h in zip(rewards, entropy, strict=True)
    ]


def hapo(rewards, lengths):
    """arXiv:2509.16591: mean and (population) std over the group's tokens, each with
    its completion's reward.
    """
    tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    m, s = mean(tokens), std(tokens, correction=0)
    return [(r - m) / (s + 1e-6) for r in rewards]


def spo_chain(logps, values, reward, threshold=0.9, interval=5):
    """arXiv:2505.23564 and the authors' generator: cut before every ``interval``-th
    unlikely token; V after - V before, the reward at the end.
    """
    unlikely = [t for t, lp in enumerate(logps) if exp(lp) < threshold]
    starts = unlikely[::interval]
    if not starts:
        return [0.0] * len(logps)
    ends = [*values[1 : len(starts)], reward]
    out = [0.0] * starts[0]
    for k, start in enumerate(starts):
        stop = starts[k + 1] if k + 1 < len(starts) else len(logps)
        out += [ends[k] - values[k]] * (stop - start)
    return out


def gigpo(episodes, steps, norm="mean", epsilon=1e-6):
    """arXiv:2505.10978, eq. 3, 6 and 8. ``episodes``: (group, return); ``steps``:
    (episode, anchor state, discounted return).
    """

    def relative(x, xs):
        if norm == "mean":
            return x - mean(xs)
        return (x - mean(xs)) / ((std(xs) if len(xs) > 1 else 0) + epsilon)

    out = []
    for episode, anchor, value in steps:
        group, total = episodes[episode]
        by_episode = relative(total, [r for g, r in episodes if g == group])
        same = [v for e, a, v in steps if a == anchor and episodes[e][0] == group]
        out.append(by_episode + relative(value, same))
    return out


def remax(reward, greedy, logps, refs, gamma=0.99, kl=0.05, clip=5.0):
    """The authors' trainer: from the last token back, the clipped gain is discounted
    before it is used.
    """
    gain, out = max(-clip, min(clip, reward - greedy)), []
    for lp, ref in zip(reversed(logps), reversed(refs), strict=True):
        gain *= gamma
        out.insert(0, gain - kl * (lp - ref))
    return out


def d3s(advantages, count):
    """arXiv:2509.22115: the greatest variance of all subsets of that size, by trying
    every one of them.
    """
    from itertools import combinations

    def variance(subset):
        xs = [advantages[i] for i in subset]
        return sum((x - mean(xs)) ** 2 for x in xs)

    return max(
        variance(s) for s in combinations(range(len(advantages)), min(count, len(advantages)))
    ), variance


def trust_grpo(outcome, thinking, step, total, alpha=0.3):
    """arXiv:2505.17018, eq. 1 to 5."""
    good = [t for o, t in zip(outcome, thinking, strict=True) if o >= 0.5]
    bad = [t for o, t in zip(outcome, thinking, strict=True) if o < 0.5]
    gamma = 1.0
    if good and bad and mean(good) < mean(bad):
        gamma = exp(mean(good) - mean(bad))
    return [
        o + gamma * alpha * exp(-step / total) * t for o, t in zip(outcome, thinking, strict=True)
    ]


def grpo_lead_length(correct, lengths, alpha=0.05, limit=4000):
    """The authors' ``get_reweight_rewards`` on rewards of 1 and -1: the mean of the
    three shortest of the group, inf where there are fewer.
    """
    rewards = [1.0 if c else -1.0 for c in correct]
    if sum((sorted(lengths) + [inf] * 3)[:3]) / 3 <= limit:
        return rewards
    right = [n for n, c in zip(lengths, correct, strict=True) if c]
    s = std(right) if len(right) > 1 else 1.0
    return [
        exp(-alpha * (n - mean(right)) / (s + 1e-6)) if c else -1.0
        for n, c in zip(lengths, correct, strict=True)
    ]


def grpo_lambda_length(groups, alpha, fraction=0.2, epsilon=1e-4):
    """arXiv:2505.18086. ``groups``: lists of (correct, length)."""
    share = [mean([float(c) for c, _ in g]) for g in groups]
    best = sorted(range(len(groups)), key=lambda k: (-share[k], k))[
        : max(1, ceil(fraction * len(groups)))
    ]
    out = []
    for k, g in enumerate(groups):
        right = [n for c, n in g if c]
        for c, n in g:
            if not c:
                out.append(0.0)
            elif k not in best:
                out.append(1.0)
            else:
                s = std(right) if len(right) > 1 else 0.0
                out.append(1 - alpha / (1 + exp(-(n - mean(right)) / (s + epsilon))))
    return out


def log_sigmoid(x):
    return -log(1 + exp(-x))
