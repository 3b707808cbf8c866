"""Hidden states that are not finite, in rows that count and in rows that do not: the
latter reach no parameter's gradient.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import Lora
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
B, T, D, V, R = 2, 16, 8, 37, 3
NAMES = ("hidden", "weight", "bias", "a", "b")
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def make(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    sizes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,), "a": (R, D), "b": (V, R)}
    made = {
        name: torch.randn(size, generator=g, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
    }
    return made, torch.randint(V, (B, T), generator=g), torch.randn(B, T, generator=g)


def gradients(made, ids, adv, plan, backend, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in made.items()}
    head = dict(
        lm_head_bias=leaves["bias"],
        lora=Lora(leaves["a"], leaves["b"], 0.5),
        chunk_rows=5,
        backend=backend,
    )
    if plan == "logps":
        total = rw.linear_token_logps(
            leaves["hidden"], leaves["weight"], ids, **head, **options
        ).sum()
    else:
        total = rw.linear_policy_loss(
            leaves["hidden"], leaves["weight"], ids, adv, spec="grpo", plan=plan, **head, **options
        ).loss
    return total.detach(), dict(
        zip(NAMES, torch.autograd.grad(total, [leaves[name] for name in NAMES]), strict=True)
    )


def same(with_nan, healthy, out):
    assert torch.equal(with_nan[0], healthy[0])
    for name in NAMES:
        assert torch.equal(with_nan[1][name], healthy[1][name]), name
    assert (with_nan[1]["hidden"][out] == 0).all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["logps", "one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
# docs/semantics.md: S32
def test_masked_rows_reach_no_gradient(backend, plan, dtype, value):
    """Without compaction, which is the default on a GPU and under torch.compile."""
    made, ids, adv = make(dtype)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3] = mask[1, 11:] = False
    options = dict(completion_mask=mask, compact_rows=False)
    healthy = gradients(made, ids, adv, plan, backend, **options)
    made["hidden"][~mask] = VALUES[value]
    same(gradients(made, ids, adv, plan, backend, **options), healthy, ~mask)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("plan", ["logps", "one_pass", "two_pass"])
def test_a_masked_row_that_row_index_names(plan, compact):
    made, ids, adv = make()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3] = False
    options = dict(completion_mask=mask, row_index=torch.arange(B * T), compact_rows=compact)
    healthy = gradients(made, ids, adv, plan, "reference", **options)
    made["hidden"][~mask] = math.nan
    same(gradients(made, ids, adv, plan, "reference", **options), healthy, ~mask)


@pytest.mark.parametrize("compact", [None, False, True])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
# docs/semantics.md: S32
def test_rows_without_a_coefficient_reach_no_gradient(backend, plan, compact):
    """One row of 32: too few to be dropped."""
    made, ids, adv = make()
    weights = torch.ones(B, T)
    weights[1, 4] = 0
    options = dict(token_weights=weights, compact_rows=compact)
    healthy = gradients(made, ids, adv, plan, backend, **options)
    made["hidden"][1, 4] = math.nan
    same(gradients(made, ids, adv, plan, backend, **options), healthy, weights == 0)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("plan", ["logps", "one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_row_that_counts_is_not_hidden(backend, plan, compact, value):
    made, ids, adv = make()
    made["hidden"][1, 4, 2] = VALUES[value]
    loss, found = gradients(made, ids, adv, plan, backend, compact_rows=compact)
    assert loss.isnan()
    assert found["hidden"][1, 4].isnan().all() and found["hidden"][0].isfinite().all()
    assert all(found[name].isnan().all() for name in NAMES[1:])


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_compiled(plan):
    made, ids, adv = make()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3] = False
    made["hidden"][~mask] = math.nan

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(hidden, weight, ids, adv, mask):
        return rw.linear_policy_loss(
            hidden, weight, ids, adv, spec="grpo", plan=plan, completion_mask=mask, chunk_rows=5
        ).loss

    leaves = [made[name].clone().requires_grad_() for name in ("hidden", "weight")]
    grads = torch.autograd.grad(loss(*leaves, ids, adv, mask), leaves)
    assert all(g.isfinite().all() for g in grads) and (grads[0][~mask] == 0).all()
