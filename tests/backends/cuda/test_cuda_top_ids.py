"""The likeliest ids from the sweep of the emulated CUDA kernels: what a stable sort of
the row says, under every schedule. The statistics keep their bits.
"""

import likeliest
import pytest
import torch
from contract import DTYPES
from cuda_emulation.fixtures import SCHEDULES, emulated

from reweight_ops._core.backends.base import STATS
from reweight_ops.errors import InvalidCall

#: A warp's room is 64, 128 or 256 keys. A tile is 8192 columns in 16 bits and 4096 in
#: 32; a row over two slices has ten tiles and more.
SIZES = ((1, 1), (7, 7), (257, 64), (2563, 1), (9001, 20), (4103, 33), (1500, 128))


@pytest.fixture(scope="module")
def kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield emulated()
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(kernels):
    kernels[0].set_schedule("random", 1)
    return kernels[1]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def test_the_ids_of_adversarial_rows(cuda, dtype):
    likeliest.check_adversarial(cuda, dtype, SIZES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ids_under_every_schedule(kernels, schedule):
    """Two blocks take the rows of a call in turns."""
    for seed in range(2):
        kernels[0].set_schedule(schedule, seed)
        likeliest.check_adversarial(kernels[1], torch.bfloat16, ((9001, 20), (1100, 90)))


def test_with_a_softcap_and_all_statistics(cuda, dtype):
    likeliest.check_adversarial(cuda, dtype, ((2563, 20),), softcap=2.0)
    likeliest.check_adversarial(cuda, dtype, ((2563, 20),), stats=STATS)


def test_as_torch_with_ignored_rows_and_shards(cuda, dtype):
    likeliest.check_as_torch(cuda, dtype, 9001, 17)


def test_any_layout(cuda, dtype):
    likeliest.check_layouts(cuda, dtype, 2571, 9)


def test_a_row_whose_id_is_no_token(cuda):
    likeliest.check_bad_ids(cuda)


def test_a_row_of_several_slices(cuda):
    """Its largest logits are in the last slice, and equal to others in the first.
    Another row descends: the tiles of its NaN have no other candidate.
    """
    v = 90007
    plain = torch.randn(v, generator=torch.Generator().manual_seed(1))
    z = torch.stack([plain, torch.linspace(4, -4, v)]).to(torch.bfloat16)
    z[0, -40:] = z[0].max()
    z[1, [30011, 70003]] = float("nan")
    assert torch.equal(likeliest.search(cuda, z, 24), likeliest.sorted_ids(z, 24))


@pytest.mark.parametrize("top", [0, 11, 129])
def test_a_count_that_no_row_has_does_not_reach_the_kernel(cuda, top):
    with pytest.raises(InvalidCall, match=f"top_stats: top is {top}"):
        likeliest.search(cuda, torch.zeros(1, 10 if top == 11 else 400), top)


def test_no_rows(cuda):
    assert likeliest.search(cuda, torch.zeros(0, 10), 3).shape == (0, 3)


def test_a_status_reaches_the_caller(kernels):
    module, native = kernels
    module.set_status(700)
    try:
        with pytest.raises(AssertionError, match="status 700"):
            likeliest.search(native, torch.zeros(1, 9), 2)
    finally:
        module.set_status(0)
