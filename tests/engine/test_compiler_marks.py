"""What ``_core.compiler`` tells torch.compile is what PyTorch's own functions tell,
which import all of it.
"""

import math

import torch
from torch._dynamo.decorators import skip
from torch._dynamo.testing import CompileCounter

from reweight_ops._core import compiler
from reweight_ops._core.compiler import constant_result
from reweight_ops._core.engine.ops import token_stats


def test_a_constant_has_pytorchs_mark():
    def ours():
        pass

    def pytorchs():
        pass

    assert constant_result(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(pytorchs)) != {}


@skip
def uncompiled(logits, ids):
    """torch.compile leaves this function out, and compiles what it calls."""
    one = torch.ones(())
    stats = token_stats(logits, ids, one, 8, math.inf, 0, 8, False, "logp", "reference")
    return doubled(stats)


def doubled(x):
    return x * 2


def test_the_body_of_an_op_is_not_compiled():
    frames = CompileCounter()
    logits, ids = torch.randn(3, 8), torch.arange(3)
    found = torch.compile(lambda x: uncompiled(x, ids), backend=frames)(logits)
    torch.testing.assert_close(found, 2 * logits.log_softmax(-1).gather(1, ids[:, None]).T)
    assert frames.frame_count == 1, "doubled"


def test_another_pytorch_may_lack_its_private_names(monkeypatch):
    def body(x):
        return x + 1

    assert compiler.never_compiled(body) is body
    monkeypatch.delattr(compiler.eval_frame, "set_code_exec_strategy")
    assert getattr(compiler.never_compiled(body), "_torchdynamo_disable", False)
