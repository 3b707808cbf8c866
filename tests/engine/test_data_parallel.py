"""Two processes with DistributedDataParallel or fully_shard (gloo) have the gradient of
one process with the whole batch.

Checkpointing changes no gradient.
"""

import datetime
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reweight_ops as rw

RANKS, B, T, D, V = 2, 8, 6, 5, 23


class Policy(nn.Module):
    """A model whose forward ends in the loss, so that DistributedDataParallel sees all
    of it.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.double()

    def hidden(self, tokens):
        return torch.tanh(self.body(self.embed(tokens)))

    def forward(self, data, case):
        if case.outside:
            return self.hidden(data["tokens"])
        return checkpointed(case, partial(loss, self, data, case), self.hidden(data["tokens"]))


def checkpointed(case, function, *inputs):
    return (
        checkpoint(function, *inputs, use_reentrant=False) if case.checkpoint else function(*inputs)
    )


def loss(policy, data, case, hidden):
    rows = dict(
        completion_mask=data["mask"],
        old_per_token_logps=data["old"],
        spec=case.spec,
        plan=case.plan,
        **data["divisors"],
    )
    if case.linear:
        if isinstance(policy.head, rw.FusedLinearPolicyLoss):
            return policy.head(hidden, data["ids"], data["adv"], **case.options, **rows).loss
        head = dict(lm_head_bias=policy.head.bias, chunk_rows=5, **case.options)
        return rw.linear_policy_loss(
            hidden, policy.head.weight, data["ids"], data["adv"], **head, **rows
        ).loss
    return rw.policy_loss(
        policy.head(hidden), data["ids"], data["adv"], **case.options, **rows
    ).loss


@dataclass
class Case:
    linear: bool = True
    plan: str = "one_pass"
    spec: object = "dapo"
    options: dict = field(default_factory=dict)
    micro_batches: int = 1
    steps: int = 1  # the last step's gradients are compared
    empty_rank: bool = False  # every row of the last rank is ignored
    outside: bool = False  # the loss is outside of the wrapped module
    checkpoint: bool = False
    ddp: dict = field(default_factory=dict)
    sharded: bool = False  # fully_shard instead of DistributedDataParallel
    # the head is a module that returns the loss; sharded, it is a separate unit
    module: bool = False


BOTH = {
    f"{'linear' if linear else 'logits'} {plan}": dict(linear=linear, plan=plan)
    for linear in (True, False)
    for plan in ("one_pass", "two_pass")
}
CASES = {name: Case(**kind) for name, kind in BOTH.items()}
CASES |= {
    f"{name}, accumulated": Case(**kind, micro_batches=2, options={"loss_scale": 4.0})
    for name, kind in BOTH.items()
}
CASES |= {
    f"{name}, a rank without rows": Case(**kind, empty_rank=True) for name, kind in BOTH.items()
}
CASES |= {f"{name}, checkpointed": Case(**kind, checkpoint=True) for name, kind in BOTH.items()}
CASES |= {
    "linear one_pass, the loss outside": Case(outside=True),
    "linear two_pass, the loss outside": Case(plan="two_pass", outside=True),
    "linear one_pass, gradients in buckets": Case(
        ddp=dict(gradient_as_bucket_view=True), micro_batches=2, steps=2
    ),
    "linear two_pass, static graph": Case(plan="two_pass", ddp=dict(static_graph=True), steps=2),
    "linear one_pass, sharded": Case(sharded=True),
    "linear two_pass, sharded": Case(plan="two_pass", sharded=True),
    "logits one_pass, sharded": Case(linear=False, sharded=True),
    "module one_pass": Case(module=True),
    "module two_pass, checkpointed": Case(module=True, plan="two_pass", checkpoint=True),
    "module one_pass, sharded": Case(module=True, sharded=True),
    "module two_pass, sharded": Case(module=True, plan="two_pass", sharded=True),
    "linear two_pass, sequences": Case(plan="two_pass", spec=rw.methods.gspo()),
    "linear two_pass, kept logits": Case(plan="two_pass", options={"memory_budget": 1 << 20}),
    "logits one_pass, in place": Case(linear=False, options={"consume_logits": True}),
}


def whole_batch(case):
    """The ragged batch of all ranks: the first rank has more tokens than the last, and
    some rows have no advantage.
    """
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.tensor([6, 6, 5, 6, 2, 1, 3, 2])
    lengths[B // 2 :] *= not case.empty_rank
    data = dict(
        tokens=torch.randint(V, (B, T), generator=g),
        ids=torch.randint(V, (B, T), generator=g),
        adv=normal(B),
        mask=torch.arange(T) < lengths[:, None],
    )
    data["adv"][1] = 0
    policy = Policy()
    with torch.no_grad():
        logits = policy.head(policy.hidden(data["tokens"]))
    data["old"] = rw.token_logps(logits, data["ids"]) + 0.3 * normal(B, T)
    return data


def divisors(case, mask, ranks):
    """DistributedDataParallel averages gradients: each rank takes its share of the
    whole batch's divisor.
    """
    reads = (
        rw.method(case.spec).reduction.reads
        if isinstance(case.spec, str)
        else case.spec.reduction.reads
    )
    total = {"num_items_in_batch": mask.sum().item(), "num_sequences_in_batch": len(mask)}
    return {name: total[name] / ranks for name in reads}


def gradients(case, policy, module, data):
    """Gradients after a step in micro-batches; ``data`` is this process's part, with
    the whole batch's divisors.
    """
    parts = [
        {
            name: x if name == "divisors" else x.chunk(case.micro_batches)[i]
            for name, x in data.items()
        }
        for i in range(case.micro_batches)
    ]
    for i, part in [*enumerate(parts)] * case.steps:
        if i == 0:
            policy.zero_grad()
        # as DistributedDataParallel's no_sync() does
        module.require_backward_grad_sync = i == len(parts) - 1
        result = module(part, case)
        value = (
            checkpointed(case, partial(loss, policy, part, case), result)
            if case.outside
            else result
        )
        value.backward()
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in policy.named_parameters()
    }


def run_case(case, rank=None):
    data = whole_batch(case)
    data["divisors"] = divisors(case, data["mask"], 1 if rank is None else RANKS)
    if rank is not None:
        data = {name: x if name == "divisors" else x.chunk(RANKS)[rank] for name, x in data.items()}
    policy = Policy()
    if case.module:
        policy.head = rw.FusedLinearPolicyLoss.from_linear(
            policy.head, spec=case.spec, chunk_rows=5
        )
    return gradients(case, policy, policy if rank is None else wrapped(case, policy), data)


def wrapped(case, policy):
    if not case.sharded:
        return nn.parallel.DistributedDataParallel(policy, **case.ddp)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    if case.module:
        fully_shard(policy.head, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save({name: run_case(case, rank) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    """All cases are in one test, because the processes take seconds to start."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    wrong = []
    for name, case in CASES.items():
        want = run_case(case)
        assert all(g.abs().max() > 1e-6 for g in want.values()), name
        for rank, found in enumerate(ranks):
            wrong += [
                (name, rank, p)
                for p, g in want.items()
                if not torch.allclose(found[name][p], g, rtol=1e-10, atol=1e-14)
            ]
    assert not wrong


@pytest.mark.parametrize("name", BOTH)
def test_checkpointing_changes_no_gradient(name):
    plain, again = (run_case(Case(**BOTH[name], checkpoint=use)) for use in (False, True))
    assert all(torch.equal(plain[parameter], again[parameter]) for parameter in plain)


@pytest.mark.parametrize(("plan", "passes"), [("one_pass", 2), ("two_pass", 3)])
def test_what_checkpointing_the_head_costs(plan, passes, monkeypatch):
    """Every logit is computed once more: its memory was one chunk anyway. The logits'
    GEMMs are counted in rows.
    """
    from reweight_ops._core.engine.linear.gemms import Chunk

    seen = []
    logits = Chunk.logits
    monkeypatch.setattr(
        Chunk, "logits", lambda self, hidden: seen.append(hidden.size(0)) or logits(self, hidden)
    )
    case = Case(plan=plan, options={"compact_rows": False})
    for use in (False, True):
        case.checkpoint = use
        seen.clear()
        run_case(case)
        assert sum(seen) == B * T * (passes - (not use))
