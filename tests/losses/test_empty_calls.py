"""Calls without a row in the loss give a differentiable 0 and metrics: every row is
ignored, or there is none.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.engine.metrics import Metrics
from reweight_ops.testing import make_batch
from reweight_ops.testing.pairs import make_pairs

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
HOW = {
    "no sequence": lambda x: x[:0],
    "no token": lambda x: x[:, :0] if x.dim() > 1 else x,
    "all masked": lambda x: x,
}


def emptied(batch, how):
    found = {name: HOW[how](x) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if how == "all masked":
        found["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    return found


def assert_zero(loss, z):
    (grad,) = torch.autograd.grad(loss, z)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(z))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(name, backend, how):  # docs/semantics.md: S5
    spec = METHODS[name].build()
    batch = emptied(make_batch(spec, (3, 4), 19), how)
    for plan in ("two_pass",) if spec.one_pass_unsupported_reason else ("one_pass", "two_pass"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, plan=plan, backend=backend)
        assert_zero(out.loss.sum(), z)
        shape = batch["completion_ids"].shape
        assert out.coef.shape == out.ratio.shape == out.is_clipped.shape == shape
        metrics = out.metrics.as_floats()
        assert metrics["tokens"] == 0 and not any(math.isinf(x) for x in metrics.values())
        assert all(
            math.isnan(metrics[x])
            for x in ("clip_ratio/low_min", "clip_ratio/high_max", "ratio/max")
            if x in metrics
        )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_every_pair_loss(name, how):
    spec = CATALOGUE["pair_loss"][name].build()
    whole = make_pairs(spec, 2, 4, 19)
    batch = emptied(whole, how)
    if "noise" in batch and how == "no sequence":
        batch["noise"] = whole["noise"][:1]  # one more than pairs
    for divisor in (None, 0, torch.tensor(0.0)):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.preference_loss(**{**batch, "logits": z}, spec=spec, num_pairs_in_batch=divisor)
        assert_zero(out.loss, z)
        assert not any(math.isinf(x) for x in out.metrics.as_floats().values())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_with_a_divisor_of_zero(backend, plan, how):
    z = HOW[how](torch.randn(3, 4, 19)).requires_grad_()
    mask, ids = torch.zeros(z.shape[:2]), torch.ones(z.shape[:2], dtype=torch.int64)
    for divisor in (0, torch.tensor(0)):
        options = dict(completion_mask=mask, num_items_in_batch=divisor, plan=plan, backend=backend)
        for kind in ("forward_kl", "reverse_kl", "symmetric_cross_entropy"):
            assert_zero(rw.distillation_loss(z, z.detach() + 1, kind=kind, **options).loss, z)
        assert_zero(rw.policy_loss(z, ids, 1.0, spec="dapo", **options).loss, z)


def test_micro_batches_without_a_row_change_no_extremum():
    """Combining leaves them out, and a batch of only such micro-batches still has no
    extremum.
    """
    batch = make_batch(rw.methods.grpo(), (3, 4), 19)
    full = rw.policy_loss(**batch, spec="grpo").metrics
    nothing = rw.policy_loss(**emptied(batch, "all masked"), spec="grpo").metrics
    for name in ("clip_ratio/low_min", "clip_ratio/high_max", "ratio/max"):
        assert Metrics.combine([nothing, full, nothing])[name] == full[name]
        assert Metrics.combine([nothing, nothing])[name].isnan()
