"""The likeliest ids from Triton's sweep: what a stable sort of the row says. The
statistics keep their bits.
"""

import likeliest
import numpy
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton_oracle import DEVICE

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends.base import STATS
from reweight_ops._core.backends.select import load

if DEVICE != "cpu" or not triton_launch.interpreted():
    pytest.skip("tests/gpu has the cases of a GPU", allow_module_level=True)

triton = load("triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture
def by_numpy(monkeypatch):
    """Sort by numpy: Triton's own sort takes the interpreter half a second."""

    def sort(x, descending):
        assert descending
        data = numpy.sort(x.handle.data)[::-1].copy()
        return tl.tensor(type(x.handle)(data, x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


def test_the_ids_of_adversarial_rows(by_numpy, dtype):
    """In a row of one tile and in rows of several, with rooms of 256 and 512 keys."""
    rows = [0, 1, 4, 9, 15]  # plain, ascending, ties, with NaN
    for v, k in ((7, 7), (2500, 60)):
        z = likeliest.adversarial(v, dtype)[rows]
        assert torch.equal(likeliest.search(triton, z, k), likeliest.sorted_ids(z, k)), (v, k)


def test_every_adversarial_row(by_numpy):
    likeliest.check_adversarial(triton, torch.bfloat16, ((1100, 128),))


def test_with_a_softcap_and_all_statistics(by_numpy):
    z = likeliest.adversarial(2500, torch.bfloat16)[[0, 9]]
    found = likeliest.search(triton, z, 20, softcap=2.0, stats=STATS)
    assert torch.equal(found, likeliest.sorted_ids(z, 20))


def test_by_the_sort_of_triton():
    z = likeliest.adversarial(1100, torch.bfloat16)[[1]]
    assert torch.equal(likeliest.search(triton, z, 20), likeliest.sorted_ids(z, 20))


def test_as_torch_with_ignored_rows_and_shards(by_numpy):
    likeliest.check_as_torch(triton, torch.bfloat16, 1100, 17)


def test_any_layout(by_numpy):
    likeliest.check_layouts(triton, torch.bfloat16, 2571, 9)


def test_a_row_whose_id_is_no_token(by_numpy):
    likeliest.check_bad_ids(triton)


def test_rows_of_several_segments(by_numpy):
    """Its largest logits are in the last segment, and equal to others in the first.
    Another row descends: the tiles of its NaN have no other candidate.
    """
    v = 40009
    plain = torch.randn(v, generator=torch.Generator().manual_seed(1))
    z = torch.stack([plain, torch.linspace(4, -4, v)]).to(torch.bfloat16)
    z[0, -40:] = z[0].max()
    z[1, [20011, 39003]] = float("nan")
    assert torch.equal(likeliest.search(triton, z, 24), likeliest.sorted_ids(z, 24))


def test_few_long_rows_have_the_bits_of_split_statistics(by_numpy, monkeypatch):
    z = torch.randn(1, 40009, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(triton_launch, "is_split", lambda *args: True)
    assert torch.equal(likeliest.search(triton, z, 3), likeliest.sorted_ids(z, 3))


def test_no_rows():
    assert likeliest.search(triton, torch.zeros(0, 10), 3).shape == (0, 3)
