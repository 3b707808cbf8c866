"""A row that is all -inf, or holds +inf or NaN: NaN in that row, whatever its rule compares, and nowhere else. Every backend, plan and method."""

import dataclasses
import math

import contract
import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load, why_not
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.formula.trace import trace_weight
from reweight_ops.testing import make_batch
from reweight_ops.weights.entropy import DualLevelDownSampling, TopEntropy

BACKENDS = [b for b in ("reference", "cpu", "triton") if why_not(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None]
SICKNESSES = {"nan": (math.nan, slice(7, 8)), "+inf": (math.inf, slice(0, 1)), "all -inf": (-math.inf, slice(None))}


def gradient(batch, spec, **options):
    z = batch["logits"].detach().clone().requires_grad_()
    out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, **options)
    (out.loss if out.loss.dim() == 0 else out.loss.sum()).backward()
    return z.grad, out


@pytest.mark.parametrize("sickness", SICKNESSES)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(name, backend, plan, sickness):
    spec = METHODS[name].build()
    if plan == "one_pass" and spec.one_pass_obstacle:
        pytest.skip("two passes only")
    rows_couple = any(r.coupled for r in spec.reductions) or any(trace_weight(type(w)).uses_batch for w in spec.all_weights)
    if backend == "triton" and (name not in ("grpo", "advantage_reweighting") or plan == "two_pass"):
        pytest.skip("the interpreter is slow; above the verbs nothing knows the backend")
    batch = make_batch(spec, (2, 6), 37)
    batch["completion_mask"].fill_(True)
    healthy, _ = gradient(batch, spec, plan=plan, backend=backend)
    value, columns = SICKNESSES[sickness]
    batch["logits"] = batch["logits"].detach().clone()
    batch["logits"][1, 4, columns] = value
    grad, out = gradient(batch, spec, plan=plan, backend=backend)
    assert grad[1, 4].isnan().all() and out.loss.isnan()
    if rows_couple:
        return  # a statistic over a batch that holds a NaN may be NaN, and every row's weight with it
    assert out.per_token_logps[1, 4].isnan() and out.coef[1, 4].isnan()
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 4] = False
    if plan == "one_pass":  # no row knows of another
        assert torch.equal(grad[others], healthy[others])
        assert torch.equal(out.coef[others].isnan(), torch.zeros(11, dtype=torch.bool))
    elif type(spec.ratio) is rw.TokenRatio and not spec.one_pass_obstacle:
        torch.testing.assert_close(grad[others], healthy[others], rtol=1e-6, atol=1e-9)
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_row_is_not_sick(backend):
    contract.check_a_sure_row(load(backend))


def test_choosing_tokens_does_not_hide_a_sick_row():
    for weight in (TopEntropy(fraction=0.25), DualLevelDownSampling(fraction=0.25)):
        spec = dataclasses.replace(rw.methods.grpo(), weights=(weight,))
        batch = make_batch(spec, (2, 6), 37)
        batch["completion_mask"].fill_(True)
        batch["logits"][1, 4, 3] = math.nan
        grad, out = gradient(batch, spec)
        assert grad[1, 4].isnan().all() and out.loss.isnan(), weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_sick_row_that_no_term_selects_is_zero(plan, backend):
    """A weight of zero selects zero, here too: neither the loss nor a gradient knows of it."""
    spec = rw.methods.grpo()
    batch = make_batch(spec, (2, 6), 37)
    batch["completion_mask"].fill_(True)
    weights = torch.ones(2, 6)
    weights[1, 4] = 0.0
    batch["logits"] = batch["logits"].detach().clone()
    batch["logits"][1, 4, 3] = math.nan
    grad, out = gradient(batch, spec, plan=plan, backend=backend, token_weights=weights)
    assert torch.equal(grad[1, 4], torch.zeros(37)) and out.loss.isfinite()
    assert grad[0].abs().sum() > 0


def test_log_probs_that_are_nan_have_a_nan_gradient():
    logps = torch.tensor([[-1.0, math.nan, -2.0]], requires_grad=True)
    out = rw.policy_loss_from_logps(logps, torch.tensor([1.0]), spec="dapo", old_per_token_logps=torch.full((1, 3), -1.0))
    out.loss.backward()
    assert logps.grad[0, 1].isnan() and logps.grad[0, [0, 2]].isfinite().all()
