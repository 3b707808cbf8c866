"""Every rule against its hand-worked rows, in fp64."""

import math
from types import SimpleNamespace

import golden
import pytest
import torch

from reweight_ops.rules.base import RULES
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
