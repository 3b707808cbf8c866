"""Heads that FSDP, DDP or ZeRO-3 hold, beside a vocabulary in shards: tied embeddings,
micro-batches and checkpointing are those of one process.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

import reweight_ops as rw

B, T, D, V = 4, 3, 5, 23


class SumOverRanks(torch.autograd.Function):
    """Parts of hidden states to hidden states; every rank has their whole gradient, so
    it is each part's.
    """

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@dataclass
class Case:
    shards: int = 2  # of the vocabulary; the other ranks have rows of their own
    fsdp: bool = True
    micro_batches: int = 1
    checkpoint: bool = False
    plan: str = "auto"
    spec: str = "dapo"


CASES = {
    "fsdp": Case(),
    "fsdp, micro-batches": Case(micro_batches=2),
    "fsdp, checkpointed": Case(checkpoint=True, spec="gspo"),
    "fsdp of a whole vocabulary": Case(shards=1, plan="one_pass"),
    "ddp": Case(fsdp=False),
    "ddp, micro-batches, checkpointed": Case(fsdp=False, micro_batches=2, checkpoint=True),
    "ddp of a whole vocabulary": Case(shards=1, fsdp=False, plan="two_pass"),
}


class Policy(nn.Module):
    """The embedding's weight is the head's, whose rows ``columns`` this rank has."""

    def __init__(self, columns=None, group=None):
        super().__init__()
        torch.manual_seed(0)
        embed, body = nn.Embedding(V, D).double(), nn.Linear(D, D).double()
        self.start, self.group, self.body = columns.start if columns else 0, group, body
        self.head = rw.FusedLinearPolicyLoss(D, V, spec="dapo", device="meta")
        self.head.weight = nn.Parameter(embed.weight.detach()[columns or slice(None)].clone())

    def embedded(self, tokens):
        weight = self.head.weight
        local = tokens - self.start
        mine = (local >= 0) & (local < len(weight))
        x = torch.where(
            mine[..., None], nn.functional.embedding(torch.where(mine, local, 0), weight), 0
        )
        return x if self.group is None else SumOverRanks.apply(x, self.group)

    def forward(self, data, case, divisors):
        hidden = torch.tanh(self.body(self.embedded(data["tokens"])))
        over = {} if self.group is None else {"process_group": self.group}

        def loss(h):
            return self.head(
                h,
                data["ids"],
                data["adv"],
                spec=case.spec,
                plan=case.plan,
                chunk_rows=4,
                **over,
                **divisors,
            ).loss

        return checkpoint(loss, hidden, use_reentrant=False) if case.checkpoint else loss(hidden)


def batch():
    g = torch.Generator().manual_seed(1)
    tokens, ids = (torch.randint(V, (B, T), generator=g) for _ in range(2))
    return dict(
        tokens=tokens, ids=ids, adv=torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.float64)
    )


def gradients(case, policy, module, data, ranks):
    """After all micro-batches. FSDP and DDP average over the ranks with rows of their
    own, so each has its share of the divisor.
    """
    divisors = (
        {"num_sequences_in_batch": B / ranks}
        if case.spec == "gspo"
        else {"num_items_in_batch": B * T / ranks}
    )
    for i in range(case.micro_batches):
        last = i == case.micro_batches - 1
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_backward_grad_sync = last
        elif module is not policy or hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)
        module(
            {name: x.chunk(case.micro_batches)[i] for name, x in data.items()}, case, divisors
        ).backward()
    return {
        n: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for n, p in policy.named_parameters()
    }


def wrapped(case, policy, ranks):
    grid = torch.arange(4).view(4 // case.shards, case.shards)
    mesh = DeviceMesh("cpu", grid, mesh_dim_names=("dp", "tp"))
    if not case.fsdp:
        return nn.parallel.DistributedDataParallel(policy, process_group=mesh.get_group("dp"))
    # The head's weight is the embedding's, which is read outside of the head: both are
    # in one unit.
    return fully_shard(policy, mesh=mesh["dp"])


def trained(ranks):
    wrong = []
    for name, case in CASES.items():
        (row, column), (_, tp) = ranks.axes(4 // case.shards, case.shards)
        columns = slice(*[(0, 12), (12, V)][column]) if case.shards == 2 else None
        policy = Policy(columns, tp if case.shards == 2 else None)
        data = {key: x.chunk(4 // case.shards)[row] for key, x in batch().items()}
        found = gradients(case, policy, wrapped(case, policy, ranks), data, 4 // case.shards)
        one = Policy()
        want = gradients(Case(spec=case.spec), one, one, batch(), 1)
        want["head.weight"] = want["head.weight"][columns or slice(None)]
        for parameter, expected in want.items():
            if not torch.allclose(found[parameter], expected, rtol=1e-10, atol=1e-14):
                wrong.append(
                    f"{name}, {parameter}: {(found[parameter] - expected).abs().max()} of {expected.abs().max()}"
                )
    return wrong


def test_tied_heads_under_fsdp_and_ddp(four):
    """The gradient of a weight that embeds and projects is one, and is summed once."""
    four.check(trained)


def sharded_by_fsdp(ranks):
    """A parameter as FSDP leaves it outside of its module's forward: refused, or with
    hidden states that all ranks have, a vocabulary in shards.
    """
    mesh = DeviceMesh("cpu", torch.arange(4))
    torch.manual_seed(0)
    head, whole = (
        fully_shard(nn.Linear(D, V, bias=False).double(), mesh=mesh),
        nn.Linear(D, V, bias=False).double(),
    )
    weight = head.weight
    whole.weight.data = weight.detach().full_tensor()
    hidden, ids = torch.randn(6, D, dtype=torch.float64), torch.arange(6)
    assert isinstance(weight, DTensor)
    try:
        rw.linear_token_logps(hidden, weight, ids)
        return ["not refused"]
    except rw.UnsupportedRequest as error:
        assert (
            "If this is FSDP's parameter, call inside of its module's forward, or after unshard()"
            in str(error)
        )
    want = rw.linear_token_logps(hidden, whole.weight, ids)
    want.sum().backward()
    found = rw.linear_token_logps(DTensor.from_local(hidden, mesh, [Replicate()]), weight, ids)
    found.sum().backward()
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad.full_tensor(), whole.weight.grad, rtol=1e-12, atol=1e-12)
    head.unshard()
    torch.testing.assert_close(
        rw.linear_token_logps(hidden, head.weight, ids), want, rtol=1e-12, atol=1e-12
    )
    return []


def test_a_parameter_that_fsdp_has_sharded_is_right_or_refused(four):
    four.check(sharded_by_fsdp)
