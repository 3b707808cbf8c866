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


def worst(got: Tensor, truth: Tensor) -> float:
    """The largest relative error; NaN counts as infinite."""
    error = (got.double().cpu() - truth).abs() / truth.abs()
    return float(torch.where(error.isnan(), torch.inf, error).max())
