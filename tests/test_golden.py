"""Every rule and every weight against their hand-worked rows, in fp64."""

import math
from types import SimpleNamespace

import golden
import pytest
import torch

import reweight_ops as rw
from reweight_ops.rules.base import RULES, WEIGHTS
from reweight_ops.rules.namespace import TorchNamespace


def evaluate(row: golden.Row):
    """Loss, its two derivatives and the clip flags of one golden row, by the reference namespace."""
    xp = TorchNamespace(torch.float64)
    leaves = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.leaves.items()}
    for name in ("logp", "entropy"):
        leaves.setdefault(name, torch.tensor(0.0, dtype=torch.float64)).requires_grad_()
    if "old_logp" in leaves:
        leaves["log_ratio"] = leaves["logp"] - leaves["old_logp"]
    rule = RULES[row.rule](**row.parameters)
    token = SimpleNamespace(**leaves)
    loss = rule.loss(xp, token)
    dlogp, dentropy = torch.autograd.grad(loss, (leaves["logp"], leaves["entropy"]), allow_unused=True, materialize_grads=True)
    flags = rule.clipped(xp, token)
    return loss.item(), dlogp.item(), dentropy.item(), None if flags is None else tuple(bool(f) for f in flags)


@pytest.mark.parametrize("row", golden.ROWS, ids=[f"{i}-{r.rule}" for i, r in enumerate(golden.ROWS)])
def test_rule_equals_its_golden_row(row):
    loss, dlogp, dentropy, clipped = evaluate(row)
    for name, got, expected in (("loss", loss, row.loss), ("dlogp", dlogp, row.dlogp), ("dentropy", dentropy, row.dentropy)):
        assert math.isclose(got, expected, rel_tol=1e-14, abs_tol=1e-15), f"{name}: got {got!r}, expected {expected!r}"
    assert clipped == row.clipped


def test_every_rule_has_a_golden_row():
    ours = {name for name, rule in RULES.items() if rule.__module__.startswith("reweight_ops.")}
    assert ours == {row.rule for row in golden.ROWS}


def evaluate_weight(row: golden.WeightRow) -> torch.Tensor:
    """The weights as the op applies them: per-token losses of ``-u*logp``, divided by ``-logp``."""
    shape = row.sequences, len(row.expected) // row.sequences

    def tensor(value):
        return torch.as_tensor(value, dtype=torch.float64).expand(len(row.expected)).reshape(shape)

    given = {"logp": -golden.LN2, "entropy": 0.0, **row.leaves}
    names = {"old_logp": "old_per_token_logps", "ref_logp": "ref_per_token_logps", "sampling_logp": "sampling_per_token_logps"}
    stored = {name: tensor(given[leaf]) for leaf, name in names.items() if leaf in given}
    mask = torch.ones(len(row.expected), dtype=torch.bool)
    mask[list(row.masked)] = False
    parameters = {name: tensor(v) if isinstance(v, list) else v for name, v in row.parameters.items()}
    spec = rw.PolicyLossSpec(surrogate=rw.rules.likelihood.NLL(), weights=(WEIGHTS[row.weight](**parameters),), reduction=rw.NoReduction())
    logps, adv = tensor(given["logp"]), tensor(given["adv"]) if "adv" in given else None
    out = rw.policy_loss_from_logps(logps, adv, spec=spec, entropies=tensor(given["entropy"]), completion_mask=mask.view(shape), **stored)
    return (out.loss / -logps).flatten()


@pytest.mark.parametrize("row", golden.WEIGHT_ROWS, ids=[f"{i}-{r.weight}" for i, r in enumerate(golden.WEIGHT_ROWS)])
def test_weight_equals_its_golden_row(row):
    expected = torch.tensor(row.expected, dtype=torch.float64)
    torch.testing.assert_close(evaluate_weight(row), expected, rtol=1e-14, atol=1e-15)


def test_every_weight_has_a_golden_row():
    ours = {name for name, weight in WEIGHTS.items() if weight.__module__.startswith("reweight_ops.")}
    assert ours == {row.weight for row in golden.WEIGHT_ROWS}
