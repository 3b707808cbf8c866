"""Rows that start anywhere: the Triton kernels cut vectors out of aligned ones, and a
row has the same bits at every address.
"""

import math

import contract
import pytest
import torch

pytest.importorskip("triton")

from reweight_ops._core.backends import triton_token


@pytest.mark.parametrize("vocab", [5, 1029])
@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_a_row_has_the_same_bits_at_every_address(dtype, vocab):
    dtype = contract.DTYPES[dtype]
    g = torch.Generator().manual_seed(vocab)
    rows = (3 * torch.randn(2, vocab, generator=g)).to(dtype)
    ids = torch.tensor([vocab - 1, 2])
    stats = contract.stats_of(triton_token, rows, ids)
    table, grad = contract.loss_grad(triton_token, rows, ids)
    for start in range(16 // dtype.itemsize):
        whole = torch.full((2, vocab + 24), math.nan, dtype=dtype)
        assert whole.data_ptr() % 16 == 0
        z = whole[:, start : start + vocab]
        z.copy_(rows)
        got = contract.stats_of(triton_token, z, ids)
        assert all(torch.equal(got[name], stats[name]) for name in stats), start
        out = torch.full((2, vocab + 24), math.nan, dtype=dtype)
        found, own = contract.loss_grad(triton_token, z, ids, out=out[:, start : start + vocab])
        assert torch.equal(found, table) and torch.equal(own, grad), start
        assert out[:, :start].isnan().all() and out[:, start + vocab :].isnan().all(), start
