"""Rows with one very likely token and their exact log-probs, which every backend must
keep.

In such a row the fp32 sum of exponentials is exactly 1 from a margin of 16.6 nats on,
so that ``torch.log_softmax`` gives a log-prob and a gradient of exactly 0. The package
keeps both. Its bound is :data:`TOLERANCE`, relative, for margins up to 80 nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reweight_ops._core.backends.base import DIVERGENCE_STATS, DivergenceInputs, SoftmaxParams

#: Largest relative error of the target's log-prob, and of ``1 - p``, which is the size
#: of its gradient.
TOLERANCE = 0.01

#: Absolute error where p and q, or KL and a log-ratio, cancel: two exponentials of
#: 2^-22 each, and four roundings.
CANCELLED = 2**-21 + 2**-22

#: Nats between the likeliest token and the runner-up.
MARGINS = (0.5, 5.0, 12.0, 15.0, 16.0, 16.6, 17.0, 20.0, 30.0, 50.0, 79.0)


class SureRows(NamedTuple):
    """``logits [N, V]``, the likeliest token of each row as its id ``[N]``, and
    ``logp``, ``one_minus_p`` in fp64.
    """

    logits: Tensor
    ids: Tensor
    logp: Tensor
    one_minus_p: Tensor


def sure_rows(
    vocab: int, dtype: torch.dtype = torch.float32, offset: float = 0.0, seed: int = 0
) -> SureRows:
    """One row for each margin and place of the runner-up: next to the target, far from
    it, first, last, and as one of many equals.
    """
    g = torch.Generator().manual_seed(seed)
    rows, ids = [], []
    for margin in MARGINS:
        for place in ("next", "before", "first", "last", "anywhere", "everywhere"):
            target = int(torch.randint(1, vocab - 1, (), generator=g))
            # All others are far below the runner-up, unless all of them are runners-up.
            row = torch.full(
                (vocab,), -margin if place == "everywhere" else -margin - 40.0, dtype=torch.float64
            )
            runner_up = {
                "next": target + 1,
                "before": target - 1,
                "first": 0,
                "last": vocab - 1,
                "anywhere": (target + 1 + int(torch.randint(0, vocab - 1, (), generator=g)))
                % vocab,
            }
            if place in runner_up:
                row[runner_up[place]] = -margin
            row[target] = 0.0
            rows.append(row + offset)
            ids.append(target)
    logits = torch.stack(rows).to(dtype)
    return SureRows(logits, torch.tensor(ids), *exact(logits, torch.tensor(ids)))


def exact(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``log p`` and ``1 - p`` of ids that are the likeliest token of their row, in
    fp64; neither is a difference.
    """
    x = logits.double()
    top = x.gather(-1, ids[:, None])
    assert bool((x <= top).all()), "an id is not the likeliest token of its row"
    rest = (x - top).exp().scatter(-1, ids[:, None], 0.0).sum(-1)
    return -torch.log1p(rest), rest / (1 + rest)


class SurePairs(NamedTuple):
    """Logits of p and of q ``[N, V]``, and in fp64 the values of a divergence table by
    name, both log-probs, and ``log p - log q``.

    Temperatures and soft caps are those of p and of q.
    """

    logits: Tensor
    other: Tensor
    truth: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    temperatures: tuple[float, float] = (1.0, 1.0)
    caps: tuple[float, float] = (math.inf, math.inf)

    def some(self, step: int) -> SurePairs:
        """Every ``step``-th row."""
        return pairs_of(self.logits[::step], self.other[::step], *self[-2:])


def sure_pairs(vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> SurePairs:
    """In p, the rows of :func:`sure_rows` whose ``1 - p`` is below 1e-5.

    They stand next to four kinds of q: the other tokens are likelier, or less likely, q
    is half as sure, or sure of another token.
    """
    rows = sure_rows(vocab, dtype, seed=seed)
    sure = rows.one_minus_p < 1e-5
    z, ids = rows.logits[sure], rows.ids[sure]
    likelier, rarer = ((z + d).scatter(1, ids[:, None], 0.0) for d in (1, -3))
    logits, other = z.repeat(4, 1), torch.cat([likelier, rarer, z / 2, z.roll(1, 1)])

    return pairs_of(logits, other)


def close_pairs(vocab: int) -> SurePairs:
    """In p, the sure rows of :func:`sure_pairs` in fp32. In q, every other token is
    likelier by 2^-8, so that KL is a small difference.
    """
    rows = sure_rows(vocab)
    sure = rows.one_minus_p < 1e-5
    logits = rows.logits[sure]
    return pairs_of(logits, (logits + 2**-8).scatter(1, rows.ids[sure, None], 0.0))


#: Soft caps of p and of q for :func:`transformed_pairs`.
CAPS = ((math.inf, math.inf), (100.0, 150.0))


def transformed_pairs(vocab: int, dtype: torch.dtype, caps: tuple[float, float]) -> SurePairs:
    """The rows of :func:`sure_pairs` with two temperatures and two soft caps. No
    likeliest logit is 0, where a soft cap changes nothing.
    """
    pairs = sure_pairs(vocab, dtype)
    return pairs_of(pairs.logits + 20, pairs.other + 30, (1.5, 1.25), caps)


def pairs_of(
    logits: Tensor,
    other: Tensor,
    temperatures: tuple[float, float] = (1.0, 1.0),
    caps: tuple[float, float] = (math.inf, math.inf),
) -> SurePairs:
    def parts(t: Tensor, temperature: float, cap: float) -> tuple[Tensor, Tensor]:
        x = t.double()
        x = (x if math.isinf(cap) else cap * torch.tanh(x / cap)) / temperature
        top, at = x.max(1, keepdim=True)
        return x - top, torch.log1p((x - top).exp().scatter(1, at, 0.0).sum(1, keepdim=True))

    (below_p, total_p), (below_q, total_q) = map(parts, (logits, other), temperatures, caps)
    log_p, log_q = below_p - total_p, below_q - total_q
    # The largest column's difference of logs would round to 0 as a difference of both.
    d = (below_p - below_q) - (total_p - total_q)
    truth = {
        "forward_kl": -(log_q.exp() * d).sum(1),
        "reverse_kl": (log_p.exp() * d).sum(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "other_entropy": -(log_q.exp() * log_q).sum(1),
    }
    return SurePairs(logits, other, truth, log_p, log_q, d, temperatures, caps)


def divergence_inputs(pairs: SurePairs) -> DivergenceInputs:
    n, vocab = pairs.logits.shape
    ids = torch.zeros(n, dtype=torch.int64)
    temperatures = (torch.tensor([t]) for t in pairs.temperatures)
    softmaxes = (SoftmaxParams(vocab, cap) for cap in pairs.caps)
    return DivergenceInputs(pairs.logits, pairs.other, ids, *temperatures, *softmaxes)


def assert_divergences_kept(primitives: object, pairs: SurePairs) -> None:
    """Assert the tolerance for both directions of KL and both entropies."""
    two = divergence_inputs(pairs)
    table = dict(zip(DIVERGENCE_STATS, primitives.divergence_stats(two), strict=True))
    for name, truth in pairs.truth.items():
        assert (truth > 0).all()
        error = worst(table[name], truth)
        assert error <= TOLERANCE, f"{name}: {error:.3g} relative"


def assert_close_divergences_bounded(primitives: object, pairs: SurePairs) -> None:
    """Assert KL to 1e-5 of the mass of all tokens but the likeliest."""
    two = divergence_inputs(pairs)
    table = dict(zip(DIVERGENCE_STATS, primitives.divergence_stats(two), strict=True))
    p, q = pairs.log_p.exp(), pairs.log_q.exp()
    mass = (p + q).scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)
    for name in ("forward_kl", "reverse_kl"):
        assert ((table[name].double() - pairs.truth[name]).abs() <= 1e-5 * mass).all(), name


def assert_divergence_gradients_bounded(primitives: object, pairs: SurePairs) -> None:
    """Assert each gradient: relative to a column's terms, and in the columns of the
    likeliest tokens absolutely, where terms cancel.
    """
    two, (_, _, _, log_p, log_q, d, *_) = divergence_inputs(pairs), pairs
    p, q = log_p.exp(), log_q.exp()
    kl, entropy = pairs.truth["reverse_kl"][:, None], pairs.truth["entropy"][:, None]
    likeliest = torch.zeros_like(p).scatter(1, p.argmax(1, keepdim=True), 1.0)
    likeliest = likeliest.scatter(1, q.argmax(1, keepdim=True), 1.0) > 0
    info = torch.finfo(two.logits.dtype)
    exact = {
        "forward_kl": (p - q, p + q, 1.0, 1.0),
        "reverse_kl": (p * (d - kl), p * (d.abs() + kl), d.abs() + kl, 1 + kl),
        "entropy": (-p * (log_p + entropy), p * (entropy - log_p), entropy - log_p, 1.0),
    }
    for k, (name, (truth, terms, factor, size)) in enumerate(exact.items()):
        got = torch.empty_like(two.logits)
        constants = torch.eye(3)[k]
        primitives.divergence_loss_grad(two, constants, torch.ones(len(p)), got)
        bound = torch.where(likeliest, CANCELLED * size, TOLERANCE * terms)
        # exponentials below the smallest normal number are 0
        rounding = info.eps / 2 * truth.abs() + info.smallest_normal * (1 + factor)
        excess = (got.double() - truth).abs() / (bound + rounding)
        assert excess.max() <= 1, f"gradient of {name}: {float(excess.max()):.3g} of the bound"


def worst(got: Tensor, truth: Tensor) -> float:
    """The largest relative error; NaN counts as infinite."""
    error = (got.double().cpu() - truth).abs() / truth.abs()
    return float(torch.where(error.isnan(), torch.inf, error).max())
