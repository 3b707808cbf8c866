"""Every method, dtype and plan on every GPU backend against the fp64 reference, by the
package's criterion; layouts against each other, bitwise.
"""

import math

import pytest
import torch
from places import DRY, batch_on, sized

import reweight_ops as rw
from reweight_ops._core.backends.base import DERIVATIVES, STATS, RowInputs, SoftmaxParams
from reweight_ops._core.backends.select import load
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.rules.penalties import EntropyBonus
from reweight_ops.rules.surrogates import Reinforce
from reweight_ops.testing import compare, make_batch
from reweight_ops.testing.batches import make_sampling_mask

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARIES = sized((1, 1031, 32000, 50257, 151936), (131,))
SHAPE = sized((8, 32), (2, 6))
SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def assert_passed(comparison):
    assert comparison.passed, comparison


def check_method(place, name, plan, dtype):
    spec = METHODS[name].build()
    # Kernels of aligned rows compile in a third of the time, and each rule has its own.
    batch = batch_on(place, spec, vocab=4096, dtype=dtype)
    assert_passed(compare(spec, batch, backend=place.backend, plan=plan, loss_scale=64.0))


@pytest.mark.parametrize("plan", ["auto", "two_pass"])
@pytest.mark.parametrize("name", sized(sorted(METHODS), ["grpo", "gspo", "grpo_guard"]))
def test_methods(place, name, plan):
    check_method(place, name, plan, torch.bfloat16)


# A loss sees rows in fp32, whatever the dtype of the logits. The tests below have all
# dtypes.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("plan", ["auto", "two_pass"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_in_other_dtypes(place, dtype, name, plan):
    check_method(place, name, plan, dtype)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_vocabularies(place, dtype, vocab):
    if vocab == 1:
        z = torch.randn(3, 1, device=place.device).to(dtype)
        logp, entropy = rw.token_logps(
            z,
            torch.zeros(3, dtype=torch.int64, device=place.device),
            return_entropy=True,
            backend=place.backend,
        )
        assert torch.equal(logp, torch.zeros_like(logp)) and torch.equal(
            entropy, torch.zeros_like(entropy)
        )
        return
    assert_passed(
        compare(
            SPEC,
            make_batch(SPEC, SHAPE, vocab, dtype, place.device),
            backend=place.backend,
            loss_scale=64.0,
        )
    )


@pytest.mark.parametrize("over", ["kept", "vocabulary"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_sampling_masks(place, dtype, plan, over):
    batch = make_batch(SPEC, SHAPE, sized(32000, 131), dtype, place.device)
    mask = make_sampling_mask(batch, sized(0.01, 0.3))
    options = {"sampling_mask": mask, "entropy_over": over, "loss_scale": 64.0}
    assert_passed(compare(SPEC, batch, backend=place.backend, plan=plan, **options))


#: Coefficients that do not depend on the log-prob: with a softcap, a logit is itself
#: rounded to fp32, and what that does to a large importance ratio is one row's luck, in
#: every fp32 implementation alike.
LINEAR_SPEC = rw.PolicyLossSpec(
    surrogate=Reinforce(), penalties=(rw.Penalty(EntropyBonus(), 0.01),)
)
SOFTMAXES = {
    "temperature": dict(temperature=0.6),
    "softcap": dict(softcap=20.0),
    "padded vocabulary": dict(vocab_size=100),
    "last position": dict(drop_last=True),
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_heads(place, dtype, softmax, plan):
    options = dict(SOFTMAXES[softmax])
    batch = make_batch(LINEAR_SPEC, SHAPE, 131, dtype, place.device)
    if "vocab_size" in options:
        batch["completion_ids"] = batch["completion_ids"] % 100
    if "drop_last" in options:
        z = batch["logits"]
        batch["logits"] = torch.cat([z, z[:, :1]], 1)
    assert_passed(
        compare(LINEAR_SPEC, batch, backend=place.backend, plan=plan, loss_scale=64.0, **options)
    )


def test_a_temperature_each_row(place, dtype):
    batch = make_batch(SPEC, SHAPE, 131, dtype, place.device)
    temperature = torch.linspace(0.3, 2.5, SHAPE[0] * SHAPE[1], device=place.device).view(SHAPE)
    assert_passed(
        compare(SPEC, batch, backend=place.backend, loss_scale=64.0, temperature=temperature)
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_minus_infinity(place, dtype, plan):
    """Single columns, the first tiles of a row, and all columns but the target."""
    vocab = sized(20000, 131)
    batch = batch_on(place, SPEC, (4, 8), vocab, dtype)
    z, ids = batch["logits"], batch["completion_ids"]
    vocab = z.size(-1)
    masked = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)).to(z.device) < 0.3
    masked[0, :, : 3 * vocab // 4] = True
    masked[1, 0] = True
    masked.scatter_(-1, ids[..., None], False)
    batch["logits"] = torch.where(masked, -math.inf, z)
    assert_passed(compare(SPEC, batch, backend=place.backend, plan=plan, loss_scale=64.0))


def test_ignored_rows_or_wrong(place, dtype):
    """Out: never read, zeros. An id outside the vocabulary: NaN outputs and a zero
    gradient, on a GPU.
    """
    batch = batch_on(place, SPEC, (4, 8), 131, dtype)
    z = batch["logits"]
    batch["completion_mask"][1] = False
    z[1] = math.nan
    batch["completion_ids"][2, 3] = IGNORE_INDEX
    z[2, 3] = math.nan
    if not DRY:
        batch["completion_mask"][3, 0] = True
        batch["completion_ids"][3, 0] = 10**9
    z = z.requires_grad_()
    out = rw.policy_loss(**{**batch, "logits": z}, spec=SPEC, backend=place.backend)
    out.loss.backward()
    assert torch.equal(z.grad[1], torch.zeros_like(z.grad[1])) and torch.equal(
        z.grad[2, 3], torch.zeros_like(z.grad[2, 3])
    )
    assert torch.equal(out.per_token_logps[1], torch.zeros_like(out.per_token_logps[1]))
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    if not DRY:
        assert out.per_token_logps[3, 0].isnan() and torch.equal(
            z.grad[3, 0], torch.zeros_like(z.grad[3, 0])
        )


@pytest.mark.parametrize("bad_logit", [math.nan, math.inf, -math.inf])
def test_a_nan_row_is_nan_and_alone(place, bad_logit):
    batch = batch_on(place, SPEC, (2, 8), 131, torch.float32)
    batch["completion_mask"].fill_(True)

    def gradient():
        z = batch["logits"].detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            rw.policy_loss(**{**batch, "logits": z}, spec=SPEC, backend=place.backend).loss, z
        )
        return grad

    healthy = gradient()
    if bad_logit == -math.inf:
        batch["logits"][1, 4] = bad_logit
    else:
        batch["logits"][1, 4, 77] = bad_logit
    with_nan = gradient()
    assert with_nan[1, 4].isnan().all()
    others = torch.ones(2, 8, dtype=torch.bool, device=with_nan.device)
    others[1, 4] = False
    assert torch.equal(with_nan[others], healthy[others])


# --- bitwise --------------------------------------------------------------------------

PROGRAM, PARAMS = (
    Program.of(("clip", "entropy_bonus")),
    [-20.0, 20.0, 1.0, 0.2, 0.2, math.inf, 0.05],
)


class Rows:
    """Inputs of the three primitives for ``n`` rows, and what the primitives make of
    them, for logits in any place of memory.
    """

    def __init__(self, place, n, vocab, dtype):
        g = torch.Generator().manual_seed(n)
        self.place, self.primitives = place, load(place.backend)
        self.z = (torch.randn(n, vocab, generator=g) * 3).to(dtype).to(place.device)
        ids = torch.randint(0, vocab, (n,), generator=g)
        self.rows = torch.randn(3, n, generator=g).to(place.device)
        self.ids = ids.to(place.device)

    def run(self, z, order=None, out=None):
        """``[stats, rows of the loss, its gradient, gradient by token_grad]``; the last
        two as rows.
        """
        ids, (adv, old, w) = self.ids, self.rows
        if order is not None:
            ids, adv, old, w = ids[order], adv[order], old[order], w[order]
        one, softmax, n = torch.ones(1, device=z.device), SoftmaxParams(z.size(-1)), ids.numel()
        stats = self.primitives.token_stats(z, ids, one, softmax, STATS)
        inputs = RowInputs(w.expand(2, n), old.contiguous(), adv.contiguous())
        out = torch.full_like(z, math.nan) if out is None else out
        rows = self.primitives.token_loss_grad(
            z, ids, one, softmax, inputs, PROGRAM, torch.tensor(PARAMS, device=z.device), out
        )
        grad = out.clone()
        known = dict(zip(STATS, stats, strict=True))
        self.primitives.token_grad(
            z, ids, one, softmax, known, dict.fromkeys(DERIVATIVES, adv.contiguous()), out
        )
        return [stats, rows, grad.reshape(n, -1), out.clone().reshape(n, -1)]


@pytest.mark.parametrize("vocab", sized((1031, 32000, 151936), (131,)))
def test_a_row_is_the_same_bits_wherever_it_stands(place, dtype, vocab):
    """Permuted, alone, in another batch size, in a strided and unaligned view of a
    larger tensor.
    """
    n = sized(300, 9)
    one = Rows(place, n, vocab, dtype)
    want = one.run(one.z)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(place.device)
    for few in (order, order[:1], order[: n // 3]):
        got = one.run(one.z[few].contiguous(), few)
        for a, b, dim in zip(want, got, (1, 1, 0, 0), strict=True):
            assert torch.equal(a.index_select(dim, few), b)
    for shift in (1, 2, 8):
        wide = torch.full((n // 3, 4, vocab + 16), math.nan, dtype=dtype, device=place.device)
        view = wide[:, :3, shift : shift + vocab]
        view.copy_(one.z.view(n // 3, 3, vocab))
        target = torch.full((n // 3, 3, vocab + 5), math.nan, dtype=dtype, device=place.device)[
            ..., :vocab
        ]
        for a, b in zip(want, one.run(view, out=target), strict=True):
            assert torch.equal(a, b)
        assert wide[:, 3].isnan().all()


def test_run_to_run_and_in_place(place, dtype, poisoned):
    one = Rows(place, sized(500, 8), sized(32000, 131), dtype)
    want = one.run(one.z)
    for _ in range(sized(20, 2)):
        for a, b in zip(want, one.run(one.z), strict=True):
            assert torch.equal(a, b)
    spec = rw.methods.grpo()
    batch = batch_on(place, spec, SHAPE, 1031, dtype)

    def gradient(consume):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(
            **{**batch, "logits": z * 1},
            spec=spec,
            plan="one_pass",
            consume_logits=consume,
            backend=place.backend,
            loss_scale=64.0,
        )
        return torch.autograd.grad(out.loss, z)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("vocab", sized((1031, 151936), (131,)))
def test_on_policy_the_ratio_is_exactly_1(place, dtype, vocab):
    spec = rw.methods.grpo()
    batch = batch_on(place, spec, SHAPE, vocab, dtype)
    batch["completion_mask"].fill_(True)
    old = rw.token_logps(batch["logits"], batch["completion_ids"], backend=place.backend)
    for plan in ("one_pass", "two_pass"):
        for given in (old, None):
            z = batch["logits"].detach().clone().requires_grad_()
            out = rw.policy_loss(
                **{**batch, "logits": z, "old_per_token_logps": given},
                spec=spec,
                plan=plan,
                backend=place.backend,
                loss_scale=64.0,
            )
            assert torch.equal(out.ratio, torch.ones_like(out.ratio))
            out.loss.backward()
            assert z.grad.abs().sum() > 0
