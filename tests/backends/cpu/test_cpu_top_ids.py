"""The likeliest ids from the sweep of the statistics: what a stable sort of the row
says, at every instruction-set level and dtype.
"""

import math

import likeliest
import pytest
import torch
from likeliest import sorted_ids

import reweight_ops as rw
from reweight_ops._core.backends.native import DTYPES
from reweight_ops._core.backends.picked import top_ids
from reweight_ops._core.backends.select import load

_C = pytest.importorskip("reweight_ops._C")
BLOCK = 2048  # columns of the widest level's block


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


def search(z, k, **options):
    return likeliest.search(load("cpu"), z, k, **options)


@pytest.mark.parametrize("softcap", [math.inf, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ids_of_adversarial_rows(level, dtype, softcap):
    sizes = ((1, 1), (7, 7), (33, 5), (257, 64), (BLOCK, 1), (2 * BLOCK + 77, 20))
    sizes += ((5 * BLOCK + 1, 128),)
    likeliest.check_adversarial(load("cpu"), dtype, sizes, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_ids_as_torch(level, dtype):
    likeliest.check_as_torch(load("cpu"), dtype, 3 * BLOCK + 5, 17)


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
    """No call gets here on a CPU."""
    likeliest.check_bad_ids(load("cpu"))


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
