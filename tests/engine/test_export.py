"""torch.export of every public op: the program returns the op's results, and no fake
tensor remains for later calls.
"""

import io

import pytest
import torch
import torch._dynamo
from op_calls import BATCH, CALLS, IDS, LOGITS, SPEC

import reweight_ops as rw
from reweight_ops._core.losses import explain


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, z):
        return self.call(z)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_public_op_is_here():
    assert {op.__name__ for op in explain.PREPARED} == set(CALLS)


@pytest.mark.parametrize(
    ("strict", "needs_grad"),
    [(False, False), (False, True), (True, True)],
    ids=["plain", "grad", "strict, grad"],
)
@pytest.mark.parametrize("op", CALLS)
def test_export(op, strict, needs_grad):
    for call in CALLS[op]:
        example, other = (x.clone().requires_grad_(needs_grad) for x in (LOGITS, LOGITS.flip(1)))
        program = torch.export.export(Module(call), (example,), strict=strict)
        for z in (example, other):
            torch.testing.assert_close(program.module()(z), call(z))


def test_an_exported_program_is_saved_and_loaded():
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(CALLS["token_logps"][0]), (LOGITS,)), file)
    file.seek(0)
    torch.testing.assert_close(
        torch.export.load(file).module()(LOGITS), CALLS["token_logps"][0](LOGITS)
    )


def test_any_number_of_sequences():
    class Logps(torch.nn.Module):
        def forward(self, z, ids):
            return rw.token_logps(z, ids, temperature=0.7, return_entropy=True)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Logps(), (LOGITS, IDS), dynamic_shapes=({0: batch}, {0: batch}))
    for count in (2, 3, 4):
        torch.testing.assert_close(
            program.module()(LOGITS[:count], IDS[:count]), Logps()(LOGITS[:count], IDS[:count])
        )


def test_what_a_program_cannot_have_says_so():
    with pytest.raises(rw.UnsupportedRequest, match="torch.export has no derivatives"):
        torch.export.export(
            Module(lambda z: rw.policy_loss(z, **BATCH, spec=SPEC, plan="two_pass").coef),
            (LOGITS,),
            strict=False,
        )
