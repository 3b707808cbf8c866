"""A parameter that FSDP2 has sharded, made whole outside of its unit's forward: two
processes (gloo) against one with both batches.
"""

import datetime

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import reweight_ops as rw
from reweight_ops.integrations import sharding

RANKS, ROWS, D, V = 2, 12, 5, 23


def data():
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(ROWS, D, generator=g, dtype=torch.float64),
        torch.randint(V, (ROWS,), generator=g),
    )
    return x, y, torch.randn(ROWS, generator=g, dtype=torch.float64)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.double()

    def forward(self, x, y, share):
        """As in verl's fused models: the head is a unit of its own whose forward is
        never called.
        """
        logps = rw.linear_token_logps(torch.tanh(self.body(x)), sharding.whole(self.head.weight), y)
        return (share * logps).sum() / ROWS


def whole_gradients():
    policy = Policy()
    policy(*data()).backward()
    return {n: p.grad for n, p in policy.named_parameters()}


def process(rank, folder):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    expected = whole_gradients()
    policy = Policy()
    fully_shard(policy.head)
    fully_shard(policy)
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    for chunk in (slice(0, 2), slice(2, None)):  # two micro-batches
        part = [t[mine][chunk] for t in data()]
        (RANKS * policy(*part)).backward()  # FSDP averages over the ranks
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(
            parameter.grad.full_tensor(), expected[name], rtol=1e-12, atol=1e-14
        )

    weight = torch.randn(4, 2)
    hybrid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    parameter = nn.Parameter(distribute_tensor(weight, hybrid, [Replicate(), Shard(0)]))
    sharding.whole(parameter, torch.float64).mul(rank + 1).sum().backward()
    assert torch.equal(parameter.grad.full_tensor(), torch.full((4, 2), 1.5))
    both = distribute_tensor(weight, init_device_mesh("cpu", (RANKS, 1)), [Shard(0), Shard(1)])
    with pytest.raises(rw.UnsupportedRequest, match="sharded over several dimensions of its mesh"):
        sharding.whole(both)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=RANKS)


def test_what_is_whole_stays_as_it_is():
    weight = nn.Parameter(torch.randn(4, 2))
    assert sharding.whole(weight) is weight and not sharding.is_sharded(weight)
