"""Every rule and every weight against their hand-worked rows, in fp64."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from reweight_ops._core.catalogue.registry import KINDS
from reweight_ops._core.formula.base import RULES, WEIGHTS
from reweight_ops._core.formula.namespace import TorchNamespace
from reweight_ops.testing import golden_rules as golden
from reweight_ops.testing.checks import LOSS_KINDS, OP, by_hand
from reweight_ops.testing.golden import build, golden_error, result_of, token_weights
from reweight_ops.testing.golden_rows import GOLDEN, GOLDEN_KINDS


def evaluate(row: golden.Row):
    """Loss, its two derivatives and the clip flags of one golden row, by the reference
    namespace.
    """
    xp = TorchNamespace(torch.float64)
    leaves = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.leaves.items()}
    for name in ("logp", "entropy"):
        leaves.setdefault(name, torch.tensor(0.0, dtype=torch.float64)).requires_grad_()
    if "old_logp" in leaves:
        leaves["log_ratio"] = leaves["logp"] - leaves["old_logp"]
    rule = RULES[row.rule](**row.parameters)
    token = SimpleNamespace(**leaves)
    loss = rule.loss(xp, token)
    dlogp, dentropy = torch.autograd.grad(
        loss, (leaves["logp"], leaves["entropy"]), allow_unused=True, materialize_grads=True
    )
    flags = rule.clipped(xp, token)
    return (
        loss.item(),
        dlogp.item(),
        dentropy.item(),
        None if flags is None else tuple(bool(f) for f in flags),
    )


@pytest.mark.parametrize(
    "row", golden.ROWS, ids=[f"{i}-{r.rule}" for i, r in enumerate(golden.ROWS)]
)
def test_rule_equals_its_golden_row(row):
    loss, dlogp, dentropy, clipped = evaluate(row)
    for name, got, expected in (
        ("loss", loss, row.loss),
        ("dlogp", dlogp, row.dlogp),
        ("dentropy", dentropy, row.dentropy),
    ):
        assert math.isclose(got, expected, rel_tol=1e-14, abs_tol=1e-15), (
            f"{name}: got {got!r}, expected {expected!r}"
        )
    assert clipped == row.clipped


def test_every_rule_has_a_golden_row():
    ours = {name for name, rule in RULES.items() if rule.__module__.startswith("reweight_ops.")}
    assert ours == {row.rule for row in golden.ROWS}


def evaluate_weight(row: golden.WeightRow) -> torch.Tensor:
    shape = row.sequences, len(row.expected) // row.sequences
    parameters = {
        name: torch.tensor(v, dtype=torch.float64).view(shape) if isinstance(v, list) else v
        for name, v in row.parameters.items()
    }
    mask = [float(i not in row.masked) for i in range(len(row.expected))]
    weights = (WEIGHTS[row.weight](**parameters),)
    return token_weights(
        weights, {**row.leaves, "completion_mask": mask}, shape, dtype=torch.float64
    ).flatten()


@pytest.mark.parametrize(
    "row", golden.WEIGHT_ROWS, ids=[f"{i}-{r.weight}" for i, r in enumerate(golden.WEIGHT_ROWS)]
)
def test_weight_equals_its_golden_row(row):
    expected = torch.tensor(row.expected, dtype=torch.float64)
    torch.testing.assert_close(evaluate_weight(row), expected, rtol=1e-14, atol=1e-15)


def test_every_weight_has_a_golden_row():
    """Its own, or that of the published weight which it is."""
    ours = {
        name for name, weight in WEIGHTS.items() if weight.__module__.startswith("reweight_ops.")
    }
    published = [build(row) for row in GOLDEN if row.kind == "token_weight" and row.tokens]
    classes = {type(weight) for weight in published}
    assert ours == {row.weight for row in golden.WEIGHT_ROWS} | {
        name for name, weight in WEIGHTS.items() if weight in classes
    }


# --- the package's rows, which ``reweight-ops check`` evaluates too -------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "row", GOLDEN, ids=[f"{i}-{r.kind}/{r.name}" for i, r in enumerate(GOLDEN)]
)
def test_entry_equals_its_golden_row(row, dtype):
    assert golden_error(row, dtype) <= 1, result_of(row, dtype)


@pytest.mark.parametrize(
    "row", GOLDEN, ids=[f"{i}-{r.kind}/{r.name}" for i, r in enumerate(GOLDEN)]
)
def test_every_number_of_a_row_is_looked_at(row):
    """A single value that is off by a millionth fails, and so does a missing or
    additional value.
    """
    numbers = list(flat(row.expected))
    for i, x in enumerate(numbers):
        wrong = x + 1e-6 if math.isfinite(x) else 0.0
        assert (
            golden_error(
                dataclasses.replace(row, expected=[*numbers[:i], wrong, *numbers[i + 1 :]])
            )
            > 1
        )
    assert (
        golden_error(dataclasses.replace(row, expected=[*numbers, 0.0]))
        == math.inf
        == golden_error(dataclasses.replace(row, expected=numbers[:-1]))
    )


def flat(value):
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [float(value)]


def test_every_entry_has_a_golden_row():
    """But those that ``check`` compares with the reference, gradient and all."""
    assert {*KINDS, OP} == {*GOLDEN_KINDS, *LOSS_KINDS}
    entries = {(kind, name) for kind in GOLDEN_KINDS for name in by_hand(kind)}
    assert entries == {(row.kind, row.name) for row in GOLDEN}
