"""Infinite and unknown inputs: autograd on the rules and the derived graph that kernels
run give the same gradient of a row.

``0·inf`` selects zero; a NaN loss has a NaN gradient; what overflows is finite in
neither.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from reweight_ops._core.formula.base import RULES
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.formula.program import evaluate_rows
from reweight_ops._core.formula.terms import Term, Terms, combine_terms
from reweight_ops._core.formula.trace import trace_rule

EXTREMES = {
    "logp": (-1.0, -100.5, -math.inf, math.nan, 0.0),
    "old_logp": (-1.0, -101.0, -math.inf, math.nan),
    "ref_logp": (-1.0, -101.5, -math.inf, math.nan),
    "adv": (1.0, -1.0, 0.0, math.nan),
}
ORDINARY = {
    "old_logp": -1.2,
    "ref_logp": -1.0,
    "sampling_logp": -1.1,
    "adv": 1.0,
    "entropy": 1.0,
    "log_sum_p_sq": -1.0,
}


def rows(rule):
    read = trace_rule(type(rule)).leaves | {"logp"}
    read |= {"old_logp"} if "log_ratio" in read else set()
    varied = [name for name in EXTREMES if name in read]
    grid = torch.tensor(list(itertools.product(*(EXTREMES[name] for name in varied))))
    fixed = {name: torch.full((len(grid),), value) for name, value in ORDINARY.items()}
    return fixed | {name: grid[:, i].contiguous() for i, name in enumerate(varied)}


def by_autograd(rule, leaves, clamp, weights):
    logp = leaves["logp"].clone().requires_grad_()
    log_ratio = logp - leaves["old_logp"]
    log_ratio = log_ratio if clamp == math.inf else log_ratio.clamp(-clamp, clamp)
    terms = Terms([Term(rule, 1.0)], [])
    keep = torch.ones(len(logp), dtype=torch.bool)
    loss = combine_terms(
        terms, leaves | {"logp": logp, "log_ratio": log_ratio}, weights, keep, None
    ).weighted_loss
    (grad,) = (
        torch.autograd.grad(loss.sum(), logp, allow_unused=True) if loss.requires_grad else (None,)
    )
    return loss.detach(), torch.zeros_like(logp) if grad is None else grad


@pytest.mark.parametrize("clamp", [20.0, math.inf])
@pytest.mark.parametrize("name", sorted(RULES))
def test_autograd_and_the_derived_graph_agree(name, clamp):
    try:
        rule = RULES[name]()
    except TypeError:
        pytest.skip("has no defaults")
    if hasattr(rule, "clamp"):
        rule = dataclasses.replace(rule, clamp=clamp)
    leaves = rows(rule)
    weights = torch.ones(1, leaves["logp"].numel())
    params = torch.tensor([-clamp, clamp, 1.0, *(float(v) for v in rule.parameters().values())])
    want = evaluate_rows(
        Program.of([type(rule)]), params, leaves, weights, outputs=("weighted_loss", "d_logp")
    )
    loss, grad = by_autograd(rule, leaves, clamp, weights)
    torch.testing.assert_close(loss, want[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(grad.isfinite(), want[1].isfinite())
    finite = grad.isfinite()
    torch.testing.assert_close(grad[finite], want[1][finite], rtol=1e-4, atol=1e-5)
    assert grad[loss.isnan()].isnan().all() and want[1][loss.isnan()].isnan().all()


def test_a_capped_penalty_that_overflows_has_no_gradient():
    """K3 without a clamp at a difference of 100: its value is the cap, in every way to
    the gradient the slope 0.
    """
    rule = RULES["k3"](clamp=math.inf, cap=10.0)
    leaves = {
        "logp": torch.tensor([-101.0]),
        "ref_logp": torch.tensor([-1.0]),
        "old_logp": torch.tensor([-101.0]),
    }
    loss, grad = by_autograd(
        rule,
        {**leaves, **{k: torch.tensor([v]) for k, v in ORDINARY.items() if k not in leaves}},
        20.0,
        torch.ones(1, 1),
    )
    assert loss.item() == 10.0 and grad.item() == 0.0
