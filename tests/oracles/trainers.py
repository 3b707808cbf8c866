"""What trainers and authors' repositories compute, sequence by sequence in their order;
fp64 tensors ``[B, T]``, ``A`` ``[B]`` or ``[B, T]``.

Sources, read at their stored commits: Infini-AI-Lab/M2PO, horizon-llm/CTPO, AReaL,
prime-rl, ms-swift, SkyRL, Skywork-OR1, RUCAIBox/Passk_Training, TRL 1.16, OpenRLHF
0.11.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .papers import clipped_objective, sequences


def m2po_bounds(
    logp: Tensor, old: Tensor, A: Tensor, mask: Tensor, budget=0.04, least_low=0.3, least_high=0.5
) -> tuple[float, float]:
    """``kpo_clip_harmful_tokens`` and ``_solve_tau_from_sorted_delta2``:
    ``(epsilon_low, epsilon_high)``.
    """
    squares = []
    for lp, o, a in sequences(mask, logp, old, A):
        for x, y, z in zip(lp.tolist(), o.tolist(), a.tolist(), strict=True):
            if (z > 0 and x > y) or (z < 0 and x < y):
                squares.append((x - y) ** 2)
    squares.sort()
    n = len(squares)
    if not squares or sum(squares) / n <= budget:
        return 1.0, math.inf
    tau = math.inf
    for k in range(n):
        if squares[k] * (n - k - 1) + sum(squares[: k + 1]) >= budget * n:
            tau = 0.0 if k == 0 else math.sqrt(squares[k - 1])
            break
    return max(1 - math.exp(-tau), least_low), max(math.exp(tau) - 1, least_high)


def m2_mask(drift: list[float], threshold: float) -> list[float]:
    """AReaL's ``_get_m2po_loss_mask``: the largest squares are masked until the mean of
    the rest is below the threshold; one is left.
    """
    order = sorted(range(len(drift)), key=lambda i: -(drift[i] ** 2))
    keep = [1.0] * len(drift)
    for i in order[:-1]:
        rest = [drift[j] ** 2 for j in range(len(drift)) if keep[j]]
        if sum(rest) / len(rest) < threshold:
            break
        keep[i] = 0.0
    return keep


def ctpo(logp, old, A, mask, low=0.025, high=0.05, c=0.05, power=0.5) -> Tensor:
    """``_compute_policy_loss_cum_token_la_impl`` with ``cumprod``, token mean."""
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        total = 0.0
        for n, (x, y, z) in enumerate(zip(lp, o, a, strict=True), 1):
            total = total + (x - y).clamp(-20, 20).item()
            log_ratio = (total + x - x.detach()).clamp(max=10.0)
            scale = n**power
            losses = -z * log_ratio.exp(), -z * log_ratio.clamp(-low * scale, high * scale).exp()
            loss = torch.maximum(*losses)
            terms.append(torch.minimum(loss, -z * math.exp(c * scale)) if z < 0 else loss)
    return torch.stack(terms).mean()


def prime_rl(logp, old, A, mask, kind, low=0.2, high=0.2, kl_tau=1e-3) -> Tensor:
    """``default_loss_fn`` and ``ipo_loss_fn``, over the count of tokens."""
    total = torch.zeros((), dtype=logp.dtype)
    for lp, o, a in sequences(mask, logp, old, A):
        drift = lp.exp() - o.exp()
        dropped = (
            drift.abs() > high if kind == "ipo" else torch.where(a > 0, drift > high, drift < -low)
        )
        total = total + (-(~dropped).double() * a * (lp - o).exp() + kl_tau * (lp - o) ** 2).sum()
    return total / mask.sum()


def fipo(logp, old, A, mask, half_life=32.0, clip_range=0.2, safety=4.0, delta=math.inf) -> Tensor:
    """``_compute_fipo_influence`` and the clipped loss, over the count of tokens."""
    gamma, terms = 2 ** (-1 / half_life), []
    for lp, o, a in sequences(mask, logp, old, A):
        moved = (lp - o).detach()
        taken = torch.where(moved.exp() > delta, 0.0, moved)
        for t in range(len(lp)):
            future = sum(gamma ** (s - t) * taken[s].item() for s in range(t, len(lp)))
            weight = min(max(math.exp(future), 1.0), 1 + clip_range)
            if a[t] < 0 and moved[t].exp() > safety:
                weight = min(max(weight, 0.8), 1.0)
            terms.append(-weight * clipped_objective((lp[t] - o[t]).exp(), a[t], 0.2, 0.2))
    return torch.stack(terms).mean()


def rlsd_advantages(A, teacher, old, lam=0.5, clip=0.2, negative_only=False) -> Tensor:
    """``apply_rlsd_reweight``: ``[B, T]``."""
    base = A[:, None].expand_as(old)
    weights = torch.exp(torch.sign(base) * (teacher - old)).clamp(1 - clip, 1 + clip)
    reweight = (1 - lam) + lam * weights
    return base * (torch.where(base < 0, reweight, 1.0) if negative_only else reweight)


def sdar(logp, teacher, mask, gate_beta=5.0) -> Tensor:
    """``compute_sdar_loss``, token mean."""
    d = torch.cat([x - lp for lp, x in sequences(mask, logp, teacher)])
    return (torch.sigmoid(gate_beta * d).detach() * d).mean()


def iw_opd(logp, teacher, rollout, mask, gamma=1.0) -> Tensor:
    """TRL's ``IWOPDTrainer``, over the count of tokens."""
    total = torch.zeros((), dtype=logp.dtype)
    for lp, x, o in sequences(mask, logp, teacher, rollout):
        a = x - o
        size = a.abs()
        weights = [
            1 + gamma * (1 - size[:t].sum() / size.sum().clamp(min=1e-8)) for t in range(len(lp))
        ]
        total = total - (torch.stack(weights) * a * lp).sum()
    return total / mask.sum()


def real(scores, rewards, groups, tau=0.5) -> Tensor:
    """ms-swift's ``loss_type="real"``, given each response's mean log-ratio."""
    total, questions = torch.zeros((), dtype=scores.dtype), sorted(set(groups))
    for q in questions:
        positive = [i for i, g in enumerate(groups) if g == q and rewards[i] > 0]
        negative = [i for i, g in enumerate(groups) if g == q and rewards[i] <= 0]
        if positive and negative:
            total = total + torch.log(1 + sum((scores[j] / tau).exp() for j in negative))
            total = total + torch.log(1 + sum((-scores[i] / tau).exp() for i in positive))
    return total / len(questions)


def a2po(logp, ref, targets, mask, beta=1e-3) -> Tensor:
    """TRL's ``A2POTrainer.compute_loss``: ``targets`` ``[B]`` are ``r - V*``."""
    terms = [
        (beta * (lp.sum() - rf.sum()) - y[0]) ** 2
        for lp, rf, y in sequences(mask, logp, ref, targets)
    ]
    return torch.stack(terms).mean()


def kto(logp, ref, labels, mask, kl=0.0, beta=0.1, desirable=1.0, undesirable=1.0) -> Tensor:
    """arXiv:2402.01306, eq. 7: ``E[λ_y - v(x, y)]``, ``v`` the value of the log-ratio
    against the reference point.
    """
    terms = []
    for lp, rf, y in sequences(mask, logp, ref, labels):
        x = lp.sum() - rf.sum()
        terms.append(
            desirable - desirable * torch.sigmoid(beta * (x - kl))
            if y[0] > 0
            else undesirable - undesirable * torch.sigmoid(beta * (kl - x))
        )
    return torch.stack(terms).mean()


def scale_rl(logp, old, A, mask, groups, ratio_max=5.0) -> Tensor:
    """arXiv:2510.13786: CISPO, the mean over a prompt's tokens, then over prompts."""
    rows = sequences(mask, logp, old, A)
    means = []
    for q in sorted(set(groups)):
        tokens = [
            -(lp - o).exp().clip(max=ratio_max).detach() * a * lp
            for (lp, o, a), g in zip(rows, groups, strict=True)
            if g == q
        ]
        means.append(torch.cat(tokens).mean())
    return torch.stack(means).mean()


def vapo(logp, old, A, mask, correct, mu=0.1) -> Tensor:
    """arXiv:2504.05118: the clipped token mean plus ``mu`` times the mean NLL of the
    tokens of correct responses.
    """
    rows = sequences(mask, logp, old, A)
    policy = -torch.cat(
        [clipped_objective((lp - o).exp(), a, 0.2, 0.28) for lp, o, a in rows]
    ).mean()
    return (
        policy
        - mu
        * torch.cat([lp for (lp, _, _), right in zip(rows, correct, strict=True) if right]).mean()
    )


def openrlhf_kl(logp, ref, old, kind) -> Tensor:
    """``compute_approx_kl`` with ``unbiased_gradient``, per token."""
    log_ratio = logp - ref
    value = {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": (-log_ratio.clamp(min=-10)).exp() - 1 + log_ratio.clamp(min=-10),
    }[kind]
    surrogate = (logp - old).exp().clamp(max=10).detach() * log_ratio**2 / 2
    return value.clamp(-10, 10).detach() + surrogate - surrogate.detach()


def skyrl_maxrl(scores: list[float], index: list, epsilon=1e-6) -> list[float]:
    """``compute_maxrl_advantage``."""
    members = {i: [s for s, j in zip(scores, index, strict=True) if i == j] for i in index}
    means = {i: sum(x) / len(x) if len(x) > 1 else 0.0 for i, x in members.items()}
    return [
        (s - means[i]) / (means[i] + epsilon) if len(members[i]) > 1 else s
        for s, i in zip(scores, index, strict=True)
    ]


def passk_training(correct: list[float], index: list, k: int) -> list[float]:
    """``calc_adv``."""
    out = []
    for x, i in zip(correct, index, strict=True):
        group = [y for y, j in zip(correct, index, strict=True) if i == j]
        n, c = len(group), int(sum(group))
        rho = 1 - math.comb(n - c, k) / math.comb(n, k)
        sigma = math.sqrt(rho * (1 - rho)) + 1e-6
        out.append(
            (1 - rho) / sigma
            if x
            else (1 - rho - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma
        )
    return out


class EntController:
    """Skywork-OR1's ``EntController``."""

    def __init__(self, high, low, delta, target):
        self.value, self.high, self.low, self.delta, self.target = 0.0, high, low, delta, target

    def update(self, entropy: float) -> float:
        self.value += self.delta if entropy < self.target else -self.delta
        self.value = min(max(self.value, self.low), self.high)
        return self.value * int(entropy < self.target)
