"""Rows for the search of the likeliest ids, what a stable sort says of them, and the
checks of every backend that finds them beside the statistics.

The checks take a backend, or the primitives of one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reweight_ops._core.backends.base import STATS, SoftmaxParams
from reweight_ops._core.backends.picked import top_ids


def sorted_ids(z: Tensor, k: int) -> Tensor:
    """Ids, that of the largest logit first. NaN comes before all. Of equal logits the
    lowest id comes first.
    """
    order = torch.where(z.isnan(), 2, 1).long() * 2
    by_value = (
        z.double()
        .nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    return by_value.gather(
        -1, order.gather(-1, by_value).sort(dim=-1, descending=True, stable=True).indices
    )[:, :k]


def adversarial(v: int, dtype: torch.dtype) -> Tensor:
    """Rows in which every column is a candidate, all are equal, equal ones are in
    different blocks, and worse.
    """
    g = torch.Generator().manual_seed(v)
    plain = torch.randn(v, generator=g)
    climb = torch.arange(v) / v * 8 - 4
    ties = torch.randint(3, (v,), generator=g).float()
    late, early = torch.full((v,), -math.inf), torch.zeros(v)
    late[v // 2 :] = plain[v // 2 :]
    early[: v // 3], early[v // 3 :] = 2.0, -math.inf
    nans, infs, low = plain.clone(), plain.clone(), plain - 1e4
    nans[[v // 3, v - 1]], infs[[v // 2, v - 1]] = math.nan, math.inf
    every = [
        plain,
        climb,
        -climb,
        torch.zeros(v),
        ties,
        -ties,
        late,
        early,
        torch.full((v,), -math.inf),
        nans,
        infs,
        low,
    ]
    every += [
        torch.full((v,), math.nan),
        torch.where(torch.arange(v) % 2 == 0, 0.0, -0.0),
        torch.where(torch.arange(v) == v - 1, 50.0, plain),
        torch.where(torch.arange(v) % 3 == 0, -plain.abs(), math.nan),
    ]
    return torch.stack(every).to(dtype)


def search(
    primitives: Any,
    z: Tensor,
    k: int,
    softcap: float = math.inf,
    ids: Tensor | None = None,
    temperature: float = 1.0,
    start: int = 0,
    total: int = 0,
    vocab_size: int = 0,
    stats: tuple[str, ...] = ("logp", "lse", "entropy"),
) -> Tensor:
    """The ids of a call. Its statistics are bit for bit those of a call without the
    search.
    """
    n = z.numel() // z.size(-1)
    ids = torch.zeros(n, dtype=torch.int64) if ids is None else ids
    softmax = SoftmaxParams(vocab_size or z.size(-1), softcap, start, total)
    heat = torch.tensor([temperature])
    table, found = primitives.top_stats(z, ids, heat, softmax, stats, k)
    want = primitives.token_stats(z, ids, heat, softmax, stats)
    assert torch.equal(table.isnan(), want.isnan())
    assert torch.equal(
        table.view(torch.int32)[~want.isnan()], want.view(torch.int32)[~want.isnan()]
    )
    return found


def check_adversarial(
    primitives: Any, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...], **options: Any
) -> None:
    """Check the ids of adversarial rows, for every ``(columns, ids)``."""
    for v, k in sizes:
        z = adversarial(v, dtype)
        assert torch.equal(search(primitives, z, k, **options), sorted_ids(z, k)), (v, k)


def check_as_torch(primitives: Any, dtype: torch.dtype, v: int, k: int) -> None:
    """Check rows without ties, whose order is unique. Their ids are those of
    :func:`top_ids`. Ignored rows and shards are included.
    """
    g = torch.Generator().manual_seed(3)
    steps = torch.stack([torch.randperm(v, generator=g) for _ in range(8)])
    # distinct positive 16-bit numbers
    z = steps.float() * 1e-3 if dtype == torch.float32 else steps.to(torch.int16).view(dtype)
    ids = torch.tensor([0, -100, 5, 1000 + v, 3, 2, 1000, 7])
    softmax = SoftmaxParams(v, math.inf, 1000, 2000 + v)
    found = search(primitives, z, k, ids=ids, temperature=0.7, start=1000, total=2000 + v)
    assert torch.equal(found, top_ids(z, ids, k, softmax)) and (found[1] == -100).all()


def check_layouts(primitives: Any, dtype: torch.dtype, v: int, k: int) -> None:
    """Check rows with padding, with strides, and at any address. The columns after the
    vocabulary hold larger numbers.
    """
    g = torch.Generator().manual_seed(4)
    wide = torch.randn(3, 4, v + 40, generator=g).to(dtype)
    wide[..., v + 9 :] = 100.0
    for shift in (0, 1, 3):
        z = wide[:, ::2, shift : shift + v + 20]
        want = sorted_ids(z[..., :v].flatten(0, 1), k)
        assert torch.equal(search(primitives, z, k, vocab_size=v), want), shift


def check_bad_ids(primitives: Any) -> None:
    """Check a row whose id is no token. It has no statistics, but the ids of
    torch.topk.
    """
    z = torch.randn(3, 300, generator=torch.Generator().manual_seed(5))
    found = search(primitives, z, 3, ids=torch.tensor([300, -1, 0]), stats=STATS)
    assert torch.equal(found, sorted_ids(z, 3))
