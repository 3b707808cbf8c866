"""torch.export of every public op: the program gives what the op gives, and leaves nothing fake behind for the calls after it."""

import io

import pytest
import torch
import torch._dynamo

import reweight_ops as rw
from reweight_ops._core.losses import explain
from reweight_ops.testing import make_batch
from reweight_ops.testing.pairs import make_pairs

SPEC = rw.methods.grpo(beta=0.1, entropy_coef=0.01)
VOCAB = 23
BATCH = make_batch(SPEC, (4, 8), VOCAB)
LOGITS, IDS = BATCH.pop("logits").detach(), BATCH["completion_ids"]
STORED = {name: value for name, value in BATCH.items() if name != "completion_ids"}
PAIRS = make_pairs(rw.preference.dpo(), 2, 8, VOCAB)
PAIRS.pop("logits")
REFERENCE = {"ref_per_token_logps": PAIRS["ref_per_token_logps"], "completion_mask": PAIRS["completion_mask"]}
OTHER = LOGITS.roll(1, -1)
WEIGHT = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(0))
STATS = ("logps", "entropies", "lse", "log_sum_p_sq", "max_logp", "is_top1", "log1m_p")


def logps(z):
    return z[..., 0] - 5


def seen(out):
    """What of a policy loss an exported program can return."""
    return out.loss, out.per_token_logps, out.ratio, out.per_token_loss, out.is_clipped, out.metrics["entropy"], out.metrics["kl"]


#: Public op to its calls on logits.
CALLS = {
    "token_logps": [
        lambda z: rw.token_logps(z, IDS, return_entropy=True),
        lambda z: rw.token_logps(z, IDS.clamp(max=19), temperature=torch.linspace(0.5, 2, 4), softcap=5.0, vocab_size=20),
    ],
    "token_stats": [lambda z: tuple(getattr(rw.token_stats(z, IDS, stats=STATS), name) for name in STATS)],
    "policy_loss": [
        lambda z: seen(rw.policy_loss(z, **BATCH, spec=SPEC)),
        lambda z: seen(rw.policy_loss(z, **BATCH, spec=SPEC, plan="two_pass")),
        lambda z: rw.policy_loss(z, **BATCH, spec="gspo", unused="ignore").loss,
        lambda z: rw.policy_loss(z, **BATCH, spec=rw.methods.dapo(epsilon_high=0.3), unused="ignore").loss,
    ],
    "policy_loss_from_logps": [lambda z: rw.policy_loss_from_logps(logps(z), **STORED, spec=rw.methods.grpo(beta=0.1)).loss],
    "linear_token_logps": [lambda z: rw.linear_token_logps(z[..., :6], WEIGHT, IDS, chunk_rows=8)],
    "linear_policy_loss": [
        lambda z: rw.linear_policy_loss(z[..., :6], WEIGHT, **BATCH, spec=SPEC).loss,
        lambda z: rw.linear_policy_loss(z[..., :6], WEIGHT, **BATCH, spec=SPEC, plan="two_pass", chunk_rows=8).loss,
    ],
    "token_divergence": [
        lambda z: rw.token_divergence(z, OTHER, kind="jeffreys"),
        lambda z: rw.token_divergence(z, OTHER, kind="generalized_jsd", beta=0.3),
    ],
    "distillation_loss": [lambda z: rw.distillation_loss(z, OTHER, kind="reverse_kl").loss],
    "preference_loss": [lambda z: rw.preference_loss(z, **PAIRS, spec="dpo").loss],
    "preference_loss_from_logps": [lambda z: rw.preference_loss_from_logps(logps(z), **REFERENCE, spec="dpo").loss],
    "linear_preference_loss": [lambda z: rw.linear_preference_loss(z[..., :6], WEIGHT, **PAIRS, spec="dpo").loss],
}


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
    assert {op.__name__ for op in explain._PREPARED} == set(CALLS)


@pytest.mark.parametrize(("strict", "needs_grad"), [(False, False), (False, True), (True, True)], ids=["plain", "grad", "strict, grad"])
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
    torch.testing.assert_close(torch.export.load(file).module()(LOGITS), CALLS["token_logps"][0](LOGITS))


def test_any_number_of_sequences():
    class Logps(torch.nn.Module):
        def forward(self, z, ids):
            return rw.token_logps(z, ids, temperature=0.7, return_entropy=True)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Logps(), (LOGITS, IDS), dynamic_shapes=({0: batch}, {0: batch}))
    for count in (2, 3, 4):
        torch.testing.assert_close(program.module()(LOGITS[:count], IDS[:count]), Logps()(LOGITS[:count], IDS[:count]))


def test_what_a_program_cannot_have_says_so():
    with pytest.raises(rw.UnsupportedRequest, match="torch.export has no derivatives"):
        torch.export.export(Module(lambda z: rw.policy_loss(z, **BATCH, spec=SPEC, plan="two_pass").coef), (LOGITS,), strict=False)
