"""Kernels on rows against PyTorch's operations: masks, row weights, sequence ratios,
and losses on stored rows (in Triton's interpreter).
"""

import itertools
import math

import pytest
import torch
from random_losses import Drawn

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.formula.base import RULES
from reweight_ops._core.formula.loss_program import loss_graph
from reweight_ops._core.rows.primitives import Runs, Weighing
from reweight_ops._core.rows.resolve import RUN
from reweight_ops.testing import make_batch

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
SHAPE, VOCAB = (3, 5), 13


def both(batch, **options):
    """``(value, gradient, metrics, rows)`` by Triton's row kernels and by PyTorch."""
    results = []
    for backend in ("triton", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, backend=backend, unused="ignore", **options)
        assert (out._call.rows.primitives is not None) == (backend == "triton")
        (grad,) = torch.autograd.grad(out.loss, z)
        rows = [out.per_token_logps, out.per_token_loss, out.ratio, out.coef]
        results.append((out.loss.detach(), grad, out.metrics.as_floats(), *rows))
    return results


def assert_same(batch, **options):
    (loss, grad, metrics, *rows), (want, expected, sums, *others) = both(batch, **options)
    torch.testing.assert_close(loss, want, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected, rtol=2e-4, atol=1e-6)
    assert metrics == pytest.approx(sums, rel=1e-4, abs=1e-6, nan_ok=True)
    for row, other in zip(rows, others, strict=True):
        torch.testing.assert_close(row, other, rtol=2e-4, atol=1e-6)


def batch_of(spec, shape=SHAPE):
    batch = make_batch(spec, shape, VOCAB)
    batch["completion_mask"] = batch["completion_mask"].clone()
    if len(shape) > 1:
        batch["completion_mask"][-1] = 0  # a sequence without a row
    return batch


def number(x):
    return torch.tensor(x)


REDUCTIONS = {
    "token mean": (rw.TokenMean(), {}),
    "token mean of a number": (rw.TokenMean(), {"num_items_in_batch": 7}),
    "token mean of an integer tensor": (
        rw.TokenMean(),
        {"num_items_in_batch": number(7), "loss_scale": number(3.0)},
    ),
    "token sum": (rw.TokenSum(), {"loss_scale": 0.5}),
    "sequence mean": (rw.SequenceMean(), {"loss_scale": number(0.25)}),
    "sequence mean over the non-empty": (rw.SequenceMean(count="nonempty"), {}),
    "sequence mean of sums": (
        rw.SequenceMean(per="token_sum"),
        {"num_sequences_in_batch": number(2.0)},
    ),
    "padded length": (rw.SequenceMean(per="constant"), {}),
    "horizon": (rw.SequenceMean(per="constant", horizon=11), {"num_sequences_in_batch": 5}),
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_row_weights(name, plan):
    reduction, options = REDUCTIONS[name]
    spec = rw.methods.grpo(beta=0.1).replace(reduction=reduction)
    batch = batch_of(spec)
    assert_same(batch, spec=spec, plan=plan, **options)
    factor = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    denominator = torch.ones(SHAPE, dtype=torch.bool)
    denominator[0, 1:3] = False
    assert_same(
        batch, spec=spec, plan=plan, token_weights=factor, denominator_mask=denominator, **options
    )
    own = spec.with_penalty(rw.Penalty(RULES["entropy_bonus"](), 0.1, rw.TokenMean(per_call=True)))
    assert_same(batch, spec=own, plan=plan, token_weights=factor, **options)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16]
)
def test_masks_of_any_dtype_and_strides(dtype):
    spec = rw.methods.dapo()
    batch = batch_of(spec)
    assert_same(batch | {"completion_mask": batch["completion_mask"].to(dtype)}, spec=spec)
    wide = {
        name: torch.cat([torch.full_like(batch[name], 1), batch[name]], 1)[:, SHAPE[1] :]
        for name in ("completion_ids", "completion_mask")
    }
    assert not wide["completion_ids"].is_contiguous()
    assert_same(
        batch | wide | {"completion_ids": wide["completion_ids"].to(torch.int32)}, spec=spec
    )
    assert_same(batch | {name: t.t().contiguous().t() for name, t in wide.items()}, spec=spec)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_any_number_but_0_keeps_a_row(dtype):
    """As a mask or in a denominator, in packed rows too, and with any stride."""
    numbers = torch.tensor([[1, 0], [0, 1], [-1, 0], [2, 0], [0, 1], [-3, 0]]).to(dtype)[:, 0]
    equal, packed = Runs(6, 2, 3), Runs(6, 2, offsets=torch.tensor([0, 3, 6]))
    for runs, mask in ((equal, numbers.view(2, 3)), (packed, numbers)):
        found = select.load("triton").rows.mask(None, mask, mask, runs, mask.device)
        assert torch.equal(found.keep, numbers != 0) and torch.equal(found.counted, found.keep)
        assert found.lengths.tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_come_with_the_masks(dtype):
    """Whatever their strides, in ignored rows too, as PyTorch rounds them."""
    mask_rows, g = select.load("triton").rows.mask, torch.Generator().manual_seed(3)
    x = torch.randn(3, 70, 2, generator=g, dtype=torch.float64).to(dtype)
    x[1, 5], x[2, 3], x[0, 0] = math.nan, -math.inf, 1e-300
    keep = torch.arange(210).view(3, 70) % 3 > 0
    for values in (
        x[..., 0],
        x[..., 1].clone(),
        x[:, :1, 1].expand(3, 70),
        x[:1, 7, 0].expand(3, 70),
    ):
        found = mask_rows(None, keep, None, Runs(210, 3, 70), keep.device, values)
        want = values.to(torch.float32).reshape(-1)
        assert found.values.dtype == torch.float32
        assert torch.equal(found.values.view(torch.int32), want.view(torch.int32))
        assert torch.equal(found.keep, keep.view(-1)) and found.lengths.sum() == 2 * keep.sum()


#: Advantages that the launch of the masks copies, and one that it does not.
ADVANTAGES = {
    "of sequences": lambda a: a[:, 0],
    "of sequences, a column": lambda a: a[:, :1],
    "of tokens, strided": lambda a: torch.stack([a, -a], -1)[..., 0],
    "of tokens, bf16": lambda a: a.bfloat16(),
    "of sequences, fp64": lambda a: a[:, 0].double() * (1 + 1e-12),
    "contiguous": torch.Tensor.contiguous,
}


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_every_layout(name, shape):
    """Loss and gradient have the bits of the same advantages as fp32 rows, in a
    repeated call too.
    """
    spec = rw.methods.dapo()
    batch = batch_of(spec, shape)
    a = torch.randn(math.prod(shape[:-1]), shape[-1], generator=torch.Generator().manual_seed(4))
    given = ADVANTAGES[name](a)
    given = (
        given.reshape(*shape[:-1], *given.shape[1:])
        if name != "of sequences"
        else given.reshape(shape[:-1])
    )
    rows = (
        given.float()
        if given.shape == torch.Size(shape)
        else given.float().reshape(*shape[:-1], 1).expand(shape)
    )
    results = []
    for advantages in (given, given, rows.contiguous()):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(
            **{**batch, "logits": z, "advantages": advantages}, spec=spec, backend="triton"
        )
        assert (out._call.rows.masked.values is None) == (
            advantages is not given or name == "contiguous"
        )
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, z), dict(out.metrics)))
    for got in results[:2]:
        assert torch.equal(got[0], results[2][0]) and torch.equal(got[1], results[2][1])
        assert got[2] == results[2][2]
    assert results[0][1].any()


def test_advantages_that_learn_or_are_not_read():
    spec, batch = rw.methods.dapo(), batch_of(rw.methods.dapo(), (3, 5))
    a = torch.randn(3, 1, requires_grad=True)
    out = rw.policy_loss(**{**batch, "advantages": a}, spec=spec, backend="triton")
    (by,) = torch.autograd.grad(out.loss, a)
    assert by.shape == a.shape and by.any() and out._call.adv.requires_grad
    sft = rw.methods.sft()
    out = rw.policy_loss(
        **{**batch, "advantages": a.detach()}, spec=sft, backend="triton", unused="ignore"
    )
    assert out._call.adv is None


def test_rows_of_which_none_counts():
    """Those in the loss are divided by 1."""
    primitives, counted = select.load("triton").rows, torch.tensor([[False] * 2, [True] * 2])
    some = primitives.mask(None, None, counted, Runs(4, 2, 2), counted.device)
    weights = primitives.weigh(some, (Weighing(per_length=True),), 1.0, None)
    assert weights.tolist() == [[1, 1, 0.5, 0.5]]
    none = primitives.mask(None, None, counted & False, Runs(4, 2, 2), counted.device)
    for divisor in ("rows", "sequences"):
        weights = primitives.weigh(none, (Weighing(divisor),), 1.0, None)
        assert weights.tolist() == [[1] * 4]


def test_rows_without_sequences_and_with_two_dimensions_of_them():
    spec = rw.methods.dapo()
    assert_same(batch_of(spec, (RUN + 3,)), spec=spec)
    batch = batch_of(spec, (4, 5))
    reshaped = {
        name: t.reshape(2, 2, *t.shape[1:])
        for name, t in batch.items()
        if torch.is_tensor(t) and t.dim() and t.size(0) == 4
    }
    assert_same(batch | reshaped, spec=spec)


def test_rows_with_only_the_gradient_of_an_entropy():
    """They are not among the rows without a gradient."""
    spec = rw.methods.dapo().with_penalty(rw.Penalty(RULES["entropy_bonus"](), 0.1))
    batch = batch_of(spec)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert_same(batch, spec=spec)


@pytest.mark.parametrize("far", [-9.0, 9.0])
def test_metrics_of_clamped_ratios(far):
    spec = rw.methods.dapo().replace(ratio=rw.TokenRatio(clamp=0.5))
    batch = batch_of(spec)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + far
    assert_same(batch, spec=spec)


@pytest.mark.parametrize("case", ["no row", "a NaN"])
def test_metrics_of_no_number(case):
    spec = rw.methods.dapo()
    batch = batch_of(spec)
    if case == "no row":
        batch["completion_mask"][:] = 0
    else:
        batch["old_per_token_logps"] = batch["old_per_token_logps"].clone()
        batch["old_per_token_logps"][0, 1] = float("nan")
    (_, _, metrics, *_), (_, _, want, *_) = both(batch, spec=spec)
    assert metrics == pytest.approx(want, rel=1e-4, abs=1e-6, nan_ok=True)
    assert metrics["ratio/max"] != metrics["ratio/max"]


@pytest.mark.parametrize(
    "gradient, normalize, clamp",
    list(itertools.product(("sequence", "token"), (True, False), (20.0, 0.05))),
)
def test_sequence_ratios(gradient, normalize, clamp):
    ratio = rw.SequenceRatio(gradient=gradient, normalize=normalize, clamp=clamp)
    spec = rw.methods.gspo(epsilon_low=0.2, epsilon_high=0.2, beta=0.05).replace(ratio=ratio)
    batch = batch_of(spec)
    assert_same(batch, spec=spec)
    del batch["old_per_token_logps"]
    assert_same(batch, spec=spec)


@pytest.mark.parametrize("name", ["gmpo", "cispo", "sapo", "top_entropy"])
def test_other_losses(name):
    spec = rw.method(name)
    assert_same(batch_of(spec), spec=spec, plan="two_pass")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name, shape",
    [
        ("centred", SHAPE),
        ("batch mean", SHAPE),
        ("unclamped batch mean", SHAPE),
        ("segments", SHAPE),
    ],
)
def test_ratios_that_pytorch_forms(name, shape, masked):
    """Their metrics take the stored loss, and count the rows without a gradient like
    PyTorch. An unclamped mean of the batch is an expanded number.
    """
    ratio = {
        "centred": rw.CenteredRatio(scale="std"),
        "batch mean": rw.BatchMeanRatio(),
        "unclamped batch mean": rw.BatchMeanRatio(clamp=float("inf")),
        "segments": rw.SegmentRatio(),
    }[name]
    # a tight clip, and a penalty of the log-prob without the ratio
    spec = rw.methods.grpo(epsilon_low=0.01, epsilon_high=0.01, beta=0.05).replace(ratio=ratio)
    batch = batch_of(spec, shape)
    batch["completion_mask"][0] = 1
    if masked:
        batch["completion_mask"][0, 1] = 0
    if name == "segments":
        batch["segment_ids"] = torch.zeros(shape, dtype=torch.long)
    results = both(batch, spec=spec)
    assert list(results[0][2]) == list(results[1][2]) and "rows_skipped" in results[0][2]
    assert_same(batch, spec=spec)
    # without a penalty, clipped rows are skipped
    bare = rw.methods.dapo(epsilon_low=0.01, epsilon_high=0.01).replace(ratio=ratio)
    assert_same({**batch, "ref_per_token_logps": None}, spec=bare)


@pytest.mark.parametrize("given", [False, True], ids=["ratio", "given ratio"])
def test_random_losses_on_stored_rows(given):
    """Values, and derivatives by every leaf and row weight."""
    judged = asked = 0
    for seed in range(6):
        drawn = Drawn(seed)
        leaves = dict(drawn.leaves)
        if given:
            leaves["log_ratio"] = 0.5 * (leaves["logp"] - leaves["ref_logp"])
        names = loss_graph(drawn.program, given).names
        rows = {name: x.float() for name, x in leaves.items()}
        got = select.load("triton").evaluate_rows(
            drawn.program, drawn.params.float(), rows, drawn.row_weights.float(), names
        )
        judged += drawn.check(got, names, leaves, 2.0**-24, 1.0)
        asked += got.numel()
    assert judged > 0.6 * asked, "most values are finite and have a bound"


def test_ignored_rows_of_a_loss_on_stored_rows():
    """They are 0, and the others have their bits."""
    drawn = Drawn(0)
    rows = {name: x.float() for name, x in drawn.leaves.items()}
    names, weights = loss_graph(drawn.program, False).names, drawn.row_weights.float()
    keep = torch.arange(weights.size(-1)) % 3 > 0
    evaluate = select.load("triton").evaluate_rows
    want = evaluate(drawn.program, drawn.params.float(), rows, weights, names)
    got = evaluate(drawn.program, drawn.params.float(), rows, weights, names, keep)
    assert (want[:, ~keep] != 0).any()
    torch.testing.assert_close(got, want.where(keep, 0), rtol=0, atol=0, equal_nan=True)
