"""Losses on stored rows of which some are NaN: row kernels and autograd in fp64 have
the same NaN, and the same numbers elsewhere.
"""

import dataclasses
import math

import pytest
import torch
from stored_losses import batch_of, found, same

import reweight_ops as rw

pytest.importorskip("reweight_ops._C", exc_type=ImportError)

NAN_ROW = (2, 3)
CONTRASTS = [
    rw.GroupContrast(group_size=2),
    rw.GroupContrast(group_size=2, temperature=math.inf, preference="advantages"),
    rw.GroupClassification(group_size=2),
]


def broken(spec, name="logits", at=NAN_ROW, **changes):
    batch = batch_of(spec, **changes)
    batch[name] = batch[name].clone()
    batch[name][at] = math.nan
    return batch


def nan_rows(spec, batch):
    """The rows whose gradient is NaN, after a comparison of both evaluations."""
    same(spec, batch)
    loss, grad, *_ = found(spec, batch, "cpu", torch.float32)
    assert loss.isnan()
    return {tuple(row) for row in grad.isnan().any(-1).nonzero().tolist()}


def test_a_row_that_the_ratio_does_not_average():
    """Its ratio is known. The derivative by it reaches the rows that are averaged."""
    spec = rw.methods.dapo().replace(ratio=rw.BatchMeanRatio(negative_only=True))
    batch = broken(spec)
    assert batch["advantages"][NAN_ROW] > 0
    assert nan_rows(spec, batch) == {NAN_ROW}


def test_a_penalty_of_nan_beside_a_ratio_of_all_rows():
    spec = rw.methods.grpo(beta=0.1).replace(ratio=rw.BatchMeanRatio())
    assert nan_rows(spec, broken(spec, "ref_per_token_logps")) == {NAN_ROW}


def test_ignored_rows_beside_a_hinge_of_nan():
    spec = rw.methods.reinforce().replace(reduction=rw.HingeConstraint(bound=-3.0))
    batch = broken(spec)
    assert nan_rows(spec, batch) == {
        tuple(row) for row in batch["completion_mask"].nonzero().tolist()
    }


@pytest.mark.parametrize("reduction", [*CONTRASTS, rw.HingeConstraint(bound=-3.0)], ids=repr)
def test_a_coupled_penalty_with_a_coefficient_of_zero(reduction):
    """It selects no row, so it does not see a NaN."""
    spec = rw.methods.grpo(beta=0.1)
    penalty = dataclasses.replace(spec.penalties[0], coef=0.0, reduction=reduction)
    spec = dataclasses.replace(spec, penalties=(penalty,))
    batch = broken(spec, "ref_per_token_logps")
    same(spec, batch)
    loss, grad, *_ = found(spec, batch, "cpu", torch.float32)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("method", [rw.methods.dapo, rw.methods.reinforce])
@pytest.mark.parametrize("reduction", CONTRASTS, ids=repr)
@pytest.mark.parametrize("at", [(4, 1), (3, 1)], ids=["a prompt of one side", "of two"])
def test_an_advantage_of_a_coupled_reduction(at, reduction, method):
    """Its sequence's side is unknown, so the loss is."""
    spec = method().replace(reduction=reduction)
    batch = broken(spec, "advantages", at)
    batch["advantages"][4:] = torch.where(batch["advantages"][4:].isnan(), math.nan, -0.3)
    rows = nan_rows(spec, batch)
    assert {(at[0], t) for t in range(3)} <= rows and not any(s < 2 for s, _ in rows)


@pytest.mark.parametrize("method", [rw.methods.dapo, rw.methods.reinforce])
@pytest.mark.parametrize("reduction", CONTRASTS, ids=repr)
def test_a_row_in_a_prompt_that_adds_nothing(reduction, method):
    """A coupled reduction multiplies it by 0. No other row of the prompt is NaN."""
    spec = method().replace(reduction=reduction)
    at = (4, 1)  # both sequences of its prompt have positive advantages
    batch = broken(spec, "token_weights", at, token_weights=torch.ones(6, 8))
    assert nan_rows(spec, batch) == {at}


def test_a_row_of_a_prompt_that_adds_something():
    """The score of a positive sequence is NaN, and its derivative is not."""
    spec = rw.methods.reinforce().replace(reduction=rw.GroupContrast(group_size=2))
    batch = broken(spec, at=NAN_ROW)
    assert batch["advantages"][2, 0] > 0 > batch["advantages"][3, 0]
    assert nan_rows(spec, batch) == {(2, t) for t in range(8)}


def test_an_unlikely_sum_of_infinite_terms():
    """Two terms of a row of log-prob -inf are inf and -inf, in a prompt of one side."""
    contrast = rw.GroupContrast(group_size=2)
    spec = rw.methods.sft().replace(reduction=contrast)
    penalty = rw.Penalty(rw.rules.penalties.K1(), 0.2, reduction=rw.TokenMean())
    spec = spec.with_penalty(penalty)
    batch = batch_of(spec)
    batch["logits"] = batch["logits"].clone()
    batch["logits"][4, 1, batch["completion_ids"][4, 1]] = -math.inf
    assert nan_rows(spec, batch) == {(4, 1)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_token_that_dppo_drops_at_any_ratio(backend):
    """A truncation at inf keeps a ratio of inf, and nothing multiplies it by 0."""
    rule = rw.rules.surrogates.DppoTV(ratio_max=math.inf)
    spec = rw.PolicyLossSpec(surrogate=rule, ratio=rw.TokenRatio(clamp=math.inf))
    batch = batch_of(spec, advantages=torch.ones(6, 8))
    old = rw.token_logps(batch["logits"].detach(), batch["completion_ids"])
    batch["old_per_token_logps"] = old - 100.0
    out = rw.policy_loss(**batch, spec=spec, backend=backend, plan="two_pass", unused="ignore")
    dropped = out.is_clipped
    assert 3 < dropped.sum() < batch["completion_mask"].sum()
    assert out.per_token_loss[~dropped].isinf().any()
    assert (out.per_token_loss[dropped] == 0).all() and (out.coef[dropped] == 0).all()


def test_a_nan_advantage_beside_a_ratio_of_all_rows():
    """The minimum of a clip is NaN, and so is its derivative by the ratio, which is
    outside of the bounds.
    """
    spec = rw.methods.dapo().replace(ratio=rw.BatchMeanRatio())
    batch = broken(spec, "advantages")
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - 2.0
    assert nan_rows(spec, batch) == {
        tuple(row) for row in batch["completion_mask"].nonzero().tolist()
    }


@pytest.mark.parametrize("reduction", [*CONTRASTS, rw.HingeConstraint(bound=-3.0)], ids=repr)
def test_a_row_beside_a_ratio_of_some_under_a_coupled_reduction(reduction):
    """The ratio does not average it, so its derivative by the ratio is known, and
    reaches no other row as NaN.
    """
    ratio = rw.BatchMeanRatio(negative_only=True)
    spec = rw.methods.gspo().replace(ratio=ratio, reduction=reduction)
    spec = spec.with_penalty(rw.Penalty(rw.rules.penalties.K3(), 0.1, rw.TokenMean()))
    batch = broken(spec)
    assert batch["advantages"][NAN_ROW] > 0
    assert nan_rows(spec, batch) == {NAN_ROW}


def test_an_advantage_beside_a_ratio_of_some_under_a_coupled_reduction():
    """The rule of REAL does not read it, and its reduction drops the whole sequence."""
    spec = rw.methods.real().replace(ratio=rw.BatchMeanRatio(negative_only=True))
    batch = broken(spec, "advantages")
    assert not any(s != NAN_ROW[0] for s, _ in nan_rows(spec, batch))
