"""What a kernel reads outlives its launch, and a CUDA graph that captured it."""

import pytest
import torch
from contract import stats_of
from cuda_emulation import fixtures

from reweight_ops._core.backends.base import PackedRows
from reweight_ops._core.backends.native import Native
from reweight_ops.errors import InvalidCall


@pytest.fixture(scope="module")
def cuda():
    return fixtures.emulated()[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_factor_of_another_dtype(cuda, dtype):
    grad = torch.ones(40, dtype=torch.bfloat16)
    cuda.scale(grad, torch.tensor(0.5, dtype=dtype))
    assert (grad == 0.5).all()


def test_temperatures_are_no_copy(cuda):
    """A flat copy of them would be freed before the launch, and the results would have
    its memory.
    """
    spread = torch.tensor([0.5, 1.0, 2.0])[:, None].expand(3, 2)
    z, ids = torch.randn(6, 40).bfloat16(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(InvalidCall, match="temperature is"):
        stats_of(cuda, z, ids, ("logp",), temperature=spread)
    bounds = torch.tensor([[0], [40]]) + 40 * torch.arange(6)
    with pytest.raises(InvalidCall, match="temperature is"):
        cuda.packed_stats(PackedRows(z.view(-1), bounds, ids, spread, float("inf")), ("logp",))
    per_batch = spread.contiguous()
    assert torch.equal(
        stats_of(cuda, z, ids, ("logp",), temperature=per_batch)["logp"],
        stats_of(cuda, z, ids, ("logp",), temperature=per_batch.view(-1))["logp"],
    )


def test_a_captured_graph_finds_its_table_after_many_other_programs(cuda, monkeypatch):
    monkeypatch.setattr(Native, "_compile", lambda self, program, device: torch.empty(1))
    native = Native(cuda.module, "cpu", lambda device: {}, lambda status: None)
    first = native.compiled(0, torch.device("cpu"))
    for program in range(1, 2000):
        native.compiled(program, torch.device("cpu"))
    assert native.compiled(0, torch.device("cpu")) is first
