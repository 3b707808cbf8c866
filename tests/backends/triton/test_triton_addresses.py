"""Rows that start anywhere: the Triton kernels cut vectors out of aligned ones, and a
row has the same bits at every address.
"""

import itertools
import math

import contract
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_oracle import small_config

from reweight_ops._core.backends import triton_launch, triton_token
from reweight_ops._core.backends.base import DERIVATIVES, SoftmaxParams
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.triton_kernels.gradient import peeled


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


#: Columns of a row, and of the softmax among them: fewer than before a multiple of 16
#: bytes, a vector that is not whole, padding; several tiles, and chunks of 256 columns.
SHAPES = {"3": (3, 3), "13 of 20": (20, 13), "777 of 800": (800, 777)}


def placed(rows, start):
    """A copy of rows, the first element ``start`` elements after a multiple of 16
    bytes, and the memory around it.
    """
    memory = torch.full((rows.size(0), rows.size(1) + 24), math.nan, dtype=rows.dtype)
    assert memory.data_ptr() % 16 == 0
    at = memory[:, start : start + rows.size(1)]
    at.copy_(rows)
    return memory, at


def assert_only_rows(memory, at, start):
    """What is before and after the rows was not written."""
    assert memory[:, :start].isnan().all() and memory[:, start + at.size(1) :].isnan().all()


#: A few addresses with each run of the tests, all of them with the slow ones.
USUAL = [("bf16", "3", False), ("bf16", "13 of 20", False), ("fp32", "777 of 800", True)]


@pytest.mark.parametrize(
    ("dtype", "shape", "split", "starts"),
    [
        *[(*case, (0, 5)) for case in USUAL],
        *[
            pytest.param(*case, range(8), marks=pytest.mark.slow)
            for case in itertools.product(contract.DTYPES, SHAPES, (False, True))
        ],
    ],
    ids=str,
)
def test_a_gradient_has_the_same_bits_at_every_address(dtype, shape, split, starts, monkeypatch):
    """Where it begins like the logits, elsewhere, and over them; with targets before
    the first multiple of 16 bytes, after the last, and in no column; of an ignored row
    zeros.
    """
    monkeypatch.setattr(triton_token, "config_for", small_config)
    monkeypatch.setattr(triton_launch, "processors", lambda device: 10**6 if split else 0)
    dtype, (width, vocab) = contract.DTYPES[dtype], SHAPES[shape]
    g = torch.Generator().manual_seed(width)
    rows = (3 * torch.randn(5, width, generator=g)).to(dtype)
    # A target before the end of a chunk, and a cap whose slope there its logit decides.
    ids = torch.tensor([0, 1, vocab - 1, IGNORE_INDEX, min(vocab - 1, 258)])
    softmax, elements = SoftmaxParams(vocab, 15.0 if split else math.inf), 16 // dtype.itemsize
    derivatives = {name: torch.linspace(-1, 2, 5) for name in DERIVATIVES}
    aligned = placed(rows, 0)[1]
    stats = contract.stats_of(triton_token, aligned, ids, softmax=softmax)

    want_grad = contract.grad_of(triton_token, aligned, ids, stats, derivatives, softmax)
    want_rows, want = contract.loss_grad(triton_token, aligned, ids, softmax=softmax)
    assert not want[3].any() and not want_grad[3].any()
    for start, other in itertools.product(starts, (None, 0, 1)):
        start %= elements

        def places(start=start, other=other):
            """Logits, and the memory of a gradient that begins ``other`` elements after
            them, or over them.
            """
            memory, z = placed(rows, start)
            if other is None:
                return z, (memory, z, start)
            at = (start + other) % elements
            return z, (*placed(torch.full_like(rows, math.nan), at), at)

        z, where = places()
        contract.grad_of(triton_token, z, ids, stats, derivatives, softmax, out=where[1])
        assert torch.equal(where[1], want_grad), (start, other)
        assert_only_rows(*where)
        z, where = places()
        found, _ = contract.loss_grad(triton_token, z, ids, out=where[1], softmax=softmax)
        assert torch.equal(where[1], want) and torch.equal(found, want_rows), (start, other)
        assert_only_rows(*where)


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_a_slice_of_one_sequence_has_the_bits_of_its_rows(dtype, monkeypatch):
    """``logits[:, :-1]`` of a batch of one begins like its gradient, although the
    strides of the batch differ.
    """
    given = []
    launch = triton_launch.launch
    monkeypatch.setattr(
        triton_launch,
        "launch",
        lambda *a, **k: (given.append(k.get("GRAD_ALIGN")), launch(*a, **k)),
    )
    dtype, vocab = contract.DTYPES[dtype], 1029
    rows = (3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
    z, ids = rows[None, :-1], torch.tensor([vocab - 1, 0, 2])
    want_rows, want = contract.loss_grad(triton_token, rows[:-1].clone(), ids)
    given.clear()
    found, grad = contract.loss_grad(
        triton_token, z, ids, out=torch.empty(1, 3, vocab, dtype=dtype)
    )
    assert given == [16]
    assert torch.equal(grad[0], want) and torch.equal(found, want_rows)


@triton.jit
def _place_kernel(X, OUT, width, FOUND):
    _, OUT, head, stop, columns = peeled(X, OUT, 0, width, width, width, True)
    tl.store(FOUND, OUT.to(tl.int64, bitcast=True))
    tl.store(FOUND + 1, head.to(tl.int64))
    tl.store(FOUND + 2, stop.to(tl.int64))
    tl.store(FOUND + 3, columns.to(tl.int64))


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_whole_vectors_begin_at_multiples_of_16_bytes(dtype):
    """The interpreter would store one at any address; a device would not."""
    memory, found = torch.zeros(64, dtype=contract.DTYPES[dtype]), torch.zeros(4).long()
    for start in range(16):
        out = memory[start:]
        _place_kernel[(1,)](memory, out, 40, found)
        address, head, *rest = found.tolist()
        assert address % 16 == 0 and address == out.data_ptr() + head * memory.itemsize
        assert 0 <= head < 16 // memory.itemsize and rest == [40 - head] * 2
