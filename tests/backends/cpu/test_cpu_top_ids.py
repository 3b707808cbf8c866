"""The likeliest ids from the sweep of the statistics: what a stable sort of the row
says, at every instruction-set level and dtype.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import SoftmaxParams
from reweight_ops._core.backends.native import DTYPES
from reweight_ops._core.backends.picked import top_ids
from reweight_ops._core.backends.select import load

_C = pytest.importorskip("reweight_ops._C")
BLOCK = 2048  # columns of the widest level's block
STATS = ("logp", "lse", "entropy")


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


def sorted_ids(z, k):
    """Largest first, NaN before all, of equal ones the lowest."""
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


def adversarial(v, dtype):
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
    ]
    return torch.stack(every).to(dtype)


def search(z, k, softcap=math.inf, ids=None, temperature=1.0, start=0, total=0):
    ids = torch.zeros(z.size(0), dtype=torch.int64) if ids is None else ids
    softmax = SoftmaxParams(z.size(-1), softcap, start, total)
    heat = torch.tensor([temperature])
    table, found = load("cpu").top_stats(z, ids, heat, softmax, STATS, k)
    # The statistics are bit for bit those of a call without the search.
    torch.testing.assert_close(
        table, load("cpu").token_stats(z, ids, heat, softmax, STATS), rtol=0, atol=0, equal_nan=True
    )
    return found


@pytest.mark.parametrize("softcap", [math.inf, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ids_of_adversarial_rows(level, dtype, softcap):
    for v, k in (
        (1, 1),
        (7, 7),
        (33, 5),
        (257, 64),
        (BLOCK, 1),
        (2 * BLOCK + 77, 20),
        (5 * BLOCK + 1, 128),
    ):
        z = adversarial(v, dtype)
        assert torch.equal(search(z, k, softcap), sorted_ids(z, k)), (v, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_ids_as_torch(level, dtype):
    """Of rows without ties, in an order that is one: as :func:`top_ids`, ignored rows
    and shards included.
    """
    g = torch.Generator().manual_seed(3)
    v, k = 3 * BLOCK + 5, 17
    steps = torch.stack([torch.randperm(v, generator=g) for _ in range(8)])
    # distinct positive 16-bit numbers
    z = steps.float() * 1e-3 if dtype == torch.float32 else steps.to(torch.int16).view(dtype)
    ids = torch.tensor([0, -100, 5, 1000 + v, 3, 2, 1000, 7])
    softmax = SoftmaxParams(v, math.inf, 1000, 2000 + v)
    found = search(z, k, ids=ids, temperature=0.7, start=1000, total=2000 + v)
    assert torch.equal(found, top_ids(z, ids, k, softmax)) and (found[1] == -100).all()


def test_rows_with_padding_strides_and_threads(level):
    g, before = torch.Generator().manual_seed(4), torch.get_num_threads()
    z = torch.randn(40, 5, 2 * BLOCK + 9, generator=g)[:, ::2, : 2 * BLOCK]
    options = dict(stats=("topk_ids", "logps"), top_k=9, vocab_size=BLOCK + 3, backend="cpu")
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(
                rw.token_stats(z, torch.zeros(40, 3, dtype=torch.int64), **options).topk_ids
            )
    finally:
        torch.set_num_threads(before)
    want = sorted_ids(z[..., : BLOCK + 3].flatten(0, 1), 9).view(40, 3, 9)
    assert torch.equal(found[0], want) and torch.equal(found[1], want)


def test_an_id_that_is_no_token_has_the_ids_of_its_row():
    """No call gets here on a CPU: the row has no statistics, but ids as
    by torch.topk."""
    z = torch.randn(2, 300, generator=torch.Generator().manual_seed(5))
    assert torch.equal(search(z, 3, ids=torch.tensor([300, -1])), sorted_ids(z, 3))


def test_which_calls_read_once(monkeypatch):
    """No torch.topk up to ``most_top``, from logits and from hidden states; explain
    says so.
    """
    most, z, ids = (
        load("cpu").most_top,
        torch.randn(3, 4, 300),
        torch.zeros(3, 4, dtype=torch.int64),
    )
    calls = []
    monkeypatch.setattr(
        "reweight_ops._core.engine.picked_ops.top_ids",
        lambda *args: calls.append(1) or top_ids(*args),
    )
    hidden, weight = torch.randn(3, 4, 8), torch.randn(300, 8)
    for k, backend, read_again in (
        (most, "cpu", False),
        (most + 1, "cpu", True),
        (2, "reference", True),
    ):
        options = dict(stats=("topk_ids", "topk_logps"), top_k=k, backend=backend)
        for op, args in (
            (rw.token_stats, (z, ids)),
            (rw.linear_token_stats, (hidden, weight, ids)),
        ):
            calls.clear()
            found = op(*args, **options)
            assert bool(calls) == read_again and found.topk_ids.shape == (3, 4, k)
            assert (found.topk_logps.diff(dim=-1) <= 0).all()
            said = rw.explain(op, *args, **options)
            assert (said.top_k == "in the read of the statistics") == (
                not read_again
            ) and said.top_k in str(said)
    assert rw.explain(rw.token_stats, z, ids, backend="cpu").top_k is None


@pytest.mark.parametrize("top", [0, 11, 129])
def test_a_count_that_no_row_has_does_not_reach_the_kernel(top):
    with pytest.raises(rw.InvalidCall, match=f"top_stats: top is {top}"):
        search(torch.zeros(1, 10 if top == 11 else 400), top)
