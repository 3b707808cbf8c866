"""A row that is all -inf, or holds +inf or NaN, is NaN, whatever its rule compares, and
no other row is.

This holds for every backend, plan and method.
"""

import dataclasses
import math

import contract
import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load, unsupported_reason
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.formula.trace import trace_weight
from reweight_ops._core.spec.facts import inner_formulas
from reweight_ops.rules.penalties import K3
from reweight_ops.testing import make_batch
from reweight_ops.weights.entropy import DualLevelDownSampling, TopEntropy

BACKENDS = [
    b
    for b in ("reference", "cpu", "triton")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
BAD_LOGITS = {
    "nan": (math.nan, slice(7, 8)),
    "+inf": (math.inf, slice(0, 1)),
    "all -inf": (-math.inf, slice(None)),
}


def gradient(batch, spec, **options):
    z = batch["logits"].detach().clone().requires_grad_()
    out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, **options)
    (out.loss if out.loss.dim() == 0 else out.loss.sum()).backward()
    return z.grad, out


@pytest.mark.parametrize("bad_logit", BAD_LOGITS)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(name, backend, plan, bad_logit):  # docs/semantics.md: S26
    spec = METHODS[name].build()
    if plan == "one_pass" and spec.one_pass_unsupported_reason:
        pytest.skip("two passes only")
    rows_couple = (
        spec.ratio.level == "batch"
        or any(r.coupled for r in spec.reductions)
        or any(trace_weight(type(w)).uses_batch for w in (*spec.all_weights, *inner_formulas(spec)))
    )
    if backend == "triton" and (
        name not in ("grpo", "advantage_reweighting") or plan == "two_pass"
    ):
        pytest.skip("the interpreter is slow; above the primitives nothing knows the backend")
    batch = make_batch(spec, (2, 6), 37)
    batch["completion_mask"].fill_(True)
    healthy, _ = gradient(batch, spec, plan=plan, backend=backend)
    value, columns = BAD_LOGITS[bad_logit]
    batch["logits"] = batch["logits"].detach().clone()
    batch["logits"][1, 4, columns] = value
    grad, out = gradient(batch, spec, plan=plan, backend=backend)
    assert grad[1, 4].isnan().all() and out.loss.isnan()
    if rows_couple:
        # a statistic over a batch that holds a NaN may be NaN, and every row's weight
        # with it
        return
    assert out.per_token_logps[1, 4].isnan() and out.coef[1, 4].isnan()
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 4] = False
    if plan == "one_pass":  # no row knows of another
        assert torch.equal(grad[others], healthy[others])
        assert torch.equal(out.coef[others].isnan(), torch.zeros(11, dtype=torch.bool))
    elif type(spec.ratio) is rw.TokenRatio and not spec.one_pass_unsupported_reason:
        torch.testing.assert_close(grad[others], healthy[others], rtol=1e-6, atol=1e-9)
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_row_is_not_nan(backend):
    contract.check_a_sure_row(load(backend))


def test_choosing_tokens_does_not_hide_a_nan_row():
    for weight in (TopEntropy(fraction=0.25), DualLevelDownSampling(fraction=0.25)):
        spec = dataclasses.replace(rw.methods.grpo(), weights=(weight,))
        batch = make_batch(spec, (2, 6), 37)
        batch["completion_mask"].fill_(True)
        batch["logits"][1, 4, 3] = math.nan
        grad, out = gradient(batch, spec)
        assert grad[1, 4].isnan().all() and out.loss.isnan(), weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_nan_row_that_no_term_selects_is_zero(plan, backend):
    """A weight of zero selects zero here too: neither the loss nor a gradient sees the
    row.
    """
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
    out = rw.policy_loss_from_logps(
        logps, torch.tensor([1.0]), spec="dapo", old_per_token_logps=torch.full((1, 3), -1.0)
    )
    out.loss.backward()
    assert logps.grad[0, 1].isnan() and logps.grad[0, [0, 2]].isfinite().all()


#: Weights that compare a stored log-prob, and so give a token with a NaN no weight: it
#: is in no term.
DROPPED = {("lopti", "old_logp"), ("top_entropy", "old_logp")}
#: Weights that treat a sampler's NaN as a ratio of 1.
UNKNOWN = {("decoupled_ppo", "sampling_logp")}
STORED = {
    "old_logp": "old_per_token_logps",
    "ref_logp": "ref_per_token_logps",
    "sampling_logp": "sampling_per_token_logps",
}


def stored_leaves(spec):
    against_old = "log_ratio" in spec.requires and spec.ratio.against == "old"
    return [
        leaf for leaf in STORED if leaf in spec.requires or (leaf == "old_logp" and against_old)
    ]


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
# docs/semantics.md: S26
def test_a_stored_log_prob_of_nan_is_a_gradient_of_nan(name, backend, plan):
    """A guard on the gradient's norm must see it, whatever a clip makes of a comparison
    with NaN.
    """
    spec = METHODS[name].build()
    if plan == "one_pass" and spec.one_pass_unsupported_reason:
        pytest.skip("two passes only")
    if backend == "triton" and (name not in ("grpo", "cispo") or plan == "two_pass"):
        pytest.skip("the interpreter is slow; above the primitives nothing knows the backend")
    for leaf in stored_leaves(spec):
        batch = make_batch(spec, (2, 6), 37)
        if batch.get(STORED[leaf]) is None or (name, leaf) in DROPPED | UNKNOWN:
            continue
        batch["completion_mask"].fill_(True)
        batch[STORED[leaf]] = batch[STORED[leaf]].clone()
        batch[STORED[leaf]][1, 4] = math.nan
        grad, out = gradient(batch, spec, plan=plan, backend=backend)
        assert grad[1, 4].isnan().all() and out.loss.isnan(), leaf
        if not spec.couples_rows:
            assert grad[1, [0, 1, 2, 3, 5]].isfinite().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
# docs/semantics.md: S11
def test_an_overflow_that_is_not_selected_has_no_gradient(backend, plan):
    """K3 without a clamp at a difference of 100 has the cap as value and slope 0. And
    TRL's clip with a ratio that overflows.
    """
    spec = (
        rw.methods.grpo()
        .replace(ratio=rw.TokenRatio(clamp=math.inf))
        .with_penalty(rw.Penalty(K3(clamp=math.inf, cap=10.0), 0.1))
    )
    batch = make_batch(spec, (2, 6), 37)
    batch["completion_mask"].fill_(True)
    logps = rw.token_logps(batch["logits"].detach(), batch["completion_ids"])
    batch["old_per_token_logps"], batch["ref_per_token_logps"] = logps - 100, logps + 100
    batch["advantages"] = torch.ones(2)
    grad, out = gradient(batch, spec, plan=plan, backend=backend)
    torch.testing.assert_close(out.per_token_loss, torch.full((2, 6), 1.0 - 1.2))
    assert (grad == 0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_log_prob_of_minus_inf_in_a_sequence_ratio(backend):
    """GSPO-token has GSPO's values; the path of its own gradient is not
    part of them."""
    losses = []
    for spec in (rw.methods.gspo(), rw.methods.gspo_token()):
        batch = make_batch(spec, (2, 6), 37)
        batch["logits"] = batch["logits"].detach().clone()
        batch["completion_mask"].fill_(True)
        batch["logits"][1, 4, batch["completion_ids"][1, 4]] = -math.inf
        grad, out = gradient(batch, spec, backend=backend)
        assert grad.isfinite().all()
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0].isfinite()
