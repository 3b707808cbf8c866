"""The papers' objectives, sequence by sequence as their equations are written, negated
to losses.

``logp, old, ref, H``: ``[B,T]``; ``A``: ``[B]`` or ``[B,T]``; ``mask``: ``[B,T]``. A
sequence ``o_i`` is the valid tokens of row i; ``G`` counts the rows (none of them
empty). ``r = pi/pi_old``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def sequences(mask: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The valid tokens of each row, of every tensor; ``[B]`` and ``[B,1]`` are repeated
    over the tokens.
    """
    full = [(x[:, None] if x.dim() == 1 else x).expand(mask.shape) for x in tensors]
    return [tuple(x[i][mask[i] != 0] for x in full) for i in range(mask.shape[0])]


def clipped_objective(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(r * A, r.clip(1 - low, 1 + high) * A)


def ppo_clip(logp, old, A, mask, epsilon=0.2) -> Tensor:
    """Schulman et al., arXiv:1707.06347, eq. 7: the mean over all timesteps."""
    return -torch.cat(
        [
            clipped_objective((lp - o).exp(), a, epsilon, epsilon)
            for lp, o, a in sequences(mask, logp, old, A)
        ]
    ).mean()


def grpo(logp, old, ref, A, mask, epsilon=0.2, beta=0.04) -> Tensor:
    """DeepSeekMath, arXiv:2402.03300, eq. 3 with the KL of eq. 4:
    ``1/G sum_i 1/|o_i| sum_t {min(..) - beta KL}``.
    """
    terms = [
        (clipped_objective((lp - o).exp(), a, epsilon, epsilon) - beta * k3(lp, rf)).mean()
        for lp, o, rf, a in sequences(mask, logp, old, ref, A)
    ]
    return -torch.stack(terms).mean()


def dapo(logp, old, A, mask, epsilon_low=0.2, epsilon_high=0.28) -> Tensor:
    """arXiv:2503.14476, eq. 8: ``1/sum_i|o_i| sum_i sum_t min(..)``, two
    clip bounds."""
    terms = [
        clipped_objective((lp - o).exp(), a, epsilon_low, epsilon_high)
        for lp, o, a in sequences(mask, logp, old, A)
    ]
    return -sum(t.sum() for t in terms) / sum(len(t) for t in terms)


def dr_grpo(logp, old, A, mask, epsilon=0.2, horizon: int = 1) -> Tensor:
    """arXiv:2503.20783, fig. 1: ``1/G sum_i sum_t min(..)``; the authors' code divides
    by a constant ``horizon``.
    """
    terms = [
        clipped_objective((lp - o).exp(), a, epsilon, epsilon).sum()
        for lp, o, a in sequences(mask, logp, old, A)
    ]
    return -torch.stack(terms).mean() / horizon


def gspo(logp, old, A, mask, epsilon_low=3e-4, epsilon_high=4e-4) -> Tensor:
    """arXiv:2507.18071, eq. 5 and 7: ``1/G sum_i min(s_i A_i, clip(s_i) A_i)``,
    ``s_i = exp(1/|y_i| sum_t log r)``; A is ``[B]``.
    """
    terms = [
        clipped_objective((lp - o).mean().exp(), a[0], epsilon_low, epsilon_high)
        for lp, o, a in sequences(mask, logp, old, A)
    ]
    return -torch.stack(terms).mean()


def gspo_token(logp, old, A, mask, epsilon_low=3e-4, epsilon_high=4e-4) -> Tensor:
    """arXiv:2507.18071, eq. 13-14: ``s_it = sg[s_i] pi_t/sg[pi_t]``, a mean over
    tokens, then over sequences.
    """
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        s = (lp - o).mean().exp().detach() * (lp - lp.detach()).exp()
        terms.append(clipped_objective(s, a, epsilon_low, epsilon_high).mean())
    return -torch.stack(terms).mean()


def cispo(logp, old, A, mask, epsilon_low=1.0, epsilon_high=4.0) -> Tensor:
    """MiniMax-M1, arXiv:2506.13585, eq. 4-5:
    ``1/sum|o_i| sum sg(clip(r, 1-epsilon_low, 1+epsilon_high)) A log pi``.
    """
    terms = [
        (lp - o).exp().clip(1 - epsilon_low, 1 + epsilon_high).detach() * a * lp
        for lp, o, a in sequences(mask, logp, old, A)
    ]
    return -sum(t.sum() for t in terms) / sum(len(t) for t in terms)


def sapo(logp, old, A, mask, tau_pos=1.0, tau_neg=1.05) -> Tensor:
    """arXiv:2511.20347, eq. 5-6: ``1/G sum_i 1/|y_i| sum_t f(r) A``,
    ``f(x) = sigmoid(tau(x-1)) 4/tau``.
    """
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        tau = torch.full_like(a, tau_neg).masked_fill(a > 0, tau_pos)
        terms.append((torch.sigmoid(tau * ((lp - o).exp() - 1)) * 4 / tau * a).mean())
    return -torch.stack(terms).mean()


def gpg(logp, A, mask) -> Tensor:
    """arXiv:2504.02546, eq. 6: ``1/sum|o_i| sum -log pi A``."""
    terms = [lp * a for lp, a in sequences(mask, logp, A)]
    return -sum(t.sum() for t in terms) / sum(len(t) for t in terms)


def advantage_reweighting(
    loss: Callable[[Tensor], Tensor], A: Tensor, old: Tensor, alpha: float = 0.3
) -> Tensor:
    """AR, arXiv:2505.12929, eq. 8: the base ``loss`` of the advantages
    ``[alpha pi_old + (1 - alpha)] A``, one per token.
    """
    return loss((alpha * old.exp() + (1 - alpha)) * (A[:, None] if A.dim() == 1 else A))


def lopti(terms: Tensor, old: Tensor, mask: Tensor, eta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Lopti, arXiv:2505.12929, section 4.2: the losses of the two updates, first
    ``pi_old < eta``, then the rest.

    ``terms [B,T]``: all of a token's loss (surrogate, KL, entropy). Both divide by the
    count of *all* valid tokens, as the authors' code.
    """
    return _halves(terms, old.exp() < eta, mask)


def lopti_by_portion(
    terms: Tensor, old: Tensor, mask: Tensor, portion: float
) -> tuple[Tensor, Tensor]:
    """The authors' ``seperate_portion``: the threshold is that quantile of the valid
    tokens' probabilities.
    """
    p = old.exp()
    return _halves(terms, p < torch.quantile(p[mask != 0], portion), mask)


def _halves(terms: Tensor, first: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    low = first.to(terms.dtype)
    valid = mask.to(terms.dtype)
    return (terms * low * valid).sum() / valid.sum(), (
        terms * (1 - low) * valid
    ).sum() / valid.sum()


def entropy(logits: Tensor) -> Tensor:
    """``H = -sum_v p_v log p_v``."""
    p = torch.softmax(logits, -1)
    return -torch.xlogy(p, p).sum(-1)


def entropy_grad(logits: Tensor) -> Tensor:
    """``dH/dz_v = -p_v (log p_v + H)``, with ``0 log 0 = 0``."""
    p = torch.softmax(logits, -1)
    return -(torch.xlogy(p, p) + p * entropy(logits)[..., None])


def logp_grad(logits: Tensor, ids: Tensor) -> Tensor:
    """``d log p_y / dz_v = 1[v=y] - p_v``."""
    return torch.nn.functional.one_hot(ids, logits.shape[-1]) - torch.softmax(logits, -1)


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """Schulman 2020, "Approximating KL divergence", of KL(pi||ref) with
    ``u = pi_ref/pi``: ``-log u``.
    """
    return -(ref - logp)


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """``(log u)^2 / 2``."""
    return (ref - logp) ** 2 / 2


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """``(u - 1) - log u``."""
    return (ref - logp).exp() - 1 - (ref - logp)


# --- losses that couple the tokens of a sequence, or the sequences of a prompt --------
def gmpo(logp, old, A, mask, epsilon_low=0.4, epsilon_high=0.4) -> Tensor:
    """arXiv:2507.20673: ``1/G sum_i {prod_t min(r^s, clip(r, e^-low,
    e^high)^s)^s}^(1/|o_i|) A_i``, ``s`` the sign of A_i.
    """
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        product = torch.ones((), dtype=lp.dtype)
        for x in (lp - o).exp():
            bounded = x.clip(math.exp(-epsilon_low), math.exp(epsilon_high))
            product = product * (
                torch.minimum(x, bounded) if a[0] > 0 else torch.maximum(x, bounded)
            )
        terms.append(product ** (1 / len(lp)) * a[0])
    return -torch.stack(terms).mean()


def vespo(logp, old, A, mask, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0) -> Tensor:
    """arXiv:2602.10693 as in TRL: ``-phi(W) A log pi`` over all tokens,
    ``phi(W) = e^lambda W^k e^(-lambda W)`` without a gradient.
    """
    total = torch.zeros((), dtype=logp.dtype)
    for lp, o, a in sequences(mask, logp, old, A):
        W = (lp - o).exp().prod().detach()
        k, rate = (k_pos, lambda_pos) if a[0] >= 0 else (k_neg, lambda_neg)
        total = total - (math.exp(rate) * W**k * torch.exp(-rate * W) * a * lp).sum()
    return total / mask.sum()


def opsm(logp, old, A, mask, threshold, epsilon=0.2) -> Tensor:
    """DeepSeek-V3.2, arXiv:2512.02556, eq. 9 on GRPO: M_i = 0 iff A_i < 0 and the mean
    of ``log(pi_old/pi)`` is above the threshold.
    """
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        dropped = a[0] < 0 and (o - lp).mean() > threshold
        terms.append(
            clipped_objective((lp - o).exp(), a, epsilon, epsilon).mean()
            * (0.0 if dropped else 1.0)
        )
    return -torch.stack(terms).mean()


def disco(scores, rewards, groups, tau, weights=None) -> Tensor:
    """DisCO, arXiv:2505.12366, and DRPO, arXiv:2510.04474: minus the mean over
    questions, given each response's score (and weight).
    """
    total, questions = torch.zeros((), dtype=scores.dtype), sorted(set(groups))
    for q in questions:
        positive = [i for i, g in enumerate(groups) if g == q and rewards[i] > 0]
        negative = [i for i, g in enumerate(groups) if g == q and rewards[i] <= 0]
        if positive and negative:
            w = [1.0 if weights is None else weights[i] for i in positive]
            gain = sum(x * scores[i] for x, i in zip(w, positive, strict=True)) / sum(w)
            s = torch.stack([scores[j] for j in negative])
            loss = s.mean() if math.isinf(tau) else tau * torch.log(torch.exp(s / tau).mean())
            total = total + gain - loss
    return -total / len(questions)


def kl_constraint(kl: Tensor, strength: float, bound: float) -> Tensor:
    """Of DisCO's and DRPO's code: ``sg(max(beta (KL - delta), 0)) KL``."""
    return (strength * (kl - bound)).clamp(min=0).detach() * kl


def npo(logp, ref, mask, beta=0.1) -> Tensor:
    """arXiv:2404.05868: ``-2/beta E[log sigmoid(-beta log(pi/pi_ref))]``."""
    terms = [
        -2 / beta * torch.log(torch.sigmoid(-beta * (lp.sum() - rf.sum())))
        for lp, rf in sequences(mask, logp, ref)
    ]
    return torch.stack(terms).mean()


def wagle_npo(logp, ref, mask, beta=0.1) -> Tensor:
    """``src/unlearn/GA.py`` of arXiv:2410.17509:
    ``-2/beta log sigmoid(beta (NLL - NLL_ref))`` with the batch's token means.
    """
    chosen = mask != 0
    return -2 / beta * torch.log(torch.sigmoid(beta * (ref[chosen].mean() - logp[chosen].mean())))


def decoupled_ppo(logp, prox, behave, A, mask, epsilon=0.2, cap=math.inf, masked=False) -> Tensor:
    """arXiv:2505.24298: ``E[pi_prox/pi_behave min(u A, clip(u) A)]``,
    ``u = pi/pi_prox``; its code drops tokens whose weight is over the cap.
    """
    terms = []
    for lp, x, b, a in sequences(mask, logp, prox, behave, A):
        w = (x - b).exp()
        w = torch.where(w > cap, 0.0, w) if masked else w.clip(max=cap)
        terms.append(w * clipped_objective((lp - x).exp(), a, epsilon, epsilon))
    return -torch.cat(terms).mean()


def topr(logp, old, A, mask) -> Tensor:
    """arXiv:2503.14286, eq. 8: ``sum over A >= 0 of A grad log pi + sum over A < 0 of
    clip(pi/mu, 0, 1) A grad log pi``, of whole responses.
    """
    terms = []
    for lp, o, a in sequences(mask, logp, old, A):
        w = 1.0 if a[0] >= 0 else min((lp - o).sum().exp().item(), 1.0)
        terms.append(-w * a[0] * lp.sum())
    return torch.stack(terms).mean()


def kimi_opmd(logp, old, A, mask, tau) -> Tensor:
    """arXiv:2501.12599, eq. 3: the loss whose gradient is
    ``-(r - mean) grad log pi + tau/2 grad (log pi/pi_old)^2``, of whole responses.
    """
    terms = [
        -a[0] * lp.sum() + tau / 2 * (lp - o).sum() ** 2
        for lp, o, a in sequences(mask, logp, old, A)
    ]
    return torch.stack(terms).mean()


def comp_sum(logits: Tensor, ids: Tensor, mask: Tensor, tau: float) -> Tensor:
    """arXiv:2304.07288: ``Phi_tau(sum_{v != y} exp(z_v - z_y))``,
    ``Phi_tau(u) = ((1+u)^(1-tau) - 1)/(1-tau)``, ``log(1+u)`` at 1; mean.
    """
    u = torch.exp(logits - logits.gather(-1, ids[..., None])).sum(-1) - 1
    phi = torch.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
    return phi[mask].mean()


def ldam(logits: Tensor, ids: Tensor, mask: Tensor, margin) -> Tensor:
    """arXiv:1906.07413: cross-entropy of logits whose target is lower by its margin."""
    shifted = logits - margin * torch.nn.functional.one_hot(ids, logits.shape[-1]).to(logits)
    return torch.nn.functional.cross_entropy(shifted[mask], ids[mask])


def ldr(logits: Tensor, ids: Tensor, mask: Tensor, margin: float) -> Tensor:
    """arXiv:2112.14869 at lambda = 1: ``log(1/V sum_k exp(c 1[k != y] + f_k - f_y))``,
    mean.
    """
    target = torch.nn.functional.one_hot(ids, logits.shape[-1]).to(logits)
    gaps = margin * (1 - target) + logits - logits.gather(-1, ids[..., None])
    return torch.log(torch.exp(gaps).mean(-1))[mask].mean()
