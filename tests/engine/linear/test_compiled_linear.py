"""Compiled heads whose sums are wider than their operands: inductor can lower every op
of the graph.
"""

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import reweight_ops as rw
from reweight_ops._core.engine.linear import gemms as linear_gemms
from reweight_ops._core.engine.linear.gemms import wide_gemm_

WIDER = {
    "fp32 sum": {"accumulate_dtype": torch.float32},
    "fp32 logits": {"logits_dtype": torch.float32},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(size, generator=g).to(dtype).requires_grad_() for size in ((2, 8, 16), (32, 16))
    ]
    return leaves, torch.randint(32, (2, 8), generator=g), torch.randn(2, 8, generator=g)


def loss(h, w, ids, adv, plan, **options):
    return rw.linear_policy_loss(
        h, w, ids, adv, spec="grpo", plan=plan, chunk_rows=4, **options
    ).loss


@pytest.mark.parametrize("wider", WIDER)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_graphs_of_a_device_that_widens(plan, wider, monkeypatch):
    """A GPU's branch, as far as a machine without one can run it: the ops of both
    graphs.
    """
    monkeypatch.setattr(
        linear_gemms,
        "_widens",
        lambda operand, out: operand.dtype.itemsize == 2 and out == torch.float32,
    )
    seen = set()

    def record(graph, inputs):
        """Record the ops of a graph, also inside ``auto_functionalized``. The graph is
        not run; its results are zeros.
        """
        called = [node for node in graph.graph.nodes if node.op == "call_function"]
        seen.update(
            str(x)
            for node in called
            for x in (node.target, *node.args)
            if not isinstance(x, torch.fx.Node)
        )
        outputs = [None if x is None else x.meta["val"] for x in graph.graph.output_node().args[0]]
        return make_boxed_func(
            lambda *args: [
                None if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in outputs
            ]
        )

    leaves, ids, adv = make()
    compiled = torch.compile(
        loss, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True
    )
    compiled(*leaves, ids, adv, plan, **WIDER[wider]).backward()
    assert not [target for target in seen if "mm.dtype" in target or "mm.out_dtype" in target]
    assert any("wide_gemm" in target for target in seen), seen


@pytest.mark.parametrize("wider", WIDER)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_compiled_is_eager(plan, wider):
    leaves, ids, adv = make()
    want = torch.autograd.grad(loss(*leaves, ids, adv, plan, **WIDER[wider]), leaves)
    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves, ids, adv, plan, **WIDER[wider]), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck(accumulate):
    g = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(5, 7, generator=g).bfloat16().t(),
        torch.randn(5, 3, generator=g).bfloat16(),
    )
    out = torch.randn(7, 3, generator=g)
    want = (left.double() @ right.double() + accumulate * out.double()).float()
    results = torch.library.opcheck(
        torch.ops.reweight_ops.wide_gemm_.default, (out.clone(), left, right, accumulate)
    )
    assert set(results.values()) == {"SUCCESS"}
    wide_gemm_(out, left, right, accumulate)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
