"""Compiled backwards: nothing overwrites what forward saved, and gradients are right
where inductor saves padded rows.
"""

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import reweight_ops as rw
from reweight_ops._core.engine import ops as library
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01)
#: Rows of a length that inductor pads.
BATCH = make_batch(SPEC, (4, 6), 1031, torch.bfloat16)
IDS, REST = BATCH["completion_ids"], {k: v for k, v in BATCH.items() if k != "logits"}
OTHER = torch.randn(4, 6, 1031, generator=torch.Generator().manual_seed(0)).bfloat16()
WEIGHT = torch.randn(1031, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
REFERENCE = torch.zeros(4)


def policy(plan, consume):
    return lambda x: (
        rw.policy_loss(
            x, **REST, spec=SPEC, plan=plan, backend="reference", consume_logits=consume
        ).loss
    )


def distillation(plan, consume):
    return lambda x: (
        rw.distillation_loss(x, OTHER, plan=plan, backend="reference", consume_logits=consume).loss
    )


def linear(plan, _):
    return lambda x: (
        rw.linear_policy_loss(
            x[..., :8] * 1, WEIGHT, **REST, spec=SPEC, plan=plan, backend="reference"
        ).loss
    )


def preference(_, consume):
    return lambda x: (
        rw.preference_loss(
            x,
            IDS,
            spec="dpo",
            ref_sequence_logps=REFERENCE,
            backend="reference",
            consume_logits=consume,
        ).loss
    )


LOSSES = {
    f"{make.__name__}, {plan}, {'consume' if consume else 'keep'}": make(plan, consume)
    for make, plans, consumes in (
        (policy, ("one_pass", "two_pass"), (False, True)),
        (distillation, ("one_pass", "two_pass"), (False, True)),
        (linear, ("one_pass", "two_pass"), (False,)),
        (preference, ("two_pass",), (False, True)),
    )
    for plan in plans
    for consume in consumes
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaf():
    return BATCH["logits"].detach().clone().requires_grad_()


def written_over(graph: torch.fx.Graph) -> list[str]:
    """Inputs of a graph that an op writes over, directly or through a view."""
    names = []
    for node in graph.nodes:
        if "auto_functionalized" in str(node.target):
            assert "_all_bases" in node.kwargs, "this version of PyTorch names it differently"
            names += [base.name for base in node.kwargs["_all_bases"] if base.op == "placeholder"]
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            names += [a.name for a in node.all_input_nodes if a.op == "placeholder"]
    return names


def backward_graph_of(loss) -> torch.fx.Graph:
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    # Inductor's partition may save what backward would recompute.
    compiler = aot_autograd(
        fw_compiler=lambda module, inputs: make_boxed_func(module.forward),
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
    )
    z = leaf()
    torch.autograd.grad(
        torch.compile(lambda z: loss(z * 1), fullgraph=True, backend=compiler)(z) * 3, z
    )
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_backward_writes_over_nothing_that_forward_saved(name):
    assert written_over(backward_graph_of(LOSSES[name])) == []


def test_that_it_would_be_seen(monkeypatch):
    """The negative control: in eager mode backward writes over the logits."""
    monkeypatch.setattr(library, "may_overwrite", lambda consume: consume)
    assert len(written_over(backward_graph_of(policy("two_pass", True)))) == 1


def test_gradients_where_inductor_pads():
    """On GPUs inductor saves rows at padded strides; here a setting makes it do so on a
    CPU. One compilation, a leaf for each loss.
    """
    names = [name for name in LOSSES if "consume" in name or "linear" in name]

    def step(*leaves):
        losses = [LOSSES[name](z * 1) for name, z in zip(names, leaves, strict=True)]
        return (torch.stack(losses) * torch.arange(1.0, len(losses) + 1)).sum()

    want = torch.autograd.grad(step(*(leaves := [leaf() for _ in names])), leaves)
    with torch._inductor.config.patch(disable_padding_cpu=False):
        got = torch.autograd.grad(
            torch.compile(step, fullgraph=True)(*(leaves := [leaf() for _ in names])), leaves
        )
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
