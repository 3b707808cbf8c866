"""Rows with one very likely token and their exact log-probs, which every backend must
keep.

In such a row the fp32 sum of exponentials is exactly 1 from a margin of 16.6 nats on,
so that ``torch.log_softmax`` gives a log-prob and a gradient of exactly 0. The package
keeps both. Its bound is :data:`TOLERANCE`, relative, for margins up to 80 nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reweight_ops._core.backends.base import DIVERGENCE_STATS, DivergenceInputs, SoftmaxParams

#: Largest relative error of the target's log-prob, and of ``1 - p``, which is the size
#: of its gradient.
TOLERANCE = 0.01

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
    """Logits of p and of q ``[N, V]``, and the values of a divergence table by name."""

    logits: Tensor
    other: Tensor
    truth: dict[str, Tensor]


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

    def parts(t: Tensor) -> tuple[Tensor, Tensor]:
        x = t.double()
        top, at = x.max(1, keepdim=True)
        return x - top, torch.log1p((x - top).exp().scatter(1, at, 0.0).sum(1, keepdim=True))

    (below_p, total_p), (below_q, total_q) = parts(logits), parts(other)
    log_p, log_q = below_p - total_p, below_q - total_q
    # The largest column's difference of logs would round to 0 as a difference of both.
    d = (below_p - below_q) - (total_p - total_q)
    truth = {
        "forward_kl": -(log_q.exp() * d).sum(1),
        "reverse_kl": (log_p.exp() * d).sum(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "other_entropy": -(log_q.exp() * log_q).sum(1),
    }
    return SurePairs(logits, other, truth)


def assert_divergences_kept(primitives: object, pairs: SurePairs) -> None:
    """Assert the tolerance for both directions of KL and both entropies."""
    n, vocab = pairs.logits.shape
    one, softmax = torch.ones(1), SoftmaxParams(vocab)
    ids = torch.zeros(n, dtype=torch.int64)
    two = DivergenceInputs(pairs.logits, pairs.other, ids, one, one, softmax, softmax)
    table = dict(zip(DIVERGENCE_STATS, primitives.divergence_stats(two), strict=True))
    for name, truth in pairs.truth.items():
        assert (truth > 0).all()
        error = worst(table[name], truth)
        assert error <= TOLERANCE, f"{name}: {error:.3g} relative"


def worst(got: Tensor, truth: Tensor) -> float:
    """The largest relative error; NaN counts as infinite."""
    error = (got.double().cpu() - truth).abs() / truth.abs()
    return float(torch.where(error.isnan(), torch.inf, error).max())
